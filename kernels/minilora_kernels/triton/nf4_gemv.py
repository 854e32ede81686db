# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernels for y = W x from the packed codes: one token through a 4-bit layer without a dense W.

    y[o] = sum over k of level[code[o, k]] * absmax[o, k] * x[k]  + bias[o]     fp32, rounded once

To decode one token, every weight is read once for one multiplication, so that the kernel is bound
by memory: reading 0.516 bytes a weight instead of 2 is up to 3.9 times as fast. Dequantising first
would write and read these 2 bytes in addition. The number of instructions a weight counts next:
shift, mask, look-up, multiply-add.

    textbook    One program has one row and reads bytes as the textbook kernel of nf4_dequantize.py.
    fast        All threads of a program are along the row. A warp reads 32 neighbouring words, and
                the 32 x 8 values of x that belong to them, so that every request is of full lines;
                two rows share each value of x. A step of a warp is 4 times 32 words. The lanes also
                compute the scales of these 32 *chunks* (4 words = 32 weights, which are always in
                one block), one each, and exchange them.
    small       For rows too short to fill 64 lanes (576 in SmolLM2). A thread reads a chunk, one
                128-bit load, and the values of x that it needs.

The values of x for the chunks of a warp are 64 bytes apart: if each lane loaded those of its own
chunk, a request would touch 16 lines and use an eighth of each. For a short row this is no loss,
because its lanes are in many rows and read the same x.

The result differs from dequantise-then-multiply by one rounding less: here W stays in fp32 instead
of being rounded to the dtype of x.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton.launch import cdiv, rounded, run
from minilora_kernels.triton.nf4_dequantize import GATHERS, absmax_of, lookup, tables

CHUNK = 32  # weights: the smallest block size, and one 128-bit load
SMALL = 1024  # inner size up to which a row is short

# ---- textbook


@triton.jit
def _gemv_textbook(
    x_ptr,  # bf16, fp16 or fp32 (inner,)
    packed_ptr,  # uint8 (n_rows inner / 2,)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    bias_ptr,  # any of x's dtypes (n_rows,), not read unless BIAS
    y_ptr,  # any of x's dtypes (n_rows,)
    inner,  # inner size, even
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # True if the scales are codes
    BIAS: tl.constexpr,  # True if there is a bias
    BYTES: tl.constexpr,  # bytes of a step
):
    """Multiply one row of W by x."""
    row_idx = tl.program_id(0)
    first_byte = row_idx.to(tl.int64) * (inner // 2)
    total = tl.zeros([BYTES], tl.float32)
    for start in range(0, inner // 2, BYTES):
        # load
        byte_offsets = start + tl.arange(0, BYTES)
        mask = byte_offsets < inner // 2
        pair = tl.load(packed_ptr + first_byte + byte_offsets, mask=mask, other=0).to(tl.int32)
        x_even = tl.load(x_ptr + byte_offsets * 2, mask=mask, other=0).to(tl.float32)
        x_odd = tl.load(x_ptr + byte_offsets * 2 + 1, mask=mask, other=0).to(tl.float32)
        block_idx = (first_byte + byte_offsets) * 2 // BLOCKSIZE
        absmax = absmax_of(block_idx, mask, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)
        # compute: absmax * (level * x + level * x)
        high = tl.load(levels_ptr + (pair >> 4))
        low = tl.load(levels_ptr + (pair & 15))
        total += absmax * (high * x_even + low * x_odd)
    # store
    y = tl.sum(total, axis=0)
    if BIAS:
        y += tl.load(bias_ptr + row_idx).to(tl.float32)
    tl.store(y_ptr + row_idx, y.to(y_ptr.dtype.element_ty))


# ---- fast


@triton.jit
def _eight(values):
    """Split the last axis, of size 8, into eight tensors."""
    bits = tl.reshape(values, values.shape[:-1] + [2, 2, 2])  # bits 2, 1, 0 of the position
    even, odd = tl.split(bits)  # tl.split takes the last axis apart
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    value0, value4 = tl.split(even0)
    value2, value6 = tl.split(even1)
    value1, value5 = tl.split(odd0)
    value3, value7 = tl.split(odd1)
    return value0, value1, value2, value3, value4, value5, value6, value7


@triton.jit
def _add_step(
    total,  # fp32 (ROWS, 4, WARPS, 32)
    left,  # chunks of the row from this step on, not read unless MASKED
    chunk_idx,  # (ROWS, WARPS, 32): number of each lane's chunk
    word_ptrs,  # (ROWS, 1, WARPS, 32): the first of each lane's four words
    x_ptrs,  # (1, WARPS, 32, 8): the values for that word
    scales_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    map_ptr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    MASKED: tl.constexpr,  # True if the row may end in this step
):
    """Return `total` with the products of one step added. Word q of lane l is word 32 q + l."""
    ROWS: tl.constexpr = total.shape[0]
    WARPS: tl.constexpr = total.shape[2]
    quarter = tl.arange(0, 4)[:, None, None]
    warp = tl.arange(0, WARPS)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    shift = (tl.arange(0, 8) * 4) ^ 4  # see nf4_dequantize.py
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    # load
    block_idx = chunk_idx.to(tl.uint32) // (BLOCKSIZE // 32)
    word_ptrs += quarter[None, :, :, :] * 32
    x_ptrs += quarter[:, :, :, None] * 256
    if MASKED:
        mask = warp * 32 + lane < left
        absmax = absmax_of(block_idx, mask, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)
        word_mask = warp * 128 + quarter * 32 + lane < left * 4  # (4, WARPS, 32)
        words = tl.load(word_ptrs, mask=word_mask[None, :, :, :], other=0)
        x = tl.load(x_ptrs, mask=word_mask[:, :, :, None], other=0)
    else:
        absmax = absmax_of(block_idx, None, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)
        words = tl.load(word_ptrs)
        x = tl.load(x_ptrs)

    # compute: one gather for all codes, a multiply-add for each weight, and one for each scale
    codes = (words[:, :, :, :, None] >> shift[None, None, None, None, :]) & 15
    values = _eight(lookup(levels_ptr, levels, codes))  # 8 of (ROWS, 4, WARPS, 32)
    x_values = _eight(x)  # 8 of (4, WARPS, 32)
    sums = tl.zeros([ROWS, 4, WARPS, 32], tl.float32)
    for nibble in tl.static_range(8):
        factor = x_values[nibble].to(tl.float32)[None, :, :, :]
        factor = tl.broadcast_to(factor, [ROWS, 4, WARPS, 32])
        sums = tl.fma(values[nibble], factor, sums)
    # word 32 q + l is in chunk 8 q + l / 4, whose scale another lane of the warp has
    absmax = tl.broadcast_to(absmax[:, None, :, :], [ROWS, 4, WARPS, 32])
    owner = tl.broadcast_to((quarter * 8 + lane // 4)[None, :, :, :], [ROWS, 4, WARPS, 32])
    return tl.fma(sums, _from_lanes(absmax, owner), total)


@triton.jit
def _from_lanes(values, index):
    """Return values[…, index[…]] along the last axis."""
    if GATHERS:
        found = tl.gather(values, index, 3)
    else:  # the sum of one value and zeros
        here = index[:, :, :, :, None] == tl.arange(0, 32)[None, None, None, None, :]
        found = tl.sum(tl.where(here, values[:, :, :, None, :], 0), axis=4)
    return found


@triton.jit
def _gemv_fast(
    x_ptr,  # bf16, fp16 or fp32 (32 n_chunks,)
    words_ptr,  # int32 (n_rows 4 n_chunks,)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    bias_ptr,  # any of x's dtypes (n_rows,), not read unless BIAS
    y_ptr,  # any of x's dtypes (n_rows,)
    n_rows,  # output size
    n_chunks,  # inner size / 32
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # True if the scales are codes
    BIAS: tl.constexpr,  # True if there is a bias
    ROWS: tl.constexpr,  # rows a program
    CHUNKS: tl.constexpr,  # chunks of a row in a step: 32 for each warp
):
    """Multiply ROWS rows of W by x."""
    WARPS: tl.constexpr = CHUNKS // 32
    # a row past the last one repeats the last row, and is not stored
    row_idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # counted in chunks, 32 bits reach to 2^36 weights
    first_chunk = tl.minimum(row_idx, n_rows - 1)[:, None, None] * n_chunks  # (ROWS, 1, 1)
    warp = tl.arange(0, WARPS)[:, None]
    # without the hint, Triton would give a lane several neighbours
    lane = tl.max_contiguous(tl.arange(0, 32), 1)[None, :]
    word = warp * 128 + lane  # (WARPS, 32)
    chunk_idx = first_chunk + (warp * 32 + lane)[None, :, :]
    word_ptrs = words_ptr + first_chunk.to(tl.int64)[:, :, :, None] * 4 + word[None, None, :, :]
    x_ptrs = x_ptr + word[None, :, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    total = tl.zeros([ROWS, 4, WARPS, 32], tl.float32)
    end = n_chunks // CHUNKS * CHUNKS  # of the full steps
    for start in range(0, end, CHUNKS):
        total = _add_step(
            total, 0, chunk_idx + start, word_ptrs + start * 4, x_ptrs + start * 32,
            scales_ptr, nested_ptr, offset_ptr, levels_ptr, map_ptr, BLOCKSIZE, NESTED, False,
        )  # fmt: skip
    if end < n_chunks:
        total = _add_step(
            total, n_chunks - end, chunk_idx + end, word_ptrs + end * 4, x_ptrs + end * 32,
            scales_ptr, nested_ptr, offset_ptr, levels_ptr, map_ptr, BLOCKSIZE, NESTED, True,
        )  # fmt: skip
    # store: the sum of a thread, of a warp, of the program
    y = tl.sum(tl.sum(tl.sum(total, axis=1), axis=2), axis=1)
    if BIAS:
        bias = tl.load(bias_ptr + row_idx, mask=row_idx < n_rows, other=0)
        y += bias.to(tl.float32)
    tl.store(y_ptr + row_idx, y.to(y_ptr.dtype.element_ty), mask=row_idx < n_rows)


# ---- small


@triton.jit
def _quarters(values):
    """Split (rows, chunks, 4, 8) into four tensors (rows, chunks, 8)."""
    pairs = tl.reshape(values, [values.shape[0], values.shape[1], 2, 2, 8])
    even, odd = tl.split(tl.permute(pairs, [0, 1, 4, 2, 3]))  # words 0 and 2, words 1 and 3
    value0, value2 = tl.split(even)
    value1, value3 = tl.split(odd)
    return value0, value1, value2, value3


@triton.jit
def _gemv_small(
    x_ptr,  # bf16, fp16 or fp32 (32 n_chunks,)
    words_ptr,  # int32 (n_rows 4 n_chunks,)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    bias_ptr,  # any of x's dtypes (n_rows,), not read unless BIAS
    y_ptr,  # any of x's dtypes (n_rows,)
    n_rows,  # output size
    n_chunks,  # inner size / 32
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # True if the scales are codes
    BIAS: tl.constexpr,  # True if there is a bias
    ROWS: tl.constexpr,  # rows a program
    CHUNKS: tl.constexpr,  # chunks of a row in a step
):
    """Multiply ROWS rows of W by x."""
    # a row past the last one repeats the last row, and is not stored
    row_idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    nibble = tl.arange(0, 8)
    shift = (nibble * 4) ^ 4  # see nf4_dequantize.py
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    # counted in chunks, 32 bits reach to 2^36 weights
    first_chunk = tl.minimum(row_idx, n_rows - 1)[:, None] * n_chunks  # (ROWS, 1)
    total = tl.zeros([ROWS, CHUNKS], tl.float32)
    for start in range(0, n_chunks, CHUNKS):
        # load
        chunk_offsets = start + tl.arange(0, CHUNKS)[None, :]
        mask = chunk_offsets < n_chunks
        word_offsets = (first_chunk + chunk_offsets).to(tl.int64)[:, :, None] * 4
        word_offsets = word_offsets + tl.arange(0, 4)[None, None, :]
        words = tl.load(words_ptr + word_offsets, mask=mask[:, :, None], other=0)
        block_idx = (first_chunk + chunk_offsets).to(tl.uint32) // (BLOCKSIZE // 32)
        absmax = absmax_of(block_idx, mask, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)

        # compute: one gather for all codes, then a multiply-add for each weight
        codes = (words[:, :, :, None] >> shift[None, None, None, :]) & 15  # (ROWS, CHUNKS, 4, 8)
        values = _quarters(lookup(levels_ptr, levels, codes))  # 4 of (ROWS, CHUNKS, 8)
        products = tl.zeros([ROWS, CHUNKS, 8], tl.float32)
        for word in tl.static_range(4):
            x_offsets = chunk_offsets[:, :, None] * 32 + word * 8 + nibble[None, None, :]
            x_offsets = tl.broadcast_to(x_offsets, [ROWS, CHUNKS, 8])
            x_mask = tl.broadcast_to(mask[:, :, None], [ROWS, CHUNKS, 8])
            x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0).to(tl.float32)
            products = tl.fma(values[word], x, products)
        total = tl.fma(tl.sum(products, axis=2), absmax, total)
    # store
    y = tl.sum(total, axis=1)
    if BIAS:
        bias = tl.load(bias_ptr + row_idx, mask=row_idx < n_rows, other=0)
        y += bias.to(tl.float32)
    tl.store(y_ptr + row_idx, y.to(y_ptr.dtype.element_ty), mask=row_idx < n_rows)


# ---- launchers


def fits(shape: Sequence[int]) -> bool:
    """Return True if the fast kernel takes a weight.

    A row must consist of full chunks, and the number of chunks must fit in 32 bits.

    Args:
        shape: Shape (out, in) of the weight.

    Returns:
        True if the kernel takes it.
    """
    rows, inner = shape
    chunks = rows * inner // CHUNK
    return inner % CHUNK == 0 and 0 < chunks < 2**31


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
    """Return W x + bias by the fast or, for short rows, the small kernel.

    `fits` must hold. The caller (nf4/functional.py) has checked the other arguments.

    Args:
        x: Vector of shape (in,), in bf16, fp16 or fp32.
        packed: Packed codes, uint8 of shape (out * in / 2,), aligned to 4 bytes.
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested_absmax: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        shape: Shape (out, in) of the weight.
        blocksize: Number of weights that share one scale.
        bias: Vector of shape (out,), or None.

    Returns:
        Vector of shape (out,), in the dtype of x.
    """
    rows, inner = shape
    y = x.new_empty(rows)
    words = packed[: rows * inner // 2].view(torch.int32)
    options = {
        "BLOCKSIZE": blocksize,
        "NESTED": nested_absmax is not None,
        "BIAS": bias is not None,
    }
    name = "gemv_nf4"
    kernel = _gemv_fast
    if inner <= SMALL:
        name = "gemv_nf4_small"
        kernel = _gemv_small

    def programs(ROWS: int, CHUNKS: int) -> int:
        return cdiv(rows, ROWS)

    with rounded(y) as target:
        weight = (words, scales, nested_absmax, offset, *tables(x.device))
        sizes = (rows, inner // CHUNK)
        run(name, kernel, programs, x, *weight, bias, target, *sizes, **options)
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
    """Return W x + bias by the textbook kernel.

    Args:
        x: Vector of shape (in,), in bf16, fp16 or fp32.
        packed: Packed codes, uint8 of shape (out * in / 2,).
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested_absmax: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        shape: Shape (out, in) of the weight; `in` must be even.
        blocksize: Number of weights that share one scale.
        bias: Vector of shape (out,), or None.

    Returns:
        Vector of shape (out,), in the dtype of x.
    """
    rows, inner = shape
    y = x.new_empty(rows)
    options = {
        "BLOCKSIZE": blocksize,
        "NESTED": nested_absmax is not None,
        "BIAS": bias is not None,
    }
    with rounded(y) as target:
        weight = (packed, scales, nested_absmax, offset, *tables(x.device))
        arguments = (x, *weight, bias, target, inner)
        run("gemv_nf4_textbook", _gemv_textbook, rows, *arguments, **options)
    return y
