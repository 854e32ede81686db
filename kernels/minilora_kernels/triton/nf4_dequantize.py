# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernels for NF4 -> bf16, fp16, fp32 or fp64, with both levels of scales in one launch.

The reference (nf4/reference.py), for element i of a weight quantised in blocks of B:

    code      = nibble i of packed, the first of each pair in the high half of its byte
    absmax    = scales[i // B]                                     single quantisation
              = map[scales[b]] * nested_absmax[b // 256] + offset  double quantisation, b = i // B
    out[i]    = level[code] * absmax      in fp32, rounded once to the dtype of out

A GPU runs many *programs*. Each is the same function with another number, on another *tile* of the
data. Inside a program names hold tensors, which Triton spreads over the threads of the program. 32
threads make a *warp*, whose threads run in step:

    tl.arange(0, 4)                             (0, 1, 2, 3); sizes are powers of two
    tl.load(pointer + i, mask=m, other=0)       a value for each entry of i where m is true, else 0
    NAME: tl.constexpr                          known at compile time: another value, another kernel
    for s in tl.static_range(4)                 unrolled: a tuple can hold one tensor per s
    pointer.dtype.element_ty                    the dtype of the values in memory

A good dequantise kernel is bound by memory: for each bf16 value it reads 0.516 bytes
(1/2 + 1/64 + 4/16384) and writes 2. It reaches this bound only if the loads and stores of a thread
are wide and the instructions between them are few:

    textbook    One entry of a tensor is a byte. Both nibbles are looked up in memory, and the
                values are interleaved.
    fast        One entry is 8 values: a thread loads one 32-bit word and stores 128 bits of bf16.
                The 16 levels are looked up in shared memory (tl.gather). Four words are in flight
                at a time.

Both have the bits of the reference. The fast kernel covers full words; the textbook kernel takes
the last values, at most 7.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook
from minilora_kernels.triton.launch import TRITON_VERSION, cdiv, rounded, run, table

# Triton 3.3, which torch 2.7 brings, aborts the process while it compiles the tl.gather of
# `lookup`. There each look-up is a load.
GATHERS = tl.constexpr(TRITON_VERSION >= (3, 4))


@triton.jit
def absmax_of(block_idx, mask, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED: tl.constexpr):
    """Return the scale of each block in `block_idx`; blocks outside `mask` are not read.

    Args:
        block_idx: Numbers of blocks, of any shape.
        mask: True for the blocks to read, of the same shape; None for all.
        scales_ptr: fp32 scales (K,), or uint8 codes (K,) if NESTED.
        nested_ptr: fp32 scales of the codes (ceil(K/256),), not read unless NESTED.
        offset_ptr: fp32 offset (1,), not read unless NESTED.
        map_ptr: fp32 values of the codes (256,), not read unless NESTED.
        NESTED: The scales are quantised (double quantisation).
    """
    other = None if mask is None else 0
    scale = tl.load(scales_ptr + block_idx, mask=mask, other=other)
    if NESTED:
        nested = tl.load(nested_ptr + block_idx // 256, mask=mask, other=other)
        value = tl.load(map_ptr + scale.to(tl.int32))
        absmax = value * nested + tl.load(offset_ptr)  # rounds twice, as the reference does
    else:
        absmax = scale
    return absmax


@triton.jit
def lookup(entries_ptr, entries, index):
    """Return entries[index] for an index of any shape.

    Args:
        entries_ptr: Address of the table.
        entries: The table, loaded from `entries_ptr`.
        index: Positions in the table, of any shape.
    """
    if GATHERS:
        flat_index = tl.reshape(index, [index.numel])
        values = tl.reshape(tl.gather(entries, flat_index, 0), index.shape)
    else:
        values = tl.load(entries_ptr + index)
    return values


# ---- textbook


@triton.jit
def _dequantize_textbook(
    packed_ptr,  # uint8 (ceil(n/2),)
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    out_ptr,  # bf16, fp16, fp32 or fp64 (n,)
    start,  # first element to write, even
    n_elements,  # n
    BLOCKSIZE: tl.constexpr,  # values that share one scale
    NESTED: tl.constexpr,  # True if the scales are codes
    BYTES: tl.constexpr,  # bytes that a program reads
):
    """Dequantise BYTES bytes, two values each."""
    # this program reads bytes first_byte to first_byte + BYTES; in 64 bits, because a weight may
    # have more than 2^31 elements
    first_byte = start // 2 + tl.program_id(0).to(tl.int64) * BYTES
    byte_offsets = first_byte + tl.arange(0, BYTES)
    mask = byte_offsets * 2 < n_elements

    # load
    pair = tl.load(packed_ptr + byte_offsets, mask=mask, other=0).to(tl.int32)
    block_idx = byte_offsets * 2 // BLOCKSIZE
    absmax = absmax_of(block_idx, mask, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)

    # compute: level[code] * absmax
    high = tl.load(levels_ptr + (pair >> 4)) * absmax
    low = tl.load(levels_ptr + (pair & 15)) * absmax
    values = tl.interleave(high, low)  # (2 BYTES,): high0, low0, high1, low1, ...

    # store
    offsets = first_byte * 2 + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=offsets < n_elements)


# ---- fast


@triton.jit
def _dequantize_fast(
    words_ptr,  # int32 (n_words,): packed, 8 codes a word
    scales_ptr,  # fp32 (K,), or uint8 codes (K,)
    nested_ptr,  # fp32 (ceil(K/256),), not read unless NESTED
    offset_ptr,  # fp32 (1,), not read unless NESTED
    levels_ptr,  # fp32 (16,)
    map_ptr,  # fp32 (256,), not read unless NESTED
    out_ptr,  # bf16, fp16, fp32 or fp64 (8 n_words,)
    n_words,  # full words
    BLOCKSIZE: tl.constexpr,  # values that share one scale, 32 or more: a word never has two scales
    NESTED: tl.constexpr,  # True if the scales are codes
    WORDS: tl.constexpr,  # words of a step: one per thread, whose 8 bf16 values are one store
):
    """Dequantise four steps of WORDS words, 8 values each."""
    # The words of a step are neighbours in memory, so that a warp reads and writes full lines.
    WORDS_PER_BLOCK: tl.constexpr = BLOCKSIZE // 8
    tl.static_assert(4 * WORDS <= 256 * WORDS_PER_BLOCK, "a program has one second-level scale")
    first_word = tl.program_id(0).to(tl.int64) * (4 * WORDS)
    words_left = tl.minimum(n_words - first_word, 4 * WORDS).to(tl.int32)  # for this program
    thread_offsets = tl.arange(0, WORDS)
    nibble = tl.arange(0, 8)

    # load all four words before the first store: Triton keeps the order of loads and stores, and
    # would wait in between
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    if NESTED:  # once for the program, where absmax_of would load once for each entry
        nested = tl.load(nested_ptr + first_word // (256 * WORDS_PER_BLOCK))
        offset = tl.load(offset_ptr)
    words = ()
    absmax = ()
    for step in tl.static_range(4):
        word_offsets = thread_offsets + step * WORDS
        mask = word_offsets < words_left
        words = words + (tl.load(words_ptr + first_word + word_offsets, mask=mask, other=0),)
        scale_ptrs = scales_ptr + first_word // WORDS_PER_BLOCK + word_offsets // WORDS_PER_BLOCK
        scale = tl.load(scale_ptrs, mask=mask, other=0)
        if NESTED:
            value = tl.load(map_ptr + scale.to(tl.int32))
            absmax = absmax + (value * nested + offset,)
        else:
            absmax = absmax + (scale,)

    # compute: all codes, then all levels in one gather. Each call of tl.gather copies its table to
    # shared memory, so the four words are joined before one call and split after it. tl.join stacks
    # on a new last axis, and tl.split takes that axis apart:
    #     four[:, i, j] is the word of step 2i + j
    # Element k is in nibble k ^ 1 of a little-endian word: the first of each pair is the high half
    # of its byte.
    shift = (nibble * 4) ^ 4
    four = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))  # (WORDS, 2, 2)
    codes = (four[:, :, :, None] >> shift[None, None, None, :]) & 15  # (WORDS, 2, 2, 8)
    values = lookup(levels_ptr, levels, codes)
    values = tl.permute(values, [0, 3, 1, 2])  # (WORDS, 8, i, j)
    even, odd = tl.split(values)  # (WORDS, 8, i): j = 0 and j = 1
    value0, value2 = tl.split(even)  # (WORDS, 8) each
    value1, value3 = tl.split(odd)
    values = (value0, value1, value2, value3)

    # store
    for step in tl.static_range(4):
        word_offsets = thread_offsets + step * WORDS
        product = values[step] * absmax[step][:, None]  # (WORDS, 8), fp32
        offsets = word_offsets[:, None] * 8 + nibble[None, :]  # (WORDS, 8)
        mask = (word_offsets < words_left)[:, None]
        out_ptrs = out_ptr + first_word * 8 + offsets
        tl.store(out_ptrs, product.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launchers


def dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """Dequantise a weight by the fast kernel.

    One launch, or two if the number of values is not a multiple of 8. The caller
    (nf4/functional.py) has checked the arguments.

    Args:
        packed: Packed codes, uint8 of shape (ceil(n / 2),), aligned to 4 bytes.
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested_absmax: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        blocksize: Number of values that share one scale.
        out: Contiguous tensor of n values that receives the result, in bf16, fp16, fp32 or fp64.
    """
    n = out.numel()
    n_words = n // 8  # full words
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None}

    def programs(WORDS: int) -> int:
        return cdiv(n_words, 4 * WORDS)

    with rounded(out) as target:
        words = packed[: n_words * 4].view(torch.int32)
        rest = (scales, nested_absmax, offset, *tables(out.device), target)
        run("dequantize_nf4", _dequantize_fast, programs, words, *rest, n_words, **options)
        if n % 8:
            arguments = (packed, *rest, n_words * 8, n)
            run("dequantize_nf4_textbook", _dequantize_textbook, 1, *arguments, **options)


def dequantize_textbook(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """Dequantise a weight by the textbook kernel alone.

    Args:
        packed: Packed codes, uint8 of shape (ceil(n / 2),).
        scales: The absmax, fp32 of shape (K,); or their codes, uint8 of shape (K,).
        nested_absmax: Second-level absmax, fp32 of shape (ceil(K / 256),), or None.
        offset: Mean of absmax, fp32 of shape (1,), or None.
        blocksize: Number of values that share one scale.
        out: Contiguous tensor of n values that receives the result, in bf16, fp16, fp32 or fp64.
    """
    n = out.numel()
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None}

    def programs(BYTES: int) -> int:
        return cdiv(n, 2 * BYTES)

    with rounded(out) as target:
        rest = (scales, nested_absmax, offset, *tables(out.device), target)
        arguments = (packed, *rest, 0, n)
        run("dequantize_nf4_textbook", _dequantize_textbook, programs, *arguments, **options)


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the constant tables of the kernels, cached on each device.

    Args:
        device: Device on which the kernels run.

    Returns:
        The 16 levels and the 256 values of the dynamic map, fp32.
    """
    return table(nf4_codebook, device), table(dynamic_map, device)
