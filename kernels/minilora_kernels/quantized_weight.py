"""The common part of quantised weights: NF4Weight, and GGUFWeight for the types of GGUF files.

A quantised weight is a dense tensor of logical `shape` and `dtype` that is stored in fewer bits.
Its parts are the arguments of its custom operators:

    parts = (stored tensors, shape, further numbers)        of one order for each kind of weight

    torch.ops.minilora.dequantize_<kind>(*parts, dtype)               a new dense tensor
    torch.ops.minilora.dequantize_<kind>_backward(*parts, dtype)      the same, for backward
    torch.ops.minilora.dequantize_<kind>_out(*parts without shape, out)

The weight is not a tensor. A function of PyTorch that gets it in place of one computes with the
dense weight, because some modules multiply by the weight of a layer instead of calling the layer.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

TENSORS = {"nf4": 4, "gguf": 1}  # stored tensors at the beginning of the parts, None included


class QuantizedWeight:
    """The base class of quantised weights.

    Attributes:
        kind: A key of TENSORS.
        shape: Shape of the dense tensor.
        dtype: Dtype of the dense tensor.
    """

    kind: ClassVar[str]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        raise NotImplementedError

    def parts(self) -> tuple[Any, ...]:
        """Return the arguments of the dequantise ops before the dtype."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight.

        Args:
            dtype: Dtype of the result; None is the logical dtype of the weight.
        """
        return dequantize_parts(self.kind, self.parts(), dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Any:
        """Use the dense weight where a function of PyTorch gets this weight in place of a tensor.

        Some modules do not call a layer but multiply by its weight, such as dt_proj of Mamba. The
        weight takes the dtype of the first floating-point tensor next to it.
        """
        values = [*args, *(kwargs or {}).values()]
        dtypes = [x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()]
        dtype = dtypes[0] if dtypes else None

        def dense(value: Any) -> Any:
            return value.dequantize(dtype) if isinstance(value, QuantizedWeight) else value

        named = {name: dense(value) for name, value in (kwargs or {}).items()}
        return function(*[dense(value) for value in args], **named)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return the product of the dense weight and a tensor."""
        return torch.matmul(self, other)  # pyright: ignore[reportArgumentType] by __torch_function__


def dequantize_parts(kind: str, parts: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Return the dense tensor of a quantised weight.

    Args:
        kind: Kind of the weight, a key of TENSORS.
        parts: Its parts.
        dtype: Dtype of the result.
    """
    return getattr(torch.ops.minilora, f"dequantize_{kind}")(*parts, dtype)


def dequantize_parts_for_backward(kind: str, parts: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Return the same by an operator of another name, which torch.compile does not merge with it.

    Args:
        kind: Kind of the weight, a key of TENSORS.
        parts: Its parts.
        dtype: Dtype of the result.
    """
    return getattr(torch.ops.minilora, f"dequantize_{kind}_backward")(*parts, dtype)


def dequantize_parts_into(kind: str, parts: tuple[Any, ...], out: Tensor) -> None:
    """Write the dense tensor of a quantised weight to a contiguous tensor.

    Args:
        kind: Kind of the weight, a key of TENSORS.
        parts: Its parts.
        out: Tensor that receives the result, in its dtype.
    """
    count = TENSORS[kind]
    tensors = parts[:count]
    numbers = parts[count + 1 :]  # without the shape
    getattr(torch.ops.minilora, f"dequantize_{kind}_out")(*tensors, *numbers, out)
