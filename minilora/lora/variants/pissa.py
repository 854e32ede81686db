"""PiSSA: A and B start as the principal part of W, and training changes this part.

    W = U diag(σ) Vᵀ,   s B₀ A₀ = U_r diag(σ_r) V_rᵀ       PiSSA §3, eq. 2 and 3 (arXiv:2404.02948)
    h = (W − s B₀ A₀) x + s B A x = W x + s (B A − B₀ A₀) x

s B₀ A₀ is the best approximation of W with rank r. The paper and PEFT overwrite the base with the
residual W − s B₀ A₀. Here W does not change. The subtracted part is stored in the adapter as A₀ and
B₀, r (in + out) numbers that do not train. The base can therefore be shared, switched back to, and
recognised by its fingerprint, also in 4 bits, and nothing is rounded to the dtype of W. The change
is computed without cancellation, and it is exactly zero at the start:

    B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀)

A file contains a plain LoRA of rank 2r for W with the same s, as PEFT's conversion does:

    [B, −B₀] [A; A₀] = B A − B₀ A₀

Simplified: dropout acts on the change s (B A − B₀ A₀) x. In PEFT it also acts on the part of W that
the adapter holds. The residual of a 4-bit base is not quantised again (QPiSSA, §4): it is the
dequantised W minus s B₀ A₀.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.base_layers.dense_weight import linear_weight
from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import AdapterBase, LoRAAdapter
from minilora.lora.low_rank import low_rank


class PiSSAAdapter(AdapterBase):
    """Trainable A and B, and their frozen initial values A₀ and B₀ (first_A, first_B), in fp32.

    Args:
        plain: A plain adapter, whose hyperparameters are taken over.
        A: Initial value of A, (r, in).
        B: Initial value of B, (out, r).
    """

    lora_bias = None

    def __init__(self, plain: LoRAAdapter, A: Tensor, B: Tensor):
        super().__init__()
        self.scaling = plain.scaling
        self.r = plain.r
        self.lora_alpha = plain.lora_alpha
        self.dropout = plain.dropout
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.first_A = nn.Parameter(A.clone(), requires_grad=False)  # (r, in)
        self.first_B = nn.Parameter(B.clone(), requires_grad=False)  # (out, r)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + s · ((B − B₀) A + B₀ (A − A₀)) dropout(x), computed in x.dtype.

        Args:
            x: Input of the layer, (…, in).
            y: Output of the layer so far, (…, out).
            base: The frozen layer, which is not read.

        Returns:
            The corrected output, (…, out).
        """
        x = self.dropout(x)  # (…, in)
        moved_A = self.lora_A - self.first_A  # (r, in), in fp32 before it is rounded
        moved_B = self.lora_B - self.first_B  # (out, r)
        z = self.scaling * F.linear(x, self.lora_A.to(x.dtype))  # (…, r)
        moved_z = self.scaling * F.linear(x, moved_A.to(x.dtype))  # (…, r)
        change_by_B = F.linear(z, moved_B.to(x.dtype))  # (…, out)
        change_by_A = F.linear(moved_z, self.first_B.to(x.dtype))  # (…, out)
        return y + (change_by_B + change_by_A)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s · (B A − B₀ A₀), the matrix that merging adds to W.

        Args:
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (out, in).
        """
        A = self.lora_A.to(dtype)  # (r, in)
        B = self.lora_B.to(dtype)  # (out, r)
        A0 = self.first_A.to(dtype)  # (r, in)
        B0 = self.first_B.to(dtype)  # (out, r)
        return self.scaling * ((B - B0) @ A + B0 @ (A - A0))  # (out, in)

    def plain(self) -> LoRAAdapter:
        """Return the same change as a plain adapter of rank 2r.

        It has the scaling s of this adapter. Its α is set by the config that is stored with it.

        Raises:
            ValueError: 2r is larger than the layer allows.
        """
        r, in_features = self.lora_A.shape
        out_features = len(self.lora_B)
        adapter = LoRAAdapter(in_features, out_features, 2 * r, 2 * r)
        A = self.lora_A.detach()
        B = self.lora_B.detach()
        adapter.scaling = self.scaling
        adapter.lora_A.data = torch.cat([A, self.first_A.detach()])  # (2r, in)
        adapter.lora_B.data = torch.cat([B, -self.first_B.detach()], dim=1)  # (out, 2r)
        return adapter

    def requires_grad_(self, requires_grad: bool = True) -> "PiSSAAdapter":
        """Make A and B trainable or frozen. A₀ and B₀ are always frozen.

        Args:
            requires_grad: True makes A and B trainable.

        Returns:
            The adapter itself.
        """
        self.lora_A.requires_grad_(requires_grad)
        self.lora_B.requires_grad_(requires_grad)
        return self


def begin(plain: LoRAAdapter, layer: nn.Module, config: LoRAConfig, seed: int) -> PiSSAAdapter:
    """Return a PiSSA adapter that changes nothing yet.

    Args:
        plain: A new plain adapter.
        layer: The layer, or a LoRALayer around it.
        config: The config; "pissa_niter_N" decomposes W approximately, in N iterations.
        seed: Seed of the approximate decomposition.

    Raises:
        ValueError: 2r, the rank of the adapter's file, is larger than the layer allows.
    """
    r = plain.r
    max_rank = min(len(plain.lora_B), plain.lora_A.shape[1])
    if 2 * r > max_rank:
        raise ValueError(
            "r: a PiSSA is stored as a LoRA of rank 2r: "
            f"expected 1 to {max_rank // 2}, got {r}. Lower r."
        )
    base = unwrapped(layer)
    if next(base.parameters()).is_meta:  # shapes only, for a memory plan
        return PiSSAAdapter(plain, plain.lora_A.data, plain.lora_B.data)
    niter_text = str(config.init_lora_weights).partition("_niter_")[2]
    niter = int(niter_text) if niter_text else None
    B, A = low_rank(linear_weight(base), r, plain.scaling, niter, seed)  # (out, r), (r, in)
    return PiSSAAdapter(plain, A, B)
