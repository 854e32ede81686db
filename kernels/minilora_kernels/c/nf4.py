r"""Calls of the compiled NF4 code: dequantisation in one pass, and products without a dense W.

Dequantisation (nf4_dequantize.c) has the bits of the reference. A block has one scale and 16
levels, so that 16 products are enough, and the rest is copying by code:

    value[c] = round(level[c] * absmax)      c = 0 … 15, once a block
    out[i]   = value[code[i]]                with AVX-512, 32 at a time by a permuted register

The product (nf4_gemv.c) looks up the levels in the same way, in fp32, and multiplies them by x at
once. It reads 0.516 bytes a weight and writes none, so that it is faster as long as x has few rows.
The result differs from dequantise-then-multiply by one rounding less: W is not rounded to the dtype
of x. The sums are in fp32 in both.

The compiler starts with the first weight. Until it is done, torch dequantises, with the same bits.
A product waits for it, so that the numbers of a run do not depend on the compiler's speed.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora_kernels.c.compiler import Library
from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook

_FOLDER = Path(__file__).parent
LIBRARY = Library(
    "nf4",
    [_FOLDER / "nf4_dequantize.c", _FOLDER / "nf4_gemv.c"],
    headers=[_FOLDER / "nf4.h"],
)
DTYPES = (torch.float32, torch.bfloat16)


class _Scales(ctypes.Structure):
    """The struct `scales` of nf4.h."""

    _fields_ = [
        ("absmax", ctypes.c_void_p),
        ("map", ctypes.c_void_p),
        ("nested", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("level", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
    ]


class _Matrix(ctypes.Structure):
    """The struct `matrix` of nf4_gemv.c."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("scales", _Scales),
        ("rows", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("shift", ctypes.c_int64),
    ]


def ready() -> bool:
    """Wait for the compiler, and return True if there is compiled code."""
    return LIBRARY.loaded(wait=True) is not None


def dequantize(
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> bool:
    """Write a weight to `out`; all tensors are contiguous.

    Args:
        packed: Packed codes, uint8 of shape (ceil(n / 2),).
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        blocksize: Number of values that share one scale.
        out: Tensor of n values that receives the result.

    Returns:
        False, with nothing written, if the compiler is not done or does not exist, if `out` is not
        fp32 or bf16, and if the last block is short.
    """
    library = LIBRARY.loaded()
    if library is None or out.dtype not in DTYPES or out.numel() % blocksize != 0:
        return False
    call(library, packed, scales, nested, offset, blocksize, out)
    return True


def call(
    library: ctypes.CDLL,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """Write a weight to `out` by a given library.

    Args:
        library: Compiled nf4_dequantize.c.
        packed: Packed codes, uint8 of shape (n / 2,).
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        blocksize: Number of values that share one scale.
        out: Tensor of n values in fp32 or bf16 that receives the result; n is a multiple of
            `blocksize`.
    """
    dtype_name = str(out.dtype).removeprefix("torch.")
    function = getattr(library, f"dequantize_{dtype_name}")
    pointers = _pointers(scales, nested, offset)
    function(
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.byref(pointers),
        ctypes.c_int64(out.numel() // blocksize),
        ctypes.c_int64(blocksize // 2),
        ctypes.c_void_p(out.data_ptr()),
    )


def multiplier(
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Return a function that multiplies rows by a weight; all tensors are contiguous.

    Args:
        packed: Packed codes, uint8 of shape (out * in / 2,).
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        shape: Shape (out, in) of the weight.
        blocksize: Number of weights that share one scale.

    Returns:
        A function from x (…, in), fp32 or bf16, and bias (out,) of the same dtype or None to
        W x + bias (…, out). It holds the addresses of the tensors: it is valid until they move.
        None if no compiled code exists, or if a row does not consist of full blocks.
    """
    library = LIBRARY.loaded(wait=True)
    rows, inner = shape
    if library is None or rows == 0 or inner == 0 or inner % blocksize != 0:
        return None
    pointers = _pointers(scales, nested, offset)
    shift = blocksize.bit_length() - 1  # a block has 2^shift weights
    matrix = _Matrix(packed.data_ptr(), pointers, rows, inner, shift)
    address = ctypes.addressof(matrix)
    c_multiply = library.multiply
    c_multiply.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
    ]
    used_memory = (matrix, packed, scales, nested, offset)

    def multiply(x: Tensor, bias: Tensor | None, _alive: Any = used_memory) -> Tensor:
        y = x.new_empty((*x.shape[:-1], rows))  # (…, out)
        count = x.numel() // inner
        bias_address = None
        if bias is not None:
            bias_address = bias.data_ptr()
        is_bf16 = x.dtype == torch.bfloat16
        done = c_multiply(address, x.data_ptr(), count, bias_address, y.data_ptr(), is_bf16)
        if not done:
            raise MemoryError(
                f"NF4 product: the copy of the {x.numel()} values of x does not fit in memory; free "
                "some memory"
            )
        return y

    return multiply


def _pointers(scales: Tensor, nested: Tensor | None, offset: Tensor | None) -> _Scales:
    """Return the C struct with the addresses of the scales and of the tables."""
    map, level = _tables()
    pointers = _Scales(map=map.data_ptr(), level=level.data_ptr())
    if nested is None or offset is None:
        pointers.absmax = scales.data_ptr()
    else:
        pointers.codes = scales.data_ptr()
        pointers.nested = nested.data_ptr()
        pointers.offset = offset.data_ptr()
    return pointers


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """Return the dynamic map and the levels, which must stay in memory while C uses them."""
    return dynamic_map(), nf4_codebook()
