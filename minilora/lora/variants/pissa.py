"""PiSSA: A and B begin as the principal part of W, and training moves what matters most in it (arXiv 2404.02948, §3).

    W = U diag(σ) Vᵀ,   s B₀ A₀ = U_r diag(σ_r) V_rᵀ            eq. 2, 3; the best approximation of W with rank r
    h = (W − s B₀ A₀) x + s B A x = W x + s (B A − B₀ A₀) x

The paper and PEFT write the residual W − s B₀ A₀ over the base. Here W stays what it is, and what is taken off is kept
beside it as A₀ and B₀, r (in + out) numbers that do not train: the base can be shared, switched back to and told by its
fingerprint, in 4 bits too, and nothing is rounded to W's dtype. Computed without cancellation, and with no bit changed
at the start:

    B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀)

A file is a plain LoRA of rank 2r beside W, with the same s, as PEFT converts its own:  [B, −B₀] [A; A₀] = B A − B₀ A₀
Simplified against PEFT: dropout acts on the change s (B A − B₀ A₀) x, not on the part of W that the adapter holds. The
residual of a 4-bit base is not quantised again (QPiSSA, §4): it is W as the 4 bits have it, less s B₀ A₀.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRAAdapter
from minilora.lora.low_rank import low_rank
from minilora.lora.variants.base import dense_weight


class PiSSAAdapter(nn.Module):
    """A and B, which train, and A₀ and B₀ (first_A, first_B), where they began; fp32."""

    def __init__(self, plain: LoRAAdapter, A: Tensor, B: Tensor):
        super().__init__()
        self.scaling, self.r, self.lora_alpha, self.dropout = plain.scaling, plain.r, plain.lora_alpha, plain.dropout
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.first_A = nn.Parameter(A.clone(), requires_grad=False)  # (r, in)
        self.first_B = nn.Parameter(B.clone(), requires_grad=False)  # (out, r)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y + s · ((B − B₀) A + B₀ (A − A₀)) dropout(x), computed in x.dtype; x (…, in), y (…, out)."""
        x = self.dropout(x)
        moved_A, moved_B = self.lora_A - self.first_A, self.lora_B - self.first_B  # in fp32, before they are rounded
        z, moved = (self.scaling * F.linear(x, M.to(x.dtype)) for M in (self.lora_A, moved_A))  # (…, r) each
        return y + (F.linear(z, moved_B.to(x.dtype)) + F.linear(moved, self.first_B.to(x.dtype)))  # (…, out)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """What merging adds to W: s · (B A − B₀ A₀) (out, in)."""
        A, B, A0, B0 = (M.detach().to(dtype) for M in (self.lora_A, self.lora_B, self.first_A, self.first_B))
        return self.scaling * ((B - B0) @ A + B0 @ (A - A0))

    def plain(self) -> LoRAAdapter:
        """The same change as a plain adapter of rank 2r. ValueError where the layer has no room for that rank."""
        (r, inside), outside = self.lora_A.shape, len(self.lora_B)
        adapter = LoRAAdapter(inside, outside, 2 * r, 2 * r)  # its α is the config's affair: only A and B are read
        adapter.lora_A.data = torch.cat([self.lora_A.detach(), self.first_A.detach()])  # (2r, in)
        adapter.lora_B.data = torch.cat([self.lora_B.detach(), -self.first_B.detach()], dim=1)  # (out, 2r)
        return adapter

    def requires_grad_(self, requires_grad: bool = True) -> "PiSSAAdapter":
        """Of A and B: A₀ and B₀ are frozen for good."""
        for M in (self.lora_A, self.lora_B):
            M.requires_grad_(requires_grad)
        return self

    lora_bias = None
    tensors = cast(Any, LoRAAdapter.tensors)
    _apply, extra_repr = cast(Any, LoRAAdapter._apply), LoRAAdapter.extra_repr


def begin(plain: LoRAAdapter, layer: nn.Module, config: LoRAConfig, seed: int) -> PiSSAAdapter:
    """A PiSSA that changes nothing yet. ValueError where its file would not fit: 2r must be a rank of the layer."""
    r, most = plain.r, min(len(plain.lora_B), plain.lora_A.shape[1])
    if 2 * r > most:
        raise ValueError(f"r: a PiSSA is kept as a LoRA of rank 2r: expected 1 to {most // 2}, got {r}. Lower r.")
    niter = str(config.init_lora_weights).partition("_niter_")[2]
    base = unwrapped(layer)
    if next(base.parameters()).is_meta:  # shapes only, to plan with
        return PiSSAAdapter(plain, plain.lora_A.data, plain.lora_B.data)
    B, A = low_rank(dense_weight(base), r, plain.scaling, int(niter) if niter else None, seed)
    return PiSSAAdapter(plain, A, B)
