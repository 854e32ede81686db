"""y = W x straight from the packed bytes: one token through a 4-bit layer, without ever making the dense W.

    y[o] = sum over k of level[code[o, k]] * absmax[o, k] * x[k]  + bias[o]        in fp32, rounded once

Decoding one token reads every weight once for one multiplication, so it is bound by memory, and 0.516 bytes a weight
instead of 2 are up to 3.9 times the speed. Dequantising first would write and read the 2 bytes on top. What then counts
is how few instructions a weight takes: shift, mask, look up, multiply-add.

    textbook    a row a program, bytes as in nf4_dequantize.py's textbook
    fast        *chunks* of 32 weights = 4 words = one 128-bit load. They lie in one block, so that a chunk has one
                scale, applied once to its sum. All threads lie along the row: x arrives in the layout in which it is
                used, and two rows share each value.
    small       the same kernel with other constants, for rows too short to fill 64 lanes (SmolLM2's 576)

Differs from dequantise-then-multiply in one rounding less: W stays fp32 here instead of being rounded to x's dtype.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton.launch import rounded, run
from minilora_kernels.triton.nf4_dequantize import absmax_of, lookup, tables

CHUNK = 32  # weights: the smallest block size, and one 128-bit load
SMALL = 1024  # inner size up to which a row is short

# ---- textbook


@triton.jit
def _gemv_textbook(
    x_ptr,  # bf16, fp16 or fp32 (k,)
    packed_ptr,  # uint8 (rows k / 2,)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    bias_ptr,  # any of x's dtypes (rows,), not read unless BIAS
    y_ptr,  # any of x's dtypes (rows,)
    k,  # inner size
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # whether scales are codes
    BIAS: tl.constexpr,  # whether there is a bias
    BYTES: tl.constexpr,  # bytes of a step
):
    # who am I: one row
    row = tl.program_id(0)
    first = row.to(tl.int64) * (k // 2)
    total = tl.zeros([BYTES], tl.float32)
    for start in range(0, k // 2, BYTES):
        # load
        byte = start + tl.arange(0, BYTES)
        inside = byte < k // 2
        pair = tl.load(packed_ptr + first + byte, mask=inside, other=0).to(tl.int32)
        even = tl.load(x_ptr + byte * 2, mask=inside, other=0).to(tl.float32)
        odd = tl.load(x_ptr + byte * 2 + 1, mask=inside, other=0).to(tl.float32)
        block = (first + byte) * 2 // BLOCKSIZE
        absmax = absmax_of(block, inside, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)
        # compute: absmax * (level * x + level * x)
        high = tl.load(levels_ptr + (pair >> 4))
        low = tl.load(levels_ptr + (pair & 15))
        total += absmax * (high * even + low * odd)
    # store
    y = tl.sum(total, axis=0)
    if BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty))


# ---- fast


@triton.jit
def _quarters(values):
    """(rows, chunks, 4, 8) -> four of (rows, chunks, 8)."""
    pairs = tl.reshape(values, [values.shape[0], values.shape[1], 2, 2, 8])
    even, odd = tl.split(tl.permute(pairs, [0, 1, 4, 2, 3]))  # words 0 2, words 1 3
    value0, value2 = tl.split(even)
    value1, value3 = tl.split(odd)
    return value0, value1, value2, value3


@triton.jit
def _gemv_fast(
    x_ptr,  # bf16, fp16 or fp32 (32 n_chunks,)
    words_ptr,  # int32 (rows 4 n_chunks,)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    bias_ptr,  # any of x's dtypes (rows,), not read unless BIAS
    y_ptr,  # any of x's dtypes (rows,)
    n_rows,  # output size
    n_chunks,  # inner size / 32
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # whether scales are codes
    BIAS: tl.constexpr,  # whether there is a bias
    SHARED: tl.constexpr,  # whether the rows of a thread share x; else each row loads its own
    ROWS: tl.constexpr,  # rows a program
    CHUNKS: tl.constexpr,  # chunks of a row in a step
):
    # who am I: ROWS rows; past the last row I repeat it and store nothing
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    nibble = tl.arange(0, 8)
    shift = (nibble * 4) ^ 4  # see nf4_dequantize.py
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    first = tl.minimum(row, n_rows - 1)[:, None] * n_chunks  # in chunks: 32 bits reach to 2^36 weights
    total = tl.zeros([ROWS, CHUNKS], tl.float32)
    for start in range(0, n_chunks, CHUNKS):
        # load
        chunk = start + tl.arange(0, CHUNKS)[None, :]
        inside = chunk < n_chunks
        at = (first + chunk).to(tl.int64)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        words = tl.load(words_ptr + at, mask=inside[:, :, None], other=0)  # (ROWS, CHUNKS, 4)
        block = (first + chunk).to(tl.uint32) // (BLOCKSIZE // 32)
        absmax = absmax_of(block, inside, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)

        # compute: one gather for all codes, then a multiply-add for each weight
        codes = (words[:, :, :, None] >> shift[None, None, None, :]) & 15
        values = _quarters(lookup(levels_ptr, levels, codes))  # 4 of (ROWS, CHUNKS, 8)
        products = tl.zeros([ROWS, CHUNKS, 8], tl.float32)
        for word in tl.static_range(4):
            x_at = chunk[:, :, None] * 32 + word * 8 + nibble[None, None, :]  # (1, CHUNKS, 8)
            x_inside = inside[:, :, None]
            if not SHARED:
                x_at = tl.broadcast_to(x_at, [ROWS, CHUNKS, 8])
                x_inside = tl.broadcast_to(x_inside, [ROWS, CHUNKS, 8])
            x = tl.load(x_ptr + x_at, mask=x_inside, other=0).to(tl.float32)
            products = tl.fma(values[word], tl.broadcast_to(x, [ROWS, CHUNKS, 8]), products)
        total = tl.fma(tl.sum(products, axis=2), absmax, total)
    # store
    y = tl.sum(total, axis=1)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < n_rows, other=0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < n_rows)


# ---- launchers


def fits(shape: Sequence[int]) -> bool:
    """Whether the fast kernel takes a weight (out, in): whole chunks in a row, and few enough to number in 32 bits."""
    return shape[1] % CHUNK == 0 and 0 < shape[0] * shape[1] // CHUNK < 2**31


def gemv(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x (in,) -> W x (out,), in x's dtype. `fits` must hold, and what functional.py checks."""
    rows, k = shape
    name = "gemv_nf4_small" if k <= SMALL else "gemv_nf4"
    y = x.new_empty(rows)
    words = packed[: rows * k // 2].view(torch.int32)
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None, "BIAS": bias is not None}
    with rounded(y) as target:
        arguments = (x, words, scales, nested_absmax, offset, *tables(x.device), bias, target, rows, k // CHUNK)
        run(name, _gemv_fast, lambda ROWS, CHUNKS: -(-rows // ROWS), *arguments, **options, SHARED=k > SMALL)
    return y


def gemv_textbook(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The same by the textbook kernel; `in` must be even."""
    y = x.new_empty(shape[0])
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None, "BIAS": bias is not None}
    with rounded(y) as target:
        arguments = (x, packed, scales, nested_absmax, offset, *tables(x.device), bias, target, shape[1])
        run("gemv_nf4_textbook", _gemv_textbook, shape[0], *arguments, **options)
    return y
