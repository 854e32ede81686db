"""NF4Linear: the frozen linear layer of QLoRA, with a weight of 4 bits.

    y = x · dequantise(Wq)ᵀ + b

Its forward and backward pass are those of every quantised layer (quantized_linear.py): each
dequantises the weight again, so that no dense W is kept between them.

One multiplication takes this way: NF4Linear → custom op (minilora_kernels/nf4/functional.py) →
choice of the implementation for the device (backend.py) → kernel launch → kernel. For a few tokens
and without gradients, the operator `gemv_nf4` multiplies by the codes directly, without a dense W,
if the device has such a kernel.

Storage: uint8 parameters without gradient, described in minilora_kernels/nf4/weight.py. The codes
are packed two in a byte. The scales (absmax) are fp32 numbers or, with double quantisation, 8-bit
codes with a second level of fp32 scales and an offset. The fp32 numbers are stored as bytes,
because `.half()`, `.to(dtype)` and mixed-precision sharding cast every fp32 tensor, which would
destroy the scales without an error. The codes are padded to a multiple of 16 bytes, so that a
kernel can load 128 bits at once. In contrast to Linear4bit of bitsandbytes, neither eval() nor
forward repacks the weight, and the layer computes in the dtype of x.

A hash of the original weight is stored too (fingerprint.py). With it a 4-bit layer and its 16-bit
original are recognised as one base.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.quant.fingerprint import hash_rows
from minilora.quant.quantized_linear import QuantizedLinear
from minilora_kernels import (
    FEW,
    FEW_ON_A_GPU,
    NF4Weight,
    multiplier,
    prepare,
    quantize_nf4,
)
from minilora_kernels.ops.mode import plain_now

# The stored tensors, under the same names in NF4Weight and NF4Linear.
_STORED_TENSORS = ("packed", "absmax_bytes", "nested_bytes", "offset_bytes")
_PACKED_ALIGNMENT = 16  # bytes


class NF4Linear(QuantizedLinear):
    """A linear layer with a frozen 4-bit weight.

    `from_linear` creates it from an nn.Linear. Its state dict has the keys of bitsandbytes (weight,
    weight.absmax, …, bias). Loading is strict: another shape, block size or kind of scales, a wrong
    dtype or a missing key is an error.

    Args:
        weight: The 4-bit weight, (out, in).
        bias: The bias (out,), or None. It is trainable if it required a gradient before.
        source: The tensor that was quantised, if it is available. Only a hash of it is kept.

    Attributes:
        packed: uint8, two codes in each byte, padded to a multiple of 16 bytes.
        absmax_bytes: uint8, bytes of the fp32 scales; with double quantisation their 8-bit codes.
        nested_bytes: uint8, bytes of the second-level scales; None without double quantisation.
        offset_bytes: uint8, bytes of the fp32 mean of the scales; None without double quantisation.
        bias: The bias (out,), or None.
        in_features: Size of the input.
        out_features: Size of the output.
        blocksize: Number of values that share one scale.
        dtype: Dtype of the weight before it was quantised.
        source: Fingerprint at the time of the quantisation; None if the original is unknown.

    Raises:
        ValueError: The weight does not have two dimensions.
    """

    packed: nn.Parameter
    absmax_bytes: nn.Parameter
    nested_bytes: nn.Parameter | None
    offset_bytes: nn.Parameter | None
    source: str | None = None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None, source: Tensor | None = None):
        super().__init__(weight, bias)
        if source is not None and not source.is_meta:
            self.source = f"{self.fingerprint()},{hash_rows(source)}"

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True
    ) -> "NF4Linear":
        """Return a quantised copy of a linear layer, which is left unchanged.

        Args:
            linear: The dense layer.
            blocksize: Number of values that share one scale.
            double_quant: Store the scales in 8 bits instead of 32.

        Raises:
            ValueError: The weight contains NaN or infinity, or the block size is not supported.
        """
        W = linear.weight.detach()  # (out, in)
        layer = cls(quantize_nf4(W, blocksize, double_quant), linear.bias, W)
        layer.training = linear.training
        return layer

    def _store(self, weight: NF4Weight) -> None:
        """Register the tensors of a weight as parameters, with the codes padded."""
        self.blocksize = weight.blocksize
        for name in _STORED_TENSORS:
            data = getattr(weight, name)
            if name == "packed" and len(data) % _PACKED_ALIGNMENT:
                data = F.pad(data, (0, -len(data) % _PACKED_ALIGNMENT))
            parameter = None
            if data is not None:
                parameter = nn.Parameter(data, requires_grad=False)
            self.register_parameter(name, parameter)
        prepare(weight.device)

    @property
    def weight(self) -> NF4Weight:
        """The 4-bit weight (out, in), a view of the stored bytes; not a Tensor."""
        bytes_without_padding = (self.in_features * self.out_features + 1) // 2
        return NF4Weight(
            self.packed[:bytes_without_padding],
            self.absmax_bytes,
            torch.Size((self.out_features, self.in_features)),
            self.dtype,
            self.blocksize,
            self.nested_bytes,
            self.offset_bytes,
        )

    def fingerprint(self) -> str:
        """Return hashes of the codes and, if it is known, of the original weight.

        The scales are not hashed: double quantisation on or off is the same base. The original is
        unknown after other codes were loaded.
        """
        packed = self.weight.packed
        row_bytes = max(1, self.in_features // 2)  # approximate if in_features is odd
        rows = len(packed) // row_bytes
        codes = packed[: rows * row_bytes].view(-1, row_bytes)  # (rows, row_bytes)
        hashes = hash_rows(codes, f"nf4/{self.blocksize}")
        if self.source is not None and self.source.startswith(hashes):
            return self.source
        return hashes

    def storage(self) -> dict[str, Any]:
        """Return the storage of the weight, as storage.py describes it."""
        double_quant = self.nested_bytes is not None
        return {"quantize": "nf4", "blocksize": self.blocksize, "double_quant": double_quant}

    def _settings(self, weight: NF4Weight) -> dict[str, Any]:
        """Return what a loaded weight must have in common with this layer's."""
        return {
            "shape": weight.shape,
            "blocksize": weight.blocksize,
            "double_quant": weight.double_quant,
        }

    def _multiply_few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x Wᵀ + b for a few rows of x by the codes; None for more rows."""
        few = FEW if x.device.type == "cpu" else FEW_ON_A_GPU
        if plain_now() or not 0 < x.shape[:-1].numel() <= few:
            return None
        return torch.ops.minilora.gemv_nf4(x, *self.weight.parts(), bias)  # (…, out)

    def _multiplier(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """Return the product with a few tokens, or None where no compiled code fits."""
        return multiplier(self.weight)

    def _apply(self, fn, recurse=True):
        """Prepare the kernels of the new device after a move."""
        super()._apply(fn, recurse)
        prepare(self.packed.device)
        return self

    def extra_repr(self) -> str:
        """Return sizes, bias and format for `repr(module)`."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, nf4/{self.blocksize}"
        if self.nested_bytes is not None:
            text += ", double_quant"
        return text
