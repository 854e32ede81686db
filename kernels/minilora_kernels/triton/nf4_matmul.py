# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernel for Y = X Wᵀ from the packed codes: 2 to 64 tokens through a layer without a dense W.

    W[o, k] = level[code[o, k]] * absmax[o, k]      rounded to the dtype of x
    y[m, o] = sum over k of W[o, k] x[m, k]  + bias[o]              in fp32, rounded once

Dequantising first reads 0.516 bytes a weight, writes 2 and reads these 2 again; this kernel reads
0.516 bytes. Its reference is the other path of nf4/functional.py: dequantise, then multiply. Both
round W to the dtype of x, so that only the order of the sums differs.

A program decodes a tile of ROWS x INNER weights and passes it to the tensor cores (tl.dot), whose
smallest tile is 16 tokens; fewer tokens are padded. All tokens are in one tile, so each weight is
decoded once.

Values should stay in the threads that loaded them. The eight codes of a word are joined in the
order of k, so that a thread keeps the 32 weights of its 128-bit load, with their one scale.

For up to 16 tokens they stay until they are multiplied. A thread of the tensor cores holds 32
values of a row in steps of 128 along k, at places that differ from those of its load. A sum has no
order: the kernel renames k, and the rows, so that both are the same places, and gives x the same
names. Then no weight passes through shared memory. 128 rows share a load of x. For more tokens,
whose sums leave no registers for 128 weights a thread, the weights pass through shared memory, 128
bits at a time.

A layer with few rows is also cut along k, into parts whose sums are added in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton import launch, nf4_gemv
from minilora_kernels.triton.launch import (
    BY_HAND,
    TRITON_VERSION,
    cdiv,
    nearest,
    next_power_of_2,
    rounded,
    run,
)
from minilora_kernels.triton.nf4_dequantize import lookup, tables

STEPS = 8  # chunks: a multiple of the step of every tile, and the smallest size of a part
# rows, counted once for each part: 512 programs of 64 rows or 256 of 128, for the largest cards
ENOUGH = 2**15


@triton.jit
def _codes(words):
    """Return the codes (…, 2, 2, 2) of int32 words (…), in the order of k.

    Element k is in nibble k ^ 1, see nf4_dequantize.py. tl.join(a, b) stacks on a new last axis.
    """
    k04 = tl.join(words >> 4, words >> 20)
    k26 = tl.join(words >> 12, words >> 28)
    even = tl.join(k04, k26)
    k15 = tl.join(words, words >> 16)
    k37 = tl.join(words >> 8, words >> 24)
    odd = tl.join(k15, k37)
    return tl.join(even, odd) & 15


@triton.jit
def _load_weights(
    start,  # first chunk of the row to load
    end,  # chunk of the row at which this program stops
    first_chunk,  # (ROWS, 1): number of each row's first chunk
    words_ptr,
    scales_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Load CHUNKS chunks of each row: words (ROWS, CHUNKS, 4) and their scales (ROWS, CHUNKS)."""
    chunk_offsets = start + tl.arange(0, CHUNKS)[None, :]
    mask = chunk_offsets < end
    word_offsets = (first_chunk + chunk_offsets).to(tl.int64)[:, :, None] * 4
    word_offsets = word_offsets + tl.arange(0, 4)[None, None, :]
    words = tl.load(words_ptr + word_offsets, mask=mask[:, :, None], other=0)
    block_idx = (first_chunk + chunk_offsets).to(tl.uint32) // (BLOCKSIZE // 32)
    scale = tl.load(scales_ptr + block_idx, mask=mask, other=0)
    if NESTED:
        # as absmax_of, but the map is read from shared memory: the codes of a request are in 6 of
        # its 8 lines, and take 2 to 3 passes over the banks
        nested = tl.load(nested_ptr + block_idx // 256, mask=mask, other=0)
        map = tl.load(map_ptr + tl.arange(0, 256))
        absmax = lookup(map_ptr, map, scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    else:
        absmax = scale
    return words, absmax


# The next three functions belong together. Bit by bit, a thread of four warps holds of a weight
# tile with 4 chunks a row
#
#     after its load        row: 8 lanes, 4 warps, registers      k: 4 lanes (chunks), 5 registers
#     to multiply           row: 8 lanes, register, 4 warps, …    k: register, 4 lanes, 4 registers
#
# from the lowest bit on. Both have the same lanes and warps, so that the second is the first with
# other names for rows and k. With another number of warps, Triton exchanges the values.


@triton.jit
def _named_weights(W, ROWS: tl.constexpr):
    """Return W (ROWS, 4, 4, 2, 2, 2) as (ROWS, 128), with the names that the tensor cores use."""
    W = tl.reshape(W, [ROWS // 64, 2, 4, 8, 4, 4, 2, 2, 2])
    W = tl.permute(W, [0, 2, 1, 3, 5, 6, 7, 4, 8])
    return tl.reshape(W, [ROWS, 128])


@triton.jit
def _named_x(x, TOKENS: tl.constexpr):
    """Return x (128, TOKENS) with the same names of k."""
    x = tl.reshape(x, [4, 4, 2, 2, 2, TOKENS])
    x = tl.permute(x, [1, 2, 3, 0, 4, 5])
    return tl.reshape(x, [128, TOKENS])


@triton.jit
def _in_order_of_rows(total, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Return the sums (ROWS, TOKENS) in the order of the rows in memory."""
    total = tl.reshape(total, [ROWS // 64, 4, 2, 8, TOKENS])
    return tl.reshape(tl.permute(total, [0, 2, 1, 3, 4]), [ROWS, TOKENS])


@triton.jit
def _decoded(codes, scale, levels_ptr, levels, dtype: tl.constexpr, NAMED: tl.constexpr):
    """Return the weights of codes (ROWS, CHUNKS, 4, 2, 2, 2) as (ROWS, 32 CHUNKS)."""
    W = lookup(levels_ptr, levels, codes)  # one gather for all codes
    W = nearest(W * scale[:, :, None, None, None, None], dtype)  # one rounding
    if NAMED:
        W = _named_weights(W, W.shape[0])
    else:
        W = tl.reshape(W, [W.shape[0], W.shape[1] * 32])
    return W


@triton.jit
def _matmul(
    x_ptr,  # bf16, fp16 or fp32 (n_tokens, 32 n_chunks)
    words_ptr,  # int32 (n_rows 4 n_chunks,)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    bias_ptr,  # any of x's dtypes (n_rows,), not read unless BIAS
    y_ptr,  # x's dtype (n_tokens, n_rows), or fp32 (parts, n_tokens, n_rows)
    n_tokens,
    n_rows,  # output size
    n_chunks,  # inner size / 32
    part_chunks,  # chunks of a part: a multiple of CHUNKS
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # True if the scales are codes
    BIAS: tl.constexpr,  # True if there is a bias
    TOKENS: tl.constexpr,  # a power of two from 16 on, n_tokens or more
    ROWS: tl.constexpr,  # rows a program
    CHUNKS: tl.constexpr,  # chunks of a row in a step
):
    """Multiply one part of ROWS rows of W by all tokens."""
    # a row past the last one repeats the last row, and is not stored
    NAMED: tl.constexpr = CHUNKS == 4 and ROWS % 64 == 0 and TOKENS == 16
    n_tiles = tl.cdiv(n_rows, ROWS)
    row_idx = tl.program_id(0) % n_tiles * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(0) // n_tiles * part_chunks
    end = tl.minimum(begin + part_chunks, n_chunks)
    token_idx = tl.arange(0, TOKENS)
    x_ptr += token_idx[None, :].to(tl.int64) * n_chunks * 32  # (1, TOKENS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    # counted in chunks, 32 bits reach to 2^36 weights
    first_chunk = tl.minimum(row_idx, n_rows - 1)[:, None] * n_chunks  # (ROWS, 1)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    words, absmax = _load_weights(
        begin, end, first_chunk, words_ptr, scales_ptr, nested_ptr, offset_ptr, map_ptr,
        BLOCKSIZE, NESTED, CHUNKS,
    )  # fmt: skip
    for start in tl.range(begin, end, CHUNKS, num_stages=1):
        # load: x, and the weights of the next step while those of this step are multiplied
        k = start * 32 + tl.arange(0, CHUNKS * 32)[:, None]
        x_mask = (k < n_chunks * 32) & (token_idx < n_tokens)[None, :]
        x = tl.load(x_ptr + k, mask=x_mask, other=0)  # (INNER, TOKENS)
        if NAMED:
            x = _named_x(x, TOKENS)
        codes = _codes(words)  # (ROWS, CHUNKS, 4, 2, 2, 2)
        scale = absmax  # (ROWS, CHUNKS)
        words, absmax = _load_weights(
            start + CHUNKS, end, first_chunk, words_ptr, scales_ptr, nested_ptr, offset_ptr, map_ptr,
            BLOCKSIZE, NESTED, CHUNKS,
        )  # fmt: skip

        # compute: decode, and the tensor cores
        W = _decoded(codes, scale, levels_ptr, levels, dtype, NAMED)  # (ROWS, INNER)
        if BY_HAND:  # the interpreter multiplies bf16 as the integers in which it stores them
            total += tl.dot(W.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(W, x, total, input_precision="ieee")
    # store
    if NAMED:
        total = _in_order_of_rows(total, ROWS, TOKENS)
    if BIAS:
        bias = tl.load(bias_ptr + row_idx, mask=row_idx < n_rows, other=0)
        total += bias.to(tl.float32)[:, None]
    part = (tl.program_id(0) // n_tiles).to(tl.int64)
    y_ptr += part * n_tokens * n_rows
    y_offsets = token_idx[None, :].to(tl.int64) * n_rows + row_idx[:, None]
    y_mask = (row_idx < n_rows)[:, None] & (token_idx < n_tokens)[None, :]
    tl.store(y_ptr + y_offsets, total.to(y_ptr.dtype.element_ty), mask=y_mask)


# ---- launcher

# Triton 3.3 stops with an error when it compiles this kernel for sm_120. Versions from there to 3.7
# were not tried.
OLD = TRITON_VERSION < (3, 7)
# Largest number of tokens, whose sums must fit in registers. Tensor cores do not multiply fp32:
# each product takes 16 instructions.
MOST = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}


def fits(dtype: torch.dtype, device: torch.device, shape: Sequence[int], tokens: int) -> bool:
    """Return True if the kernel takes a product.

    The kernel runs on cards for whose tensor cores its instructions were counted (sm_80 and newer),
    with a version of Triton that compiles it, and on weights that the GEMV takes too.

    Args:
        dtype: Dtype of x.
        device: Device of x and of the weight.
        shape: Shape (out, in) of the weight.
        tokens: Number of rows of x.

    Returns:
        True if the kernel takes it.
    """
    most = MOST.get(dtype, 0)
    if not nf4_gemv.fits(shape) or not 0 < tokens <= most:
        return False
    if launch.interpreted():
        return True
    if device.type != "cuda" or torch.version.hip is not None or OLD:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x Wᵀ + bias.

    `fits` must hold. The caller (nf4/functional.py) has checked the other arguments.

    Args:
        x: Matrix of shape (M, in), in bf16, fp16 or fp32.
        packed: Packed codes, uint8 of shape (out * in / 2,), aligned to 4 bytes.
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested_absmax: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        shape: Shape (out, in) of the weight.
        blocksize: Number of weights that share one scale.
        bias: Vector of shape (out,), or None.

    Returns:
        Matrix of shape (M, out), in the dtype of x.
    """
    rows, inner = shape
    tokens = len(x)
    chunks = inner // nf4_gemv.CHUNK
    part_chunks = cdiv(chunks * rows, ENOUGH)
    part_chunks = cdiv(part_chunks, STEPS) * STEPS  # rounded up to a multiple of STEPS
    parts = cdiv(chunks, part_chunks)
    y = x.new_empty(tokens, rows)  # (M, out)
    sums = y
    if parts > 1:
        sums = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
    words = packed[: rows * inner // 2].view(torch.int32)
    options = {
        "BLOCKSIZE": blocksize,
        "NESTED": nested_absmax is not None,
        "BIAS": bias is not None and parts == 1,
        "TOKENS": max(16, next_power_of_2(tokens)),
    }

    def programs(ROWS: int, CHUNKS: int) -> int:
        return cdiv(rows, ROWS) * parts

    with rounded(sums) as target:
        weight = (words, scales, nested_absmax, offset, *tables(x.device))
        sizes = (tokens, rows, chunks, part_chunks)
        # the products of fp32 need the registers
        few = tokens <= 16 and x.dtype != torch.float32
        name = "matmul_nf4" if few else "matmul_nf4_many"
        run(name, _matmul, programs, x, *weight, bias, target, *sizes, **options)
    if parts == 1:
        return y
    total = sums.sum(0)  # (M, out)
    if bias is not None:
        total = total + bias
    return total.to(x.dtype)
