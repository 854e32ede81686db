# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernels for y = W x from the packed codes: one token through a 4-bit layer without a dense W.

    y[o] = sum over k of level[code[o, k]] * absmax[o, k] * x[k]  + bias[o]     fp32, rounded once

To decode one token, every weight is read once for one multiplication, so that the kernel is bound
by memory: reading 0.516 bytes a weight instead of 2 is up to 3.9 times as fast. Dequantising first
would write and read these 2 bytes in addition. The number of instructions a weight counts next:
shift, mask, look-up, multiply-add.

    textbook    One program has one row and reads bytes as the textbook kernel of nf4_dequantize.py.
    fast        Works on *chunks* of 32 weights = 4 words = one 128-bit load. A chunk is in one
                block, so that it has one scale, applied once to its sum. All threads of a program
                are along the row: each thread loads the values of x that it uses, and two rows
                share each value.
    small       The same kernel with other constants, for rows too short to fill 64 lanes (576 in
                SmolLM2).

The result differs from dequantise-then-multiply by one rounding less: here W stays in fp32 instead
of being rounded to the dtype of x.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton.launch import cdiv, rounded, run
from minilora_kernels.triton.nf4_dequantize import absmax_of, lookup, tables

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
def _quarters(values):
    """Split (rows, chunks, 4, 8) into four tensors (rows, chunks, 8)."""
    pairs = tl.reshape(values, [values.shape[0], values.shape[1], 2, 2, 8])
    even, odd = tl.split(tl.permute(pairs, [0, 1, 4, 2, 3]))  # words 0 and 2, words 1 and 3
    value0, value2 = tl.split(even)
    value1, value3 = tl.split(odd)
    return value0, value1, value2, value3


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
    SHARED: tl.constexpr,  # True if the rows of a thread share x; else each row loads its own
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
            x_mask = mask[:, :, None]
            if not SHARED:
                x_offsets = tl.broadcast_to(x_offsets, [ROWS, CHUNKS, 8])
                x_mask = tl.broadcast_to(x_mask, [ROWS, CHUNKS, 8])
            x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0).to(tl.float32)
            products = tl.fma(values[word], tl.broadcast_to(x, [ROWS, CHUNKS, 8]), products)
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
    """Return W x + bias by the fast kernel.

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
        "SHARED": inner > SMALL,
    }
    name = "gemv_nf4_small" if inner <= SMALL else "gemv_nf4"

    def programs(ROWS: int, CHUNKS: int) -> int:
        return cdiv(rows, ROWS)

    with rounded(y) as target:
        weight = (words, scales, nested_absmax, offset, *tables(x.device))
        sizes = (rows, inner // CHUNK)
        run(name, _gemv_fast, programs, x, *weight, bias, target, *sizes, **options)
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
