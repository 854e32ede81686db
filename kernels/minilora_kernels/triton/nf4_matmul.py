# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""Y = X Wᵀ straight from the packed bytes: 2 to 64 tokens through a 4-bit layer, without ever making the dense W.

    y[m, o] = sum over k of  round(level[code[o, k]] * absmax[o, k])  x[m, k]  + bias[o]        in fp32, rounded once

Dequantising first reads 0.516 bytes a weight, writes 2 and reads 2 again; here 0.516 are read. The reference is
functional.py's other path: dequantise, then multiply. W is rounded to x's dtype as it is there, so only the order of
the sums differs.

A program decodes a tile of ROWS x INNER weights and hands it to the tensor cores (tl.dot), whose least tile is 16
tokens: fewer are padded. All tokens lie in one tile, so each weight is decoded once. What counts then is that values
stay where they are: the eight codes of a word are joined in the order of k, so that a thread keeps the 32 weights of
its 128-bit load, with their one scale, until it hands them on, 128 bits at a time. Reshaped into that order, each
weight moves by itself, for twice the instructions. A layer with few rows is cut along k too, into parts whose sums are
added in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton import launch, nf4_gemv
from minilora_kernels.triton.launch import BY_HAND, nearest, rounded, run
from minilora_kernels.triton.nf4_dequantize import absmax_of, lookup, tables

STEPS = 8  # chunks: whole steps of every tile; what a part has at least
ENOUGH = 2**15  # rows, those of each part counted again: 512 programs of 64 rows, for the largest cards


@triton.jit
def _codes(words):
    """int32 (…) -> codes (…, 2, 2, 2) in the order of k. Element k sits in nibble k ^ 1, see nf4_dequantize.py;
    tl.join(a, b) stacks on a new last axis."""
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))  # k = 0, 4 and 2, 6
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.join(even, odd) & 15


@triton.jit
def _load(
    start,  # chunk of the row, the first of CHUNKS
    end,  # chunk that is no longer read
    first,  # (ROWS, 1): each row's first chunk
    words_ptr,
    scales_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Words (ROWS, CHUNKS, 4) and their scales (ROWS, CHUNKS)."""
    chunk = start + tl.arange(0, CHUNKS)[None, :]
    inside = chunk < end
    at = (first + chunk).to(tl.int64)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    words = tl.load(words_ptr + at, mask=inside[:, :, None], other=0)
    block = (first + chunk).to(tl.uint32) // (BLOCKSIZE // 32)
    return words, absmax_of(block, inside, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)


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
    part,  # chunks of a part: whole steps
    BLOCKSIZE: tl.constexpr,  # weights that share one scale
    NESTED: tl.constexpr,  # whether scales are codes
    BIAS: tl.constexpr,  # whether there is a bias
    TOKENS: tl.constexpr,  # a power of two from 16 on, n_tokens or more
    ROWS: tl.constexpr,  # rows a program
    CHUNKS: tl.constexpr,  # chunks of a row in a step
):
    # who am I: ROWS rows, one part of their chunks; past the last row I repeat it and store nothing
    tiles = tl.cdiv(n_rows, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(0) // tiles * part
    end = tl.minimum(begin + part, n_chunks)
    token = tl.arange(0, TOKENS)
    x_ptr += token[None, :].to(tl.int64) * n_chunks * 32  # (1, TOKENS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    first = tl.minimum(row, n_rows - 1)[:, None] * n_chunks  # in chunks: 32 bits reach to 2^36 weights
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    words, absmax = _load(
        begin, end, first, words_ptr, scales_ptr, nested_ptr, offset_ptr, map_ptr, BLOCKSIZE, NESTED, CHUNKS
    )
    for start in tl.range(begin, end, CHUNKS, num_stages=1):
        # load: x, and the next step's weights while this step's are multiplied
        k = start * 32 + tl.arange(0, CHUNKS * 32)[:, None]
        x = tl.load(x_ptr + k, mask=(k < n_chunks * 32) & (token < n_tokens)[None, :], other=0)  # (INNER, TOKENS)
        codes, scale = _codes(words), absmax
        after = start + CHUNKS
        words, absmax = _load(
            after, end, first, words_ptr, scales_ptr, nested_ptr, offset_ptr, map_ptr, BLOCKSIZE, NESTED, CHUNKS
        )

        # compute: one gather for all codes, one rounding, and the tensor cores
        W = lookup(levels_ptr, levels, codes) * scale[:, :, None, None, None, None]  # (ROWS, CHUNKS, 4, 2, 2, 2)
        W = tl.reshape(nearest(W, dtype), [ROWS, CHUNKS * 32])
        if BY_HAND:  # the interpreter multiplies bf16 as the integers in which it keeps them
            total += tl.dot(W.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(W, x, total, input_precision="ieee")
    # store
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < n_rows, other=0).to(tl.float32)[:, None]
    y_ptr += (tl.program_id(0) // tiles).to(tl.int64) * n_tokens * n_rows
    at = token[None, :].to(tl.int64) * n_rows + row[:, None]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=(row < n_rows)[:, None] & (token < n_tokens)[None, :])


# ---- launcher

# Triton 3.3 stops with an error when it compiles this for sm_120; what lies between it and 3.7 was not tried.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
# Tokens at most: their sums lie in registers. Products of fp32 are no work for tensor cores, and take 16 instructions.
MOST = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}


def fits(dtype: torch.dtype, device: torch.device, shape: Sequence[int], tokens: int) -> bool:
    """Whether the kernel takes so many tokens of this dtype and a weight (out, in): on cards for whose tensor cores it
    was counted (sm_80 and newer), with a Triton that compiles it, and of a size that the GEMV takes too."""
    cuda = device.type == "cuda" and torch.version.hip is None and not OLD
    counted = launch.interpreted() or (cuda and torch.cuda.get_device_capability(device) >= (8, 0))
    return counted and nf4_gemv.fits(shape) and 0 < tokens <= MOST.get(dtype, 0)


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
    """x (M, in) -> x Wᵀ + bias (M, out), in x's dtype. `fits` must hold, and what functional.py checks."""
    (rows, k), tokens, chunks = shape, len(x), shape[1] // nf4_gemv.CHUNK
    part = -(-chunks * rows // ENOUGH // STEPS) * STEPS  # chunks
    parts = -(-chunks // part)
    y = x.new_empty(tokens, rows)
    sums = y if parts == 1 else torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
    words = packed[: rows * k // 2].view(torch.int32)
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None, "BIAS": bias is not None and parts == 1}
    options["TOKENS"] = max(16, triton.next_power_of_2(tokens))
    with rounded(sums) as target:
        pointers = (x, words, scales, nested_absmax, offset, *tables(x.device), bias, target)
        arguments = (*pointers, tokens, rows, chunks, part)
        run("matmul_nf4", _matmul, lambda ROWS, CHUNKS: -(-rows // ROWS) * parts, *arguments, **options)
    if parts > 1:
        total = sums.sum(0)
        y = (total if bias is None else total + bias).to(x.dtype)
    return y
