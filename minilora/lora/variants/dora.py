"""DoRA: the length of each row of W trains by itself, and B A only turns the row (arXiv 2402.09353, §4, eq. 5).

    W' = m ∘ V / ‖V‖,   V = W + s B A,   ‖·‖ of each row       at first m = ‖V‖, so that W' = W
    h  = b + g ∘ (W x + s B A x),   g = m / ‖V‖                  = h₀ + (g − 1) ∘ (W x) + g ∘ (s B A x)

‖V‖ counts as a constant in backward (§4.3), so m's gradient is what comes back to each output, scaled. V is not made:

    ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ       w, b: rows of W and B

which takes W Aᵀ (out, r) and the Gram matrix A Aᵀ (r, r). A row of zeros has no direction: ε in the place of its norm
keeps g finite, and the row can learn. Where W and s B A cancel, the sum is exact to 2⁻²³ (‖w‖ + ‖s b A‖)² only.

QDoRA is the same beside NF4: W is dense while its norms are taken. They are taken in every forward pass, as A and B may
have moved: that reads W once more. Merge what is to answer fast. Dropout acts on all that is rescaled, as in PEFT.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRAAdapter
from minilora.lora.variants.base import dense_weight

EPSILON = torch.finfo(torch.float32).eps  # in the place of a row's norm that is smaller


class DoRAAdapter(nn.Module):
    """A, B and m (out,) of one linear layer, fp32; made of a plain adapter, whose A and B it takes."""

    def __init__(self, plain: LoRAAdapter, base: nn.Module):
        super().__init__()
        self.scaling, self.r, self.lora_alpha, self.dropout = plain.scaling, plain.r, plain.lora_alpha, plain.dropout
        self.lora_A, self.lora_B = plain.lora_A, plain.lora_B
        meta = next(base.parameters()).is_meta  # shapes only, to plan with
        m = torch.empty(len(self.lora_B)) if meta else self.norms(base)
        self.lora_magnitude_vector = nn.Parameter(m)

    @torch.no_grad()
    def norms(self, base: nn.Module) -> Tensor:
        """‖W + s B A‖ of each row (out,), fp32, at least ε."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            W = dense_weight(base)  # (out, in)
            A, B = self.lora_A.to(W.device), self.scaling * self.lora_B.to(W.device)  # (r, in), (out, r)
            cross = (B * (W @ A.T)).sum(1)  # (out,) s b · (A w)
            gram = (B @ (A @ A.T) * B).sum(1)  # (out,) s² b (A Aᵀ) bᵀ
            squares = torch.linalg.vector_norm(W, dim=1).square() + 2 * cross + gram
        return squares.clamp(min=EPSILON**2).sqrt()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y + (g − 1) ∘ (W x) + g ∘ (s B A x), computed in x.dtype, g in fp32; x (…, in), y (…, out)."""
        g = self.lora_magnitude_vector / self.norms(base)  # (out,)
        dropped = self.dropout(x)
        Wx = y if dropped is x or not self.training else base(dropped)  # (…, out)
        if (bias := getattr(base, "bias", None)) is not None:
            Wx = Wx - bias.to(Wx.dtype)
        z = F.linear(dropped, self.lora_A.to(x.dtype))  # (…, r)
        turned = F.linear(self.scaling * z, self.lora_B.to(x.dtype))  # (…, out)
        return y + (g - 1).to(y.dtype) * Wx + g.to(y.dtype) * turned

    def delta_beside(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """What merging adds to W: g ∘ (W + s B A) − W (out, in)."""
        W, g = dense_weight(base).to(dtype), (self.lora_magnitude_vector.detach() / self.norms(base)).to(dtype)[:, None]
        return (g - 1) * W + g * LoRAAdapter.delta(cast(Any, self), dtype)

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """The live parameters under PEFT's names."""
        found = LoRAAdapter.tensors(cast(Any, self), base)
        return found | {"lora_magnitude_vector": self.lora_magnitude_vector}

    lora_bias = None
    _apply, extra_repr = cast(Any, LoRAAdapter._apply), LoRAAdapter.extra_repr


def begin(plain: LoRAAdapter, layer: nn.Module, *_: Any) -> DoRAAdapter:
    """A DoRA that changes nothing yet."""
    return DoRAAdapter(plain, unwrapped(layer))
