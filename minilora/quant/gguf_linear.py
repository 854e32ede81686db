"""GGUFLinear: a frozen linear layer in the bytes of a GGUF file.

    y = x · dequantise(blocks)ᵀ + b

A model that was loaded from a GGUF file with quantize="keep" consists of these layers. The weight
that an adapter is trained on is then the one that llama.cpp serves: nothing is rounded a second
time. Forward and backward are those of every quantised layer (quantized_linear.py).
minilora_kernels/gguf describes the blocks of each type.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.quant.fingerprint import chosen_rows, hash_rows
from minilora.quant.quantized_linear import QuantizedLinear
from minilora_kernels import FEW
from minilora_kernels.gguf import GGUFWeight
from minilora_kernels.gguf.functional import multiplier
from minilora_kernels.ops.mode import plain_now


class GGUFLinear(QuantizedLinear):
    """A linear layer whose frozen weight has a quantised type of GGUF.

    Its state dict has the keys weight (the bytes), weight.gguf (type, shape, dtype, order of the
    rows) and bias. Loading is strict.

    Args:
        weight: The weight, (out, in).
        bias: The bias (out,), or None. It is trainable if it required a gradient before.

    Attributes:
        blocks: uint8 (out, bytes of a row), as in the file.
        bias: The bias (out,), or None.
        in_features: Size of the input.
        out_features: Size of the output.
        dtype: Dtype of the dense weight.
        type_name: Name of the type, such as "Q4_K".
        heads: Number of heads whose rows llama.cpp permuted; 0 for rows in the model's order.
    """

    blocks: nn.Parameter
    type_name: str
    heads: int

    def _store(self, weight: GGUFWeight) -> None:
        """Register the bytes as a parameter; bytes that are one already become shared."""
        self.type_name = weight.type_name
        self.heads = weight.heads
        blocks = weight.blocks
        if not isinstance(blocks, nn.Parameter):
            blocks = nn.Parameter(blocks, requires_grad=False)
        self.blocks = blocks

    @property
    def weight(self) -> GGUFWeight:
        """The weight (out, in), a view of the stored bytes; not a Tensor.

        Assigning another weight shares its bytes, as an output layer does with the embedding.
        """
        shape = torch.Size((self.out_features, self.in_features))
        return GGUFWeight(self.blocks, shape, self.dtype, self.type_name, self.heads)

    @weight.setter
    def weight(self, weight: GGUFWeight) -> None:
        """Share the bytes of a weight.

        Args:
            weight: The weight, (out, in).
        """
        self._store(weight)

    @property
    def bits(self) -> float:
        """Stored bits a value, the scales included."""
        return self.weight.bits

    def fingerprint(self) -> str:
        """Return hashes of the bytes and of the dense rows.

        With the dense rows, the layer and its dequantised copies in any dtype are one base.
        """
        weight = self.weight
        hashes = hash_rows(self.blocks, self.type_name.lower())
        if self.blocks.is_meta:
            return hashes
        rows = weight.rows(chosen_rows(self.blocks))  # (count, in)
        return f"{hashes},{hash_rows(rows)}"

    def storage(self) -> dict[str, Any]:
        """Return the storage of the weight, as storage.py describes it."""
        return {"quantize": "keep"}

    def _multiply_few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x Wᵀ + b for a few rows of x on a CPU by the codes; None for others."""
        if plain_now() or not x.is_cpu or not 0 < x.shape[:-1].numel() <= FEW:
            return None
        return torch.ops.minilora.gemv_gguf(x, *self.weight.parts(), bias)  # (…, out)

    def _multiplier(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """Return the product with a few tokens, or None where no compiled code fits."""
        return multiplier(self.weight, dtype)

    def _load(self, weight: GGUFWeight, bias: Tensor | None, assign: bool) -> None:
        """Take over a checked weight and bias; without `assign`, shared bytes stay shared."""
        if assign or self.blocks.is_meta:
            super()._load(weight, bias, assign)
            return
        self.blocks.data.copy_(weight.blocks)
        super()._load(self.weight, bias, assign=True)

    def _settings(self, weight: GGUFWeight) -> dict[str, Any]:
        """Return what a loaded weight must have in common with this layer's."""
        return {"shape": weight.shape, "type": weight.type_name, "heads": weight.heads}

    def extra_repr(self) -> str:
        """Return sizes, bias and type for `repr(module)`."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}, {self.type_name}"
