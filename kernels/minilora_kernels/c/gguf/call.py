"""Calls of the compiled code for the quantised types of GGUF.

Dequantisation has the bits of the reference. A product with a few tokens decodes one block at a
time and multiplies it at once; in contrast to dequantise-then-multiply, W is not rounded to the
dtype of x. The sums are in fp32 in both.

The compiler starts with the first weight. Until it is done, torch dequantises, with the same bits.
A product waits for it, so that the numbers of a run do not depend on the compiler's speed.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora_kernels.c.compiler import Library

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / "dequantize.c", _FOLDER / "multiply.c"]
_HEADERS = [_FOLDER / "blocks.h", _FOLDER.parent / "numbers.h"]
_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
LIBRARIES = {
    torch.float32: Library("gguf", _SOURCES, _HEADERS, _FLAGS),
    torch.bfloat16: Library("gguf", _SOURCES, _HEADERS, [*_FLAGS, "-DBF16"]),
}
# the numbers of the types in blocks.h
_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


class _Matrix(ctypes.Structure):
    """The struct `matrix` of blocks.h."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("heads", ctypes.c_int64),
    ]


def ready(dtype: torch.dtype) -> bool:
    """Wait for the compiler, and return True if there is compiled code for a dtype.

    Args:
        dtype: Dtype of the dense values.
    """
    return dtype in LIBRARIES and LIBRARIES[dtype].loaded(wait=True) is not None


def dequantize(blocks: Tensor, type_name: str, heads: int, out: Tensor) -> bool:
    """Write a matrix to `out`; both tensors are contiguous and on the CPU.

    Args:
        blocks: Bytes, uint8 of shape (out, bytes of a row).
        type_name: Name of the type.
        heads: Number of heads of permuted rows, or 0.
        out: Tensor of shape (out, in) that receives the result.

    Returns:
        False, with nothing written, if the compiler is not done or does not exist, or if `out` is
        not fp32 or bf16.
    """
    if out.dtype not in LIBRARIES:
        return False
    library = LIBRARIES[out.dtype].loaded()
    if library is None:
        return False
    matrix = _matrix(blocks, out.shape, type_name, heads)
    library.dequantize(ctypes.byref(matrix), ctypes.c_void_p(out.data_ptr()))
    return True


def multiplier(
    blocks: Tensor, shape: Sequence[int], type_name: str, heads: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Return a function that multiplies a few rows by a matrix.

    Args:
        blocks: Bytes, contiguous uint8 of shape (out, bytes of a row), on the CPU.
        shape: Shape (out, in) of the dense matrix.
        type_name: Name of the type.
        heads: Number of heads of permuted rows, or 0.
        dtype: Dtype of x, bias and the result.

    Returns:
        A function from contiguous x (…, in), at most 8 rows, and bias (out,) or None to
        W x + bias (…, out). It holds the address of the bytes: it is valid until they move. None if
        there is no compiled code for the dtype.
    """
    if dtype not in LIBRARIES:
        return None
    library = LIBRARIES[dtype].loaded(wait=True)
    if library is None:
        return None
    matrix = _matrix(blocks, shape, type_name, heads)
    address = ctypes.addressof(matrix)
    function = library.multiply
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    rows, inner = shape
    used_memory = (matrix, blocks)

    def multiply(x: Tensor, bias: Tensor | None, _alive: Any = used_memory) -> Tensor:
        x_32 = x.float()  # (…, in)
        y = x.new_empty((*x.shape[:-1], rows))  # (…, out)
        bias_address = None if bias is None else bias.data_ptr()
        tokens = x.numel() // inner
        function(address, x_32.data_ptr(), tokens, bias_address, y.data_ptr())
        return y

    return multiply


def _matrix(blocks: Tensor, shape: Sequence[int], type_name: str, heads: int) -> _Matrix:
    """Return the C struct of a matrix."""
    rows, inner = shape
    number = _TYPES.index(type_name)
    return _Matrix(blocks.data_ptr(), number, rows, inner, blocks.shape[1], heads)
