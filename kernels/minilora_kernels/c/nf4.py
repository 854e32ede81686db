r"""nf4.c, where a C compiler is: torch_cpu.py's dequantisation in one pass over memory, and products without a dense W.

Dequantisation has the same bits. A block has one scale and 16 levels, so 16 products are all it takes; the rest is
copying by code:

    value[c] = round(level[c] * absmax)      c = 0 … 15, once a block
    out[i]   = value[code[i]]                with AVX-512 32 at a time: the table is a register, the codes permute it

`multiply` looks the levels up in the same way, in fp32, and multiplies them by x at once: 0.516 bytes a weight are read
and nothing is written, so that it wins as long as x has few rows. It differs from dequantise-then-multiply in one
rounding less: W is not rounded to x's dtype, sums are in fp32 either way.

The compiler starts with the first weight. Until it is done the torch path dequantises, for the bits are the same; a
product waits for it, lest a run's numbers hang on its speed.
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

LIBRARY = Library(Path(__file__).with_name("nf4.c"))
DTYPES = (torch.float32, torch.bfloat16)


class _Scales(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("absmax", "map", "nested", "offset", "level", "codes")]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("scales", _Scales),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "shift")),
    ]


def ready() -> bool:
    """Whether there is compiled code, once the compiler has done its work."""
    return LIBRARY.loaded(wait=True) is not None


def dequantize(
    packed: Tensor, scales: Tensor, nested: Tensor | None, offset: Tensor | None, blocksize: int, out: Tensor
) -> bool:
    """The parts of a weight, contiguous, written to `out`, contiguous too. False, with nothing done, where there is no
    compiled code (yet), for another dtype than fp32 and bf16, and if the last block is not whole."""
    library = LIBRARY.loaded()
    if library is None or out.dtype not in DTYPES or out.numel() % blocksize:
        return False
    call(library, packed, scales, nested, offset, blocksize, out)
    return True


def call(
    library: ctypes.CDLL, packed: Tensor, scales: Tensor, nested: Tensor | None, offset: Tensor | None, blocksize: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Run `library`."""
    pointers = _pointers(scales, nested, offset)
    sizes = ctypes.c_int64(out.numel() // blocksize), ctypes.c_int64(blocksize // 2)
    function = getattr(library, f"dequantize_{str(out.dtype).removeprefix('torch.')}")
    function(ctypes.c_void_p(packed.data_ptr()), ctypes.byref(pointers), *sizes, ctypes.c_void_p(out.data_ptr()))


def multiplier(
    packed: Tensor, scales: Tensor, nested: Tensor | None, offset: Tensor | None, shape: Sequence[int], blocksize: int
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The parts of a weight (out, in), contiguous -> a function: x (…, in), bias (out,) of its dtype or None, both
    contiguous fp32 or bf16 -> W x + bias (…, out). None where there is no compiled code, and unless a row is
    whole blocks. The function holds the parts, and where they lie: it is good until they are moved."""
    library, (rows, inner) = LIBRARY.loaded(wait=True), shape
    if library is None or not rows or not inner or inner % blocksize:
        return None
    matrix = _Matrix(packed.data_ptr(), _pointers(scales, nested, offset), rows, inner, blocksize.bit_length() - 1)
    address, run = ctypes.addressof(matrix), library.multiply
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    run.argtypes = [pointer, pointer, integer, pointer, pointer, integer]

    def multiply(x: Tensor, bias: Tensor | None, _alive: Any = (matrix, packed, scales, nested, offset)) -> Tensor:
        y = x.new_empty((*x.shape[:-1], rows))
        given = None if bias is None else bias.data_ptr()
        if not run(address, x.data_ptr(), x.numel() // inner, given, y.data_ptr(), x.dtype == torch.bfloat16):
            raise MemoryError(f"NF4 product: no memory for {x.numel()} values, x in the order of the codes; free some")
        return y

    return multiply


def _pointers(scales: Tensor, nested: Tensor | None, offset: Tensor | None) -> _Scales:
    absmax, codes = (scales, None) if nested is None else (None, scales)
    map, level = _tables()
    tensors = absmax, map, nested, offset, level, codes
    return _Scales(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


@cache
def _tables() -> tuple[Tensor, Tensor]:
    return dynamic_map(), nf4_codebook()
