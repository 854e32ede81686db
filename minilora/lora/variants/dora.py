"""DoRA: the length of each row of W trains separately, and B A only turns the row.

    V  = W + s B A,   W' = m ∘ V / ‖V‖                    DoRA §4, eq. 5 (arXiv:2402.09353)
    h  = b + g ∘ (W x + s B A x),   g = m / ‖V‖
       = h₀ + (g − 1) ∘ (W x) + g ∘ (s B A x)             h₀ is the output of the frozen layer

‖·‖ is the norm of each row. At first m = ‖V‖, so that W' = W. In backward ‖V‖ counts as a constant
(§4.3). V is not computed. With rows w of W and b of B:

    ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ

which takes W Aᵀ (out, r) and the Gram matrix A Aᵀ (r, r). A row of zeros has no direction: ε in
place of its norm keeps g finite, so that the row can learn. Where W and s B A cancel, the sum is
exact to 2⁻²³ (‖w‖ + ‖s b A‖)² only.

QDoRA is the same with an NF4 base: W is dense while the norms are computed. Each forward pass
computes them, because A and B may have changed, and reads W once more for it. Merge an adapter that
has to answer fast. Dropout acts on everything that is rescaled, as in PEFT. The classes for
embeddings and convolutions are in dora_embedding_conv.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.base_layers.dense_weight import linear_weight
from minilora.lora.embedding_conv import Adapter
from minilora.lora.layer import AdapterBase

EPSILON = torch.finfo(torch.float32).eps  # smallest norm of a row


class DoRAAdapter(AdapterBase):
    """A, B and the row lengths m (out,) of one linear layer, in fp32.

    Args:
        plain: A plain adapter, whose A, B and hyperparameters are taken over.
        base: The frozen linear layer.
    """

    lora_bias = None

    def __init__(self, plain: Adapter, base: nn.Module):
        super().__init__()
        self.scaling = plain.scaling
        self.r = plain.r
        self.lora_alpha = plain.lora_alpha
        self.dropout = plain.dropout
        self.lora_A = plain.lora_A
        self.lora_B = plain.lora_B
        if next(base.parameters()).is_meta:  # shapes only, for a memory plan
            m = torch.empty(len(self.lora_B), dtype=torch.float32)  # (out,)
        else:
            m = self.norms(base)  # (out,)
        self.lora_magnitude_vector = nn.Parameter(m)

    def flat_weight(self, base: nn.Module) -> Tensor:
        """Return W as the matrix whose rows have the lengths m: (out, in), fp32.

        Args:
            base: The frozen layer.
        """
        return linear_weight(base)

    @torch.no_grad()
    def norms(self, base: nn.Module) -> Tensor:
        """Return ‖W + s B A‖ of each row (out,), fp32, at least ε.

        Args:
            base: The frozen layer.
        """
        with torch.autocast(self.lora_A.device.type, enabled=False):
            W = self.flat_weight(base)  # (out, in)
            A = self.lora_A.flatten(1).to(W.device)  # (r, in)
            B = self.scaling * self.lora_B.flatten(1).to(W.device)  # (out, r), contains s
            cross = (B * (W @ A.T)).sum(1)  # (out,) s b · (A w)
            gram = (B @ (A @ A.T) * B).sum(1)  # (out,) s² b (A Aᵀ) bᵀ
            squares = torch.linalg.vector_norm(W, dim=1).square() + 2 * cross + gram  # (out,)
        return squares.clamp(min=EPSILON**2).sqrt()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + (g − 1) ∘ (W x) + g ∘ (s B A x), computed in x.dtype, with g in fp32.

        Args:
            x: Input of the layer, (…, in); (N, in, …) of a convolution.
            y: Output of the frozen layer, (…, out); (N, out, …) of a convolution.
            base: The frozen layer.

        Returns:
            The corrected output, with the shape of y.
        """
        positions = [1] * (self.lora_A.dim() - 2)  # of a convolution, they follow the channels
        g = (self.lora_magnitude_vector / self.norms(base)).view(-1, *positions)  # (out, 1…)
        dropped = self.dropout(x)  # (…, in)
        if dropped is x or not self.training:
            Wx = y  # (…, out)
        else:
            Wx = base(dropped)  # (…, out)
        bias = getattr(base, "bias", None)
        if bias is not None:
            Wx = Wx - bias.to(Wx.dtype).view(-1, *positions)
        BAx = self.low_rank_output(dropped, base)  # (…, out), contains s
        return y + (g - 1).to(y.dtype) * Wx + g.to(y.dtype) * BAx

    def low_rank_output(self, x: Tensor, base: Any) -> Tensor:
        """Return s B A x, computed in x.dtype.

        Args:
            x: Input of the layer after dropout, (…, in).
            base: The frozen layer.

        Returns:
            The output of the low-rank part alone, (…, out).
        """
        z = F.linear(x, self.lora_A.to(x.dtype))  # (…, r)
        return F.linear(self.scaling * z, self.lora_B.to(x.dtype))  # (…, out)

    def delta_beside(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return g ∘ (W + s B A) − W, the matrix that merging adds to W.

        Args:
            base: The frozen layer.
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (out, in).
        """
        W = self.flat_weight(base).to(dtype)  # (out, in)
        g = (self.lora_magnitude_vector / self.norms(base)).to(dtype)[:, None]  # (out, 1)
        A = self.lora_A.flatten(1).to(dtype)  # (r, in)
        B = self.lora_B.flatten(1).to(dtype)  # (out, r)
        return (g - 1) * W + g * (self.scaling * B @ A)  # (out, in)

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """Return the parameters under the names that PEFT's files use.

        Args:
            base: The frozen layer, which is not read.

        Returns:
            The live parameters, or views of them.
        """
        return super().tensors(base) | {"lora_magnitude_vector": self.lora_magnitude_vector}
