# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""NF4 -> bf16, fp16 or fp32 on a GPU, both levels of scales in one launch.

The reference (reference.py), for element i of a weight quantised in blocks of B:

    code      = nibble i of packed, the first of each pair in the high half of its byte
    absmax    = scales[i // B]                                            plain
              = map[scales[b]] * nested_absmax[b // 256] + offset         double quantisation, b = i // B
    out[i]    = level[code] * absmax      in fp32, rounded once to the dtype of out

A GPU runs many *programs*, each the same function with its own number, each on a *tile* of the data. Inside a program
names hold whole tensors, which Triton spreads over the program's threads, 32 of which make a *warp* that runs in step:

    tl.arange(0, 4)                             (0, 1, 2, 3); sizes are powers of two
    tl.load(pointer + i, mask=m, other=0)       one value for each entry of i where m is true, 0 elsewhere
    NAME: tl.constexpr                          known when the kernel is compiled: another value, another kernel
    for s in tl.static_range(4)                 unrolled, so that a tuple can hold a tensor for each s
    pointer.dtype.element_ty                    the dtype that is stored there

Dequantising well is bound by memory: 0.516 bytes (1/2 + 1/64 + 4/16384) are read and 2 written for each bf16 value. So
what counts is how wide a thread loads and stores, and how few instructions stand between. By entry of a tensor:

    textbook    a byte an entry, both nibbles looked up in memory, then interleaved
    fast        8 values an entry: one 32-bit word is loaded, one 128-bit piece of bf16 stored, the 16 levels are
                looked up in shared memory (tl.gather), and four words are under way at a time

Both have the reference's bits. The fast one covers whole words; a rest of at most 7 values takes the textbook.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook
from minilora_kernels.triton.launch import rounded, run, table


@triton.jit
def absmax_of(block, inside, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED: tl.constexpr):
    """The scale of each block number in `block`; entries outside `inside` are not read."""
    scale = tl.load(scales_ptr + block, mask=inside, other=0)
    if NESTED:
        nested = tl.load(nested_ptr + block // 256, mask=inside, other=0)
        absmax = tl.load(map_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)  # rounds twice, as the reference
    else:
        absmax = scale
    return absmax


# Triton 3.3, which torch 2.7 brings, aborts the process while compiling this tl.gather: there each look-up is a load.
GATHERS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4))


@triton.jit
def lookup(entries_ptr, entries, index):
    """entries[index], for 16 or 32 of them that have been loaded from entries_ptr, and an index of any shape."""
    if GATHERS:
        found = tl.reshape(tl.gather(entries, tl.reshape(index, [index.numel]), 0), index.shape)
    else:
        found = tl.load(entries_ptr + index)
    return found


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
    n,  # elements
    BLOCKSIZE: tl.constexpr,  # values that share one scale
    NESTED: tl.constexpr,  # whether scales are codes
    BYTES: tl.constexpr,  # bytes a program reads
):
    # who am I: bytes [first, first + BYTES); 64-bit, since a weight may have more than 2^31 elements
    first = start // 2 + tl.program_id(0).to(tl.int64) * BYTES
    byte = first + tl.arange(0, BYTES)
    inside = byte * 2 < n

    # load
    pair = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
    absmax = absmax_of(byte * 2 // BLOCKSIZE, inside, scales_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)

    # compute: level[code] * absmax
    high = tl.load(levels_ptr + (pair >> 4)) * absmax
    low = tl.load(levels_ptr + (pair & 15)) * absmax
    values = tl.interleave(high, low)  # (2 BYTES,): high0, low0, high1, low1, ...

    # store
    element = first * 2 + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=element < n)


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
    n_words,  # whole words
    BLOCKSIZE: tl.constexpr,  # values that share one scale, 32 or more: a word never has two scales
    NESTED: tl.constexpr,  # whether scales are codes
    WORDS: tl.constexpr,  # words of a step: one a thread (launch.py), whose 8 bf16 values are one 128-bit store
):
    # who am I: four steps of WORDS words. A step's words lie side by side, so that a warp reads and writes whole lines
    WORDS_PER_BLOCK: tl.constexpr = BLOCKSIZE // 8
    tl.static_assert(4 * WORDS <= 256 * WORDS_PER_BLOCK, "a program has one second-level scale")
    first = tl.program_id(0).to(tl.int64) * (4 * WORDS)
    left = tl.minimum(n_words - first, 4 * WORDS).to(tl.int32)  # of my words, those that exist
    thread = tl.arange(0, WORDS)
    nibble = tl.arange(0, 8)

    # load all four words before the first store: Triton keeps loads and stores in order, and would wait in between
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    if NESTED:  # one for the whole program, where absmax_of would load one an entry
        nested = tl.load(nested_ptr + first // (256 * WORDS_PER_BLOCK))
        offset = tl.load(offset_ptr)
    words = ()
    absmax = ()
    for step in tl.static_range(4):
        word = thread + step * WORDS
        inside = word < left
        words = words + (tl.load(words_ptr + first + word, mask=inside, other=0),)
        scale = tl.load(scales_ptr + first // WORDS_PER_BLOCK + word // WORDS_PER_BLOCK, mask=inside, other=0)
        if NESTED:
            absmax = absmax + (tl.load(map_ptr + scale.to(tl.int32)) * nested + offset,)
        else:
            absmax = absmax + (scale,)

    # compute: all codes, then all levels in one gather, which fills its table in shared memory once a call. So the four
    # words are joined before and split after it. tl.join(a, b) stacks on a new last axis, tl.split takes it apart:
    #     four[:, i, j] is the word of step 2i + j
    # Element k sits in nibble k ^ 1 of a little-endian word: the first of each pair is the high half of its byte
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
        word = thread + step * WORDS
        product = values[step] * absmax[step][:, None]  # (WORDS, 8), fp32
        element = word[:, None] * 8 + nibble[None, :]
        inside = (word < left)[:, None]
        tl.store(out_ptr + first * 8 + element, product.to(out_ptr.dtype.element_ty), mask=inside)


# ---- launchers


def dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """Into a contiguous `out`; arguments as functional.py has checked them. One launch, two if out.numel() % 8 != 0."""
    n, whole = out.numel(), out.numel() // 8  # values, words that are full
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None}
    with rounded(out) as target:
        rest = (scales, nested_absmax, offset, *tables(out.device), target)
        arguments = (packed[: whole * 4].view(torch.int32), *rest, whole)
        run("dequantize_nf4", _dequantize_fast, lambda WORDS: -(-whole // (4 * WORDS)), *arguments, **options)
        if n % 8:
            run("dequantize_nf4_textbook", _dequantize_textbook, 1, packed, *rest, whole * 8, n, **options)


def dequantize_textbook(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """The same by the textbook kernel alone."""
    n = out.numel()
    options = {"BLOCKSIZE": blocksize, "NESTED": nested_absmax is not None}
    with rounded(out) as target:
        arguments = (packed, scales, nested_absmax, offset, *tables(out.device), target, 0, n)
        run("dequantize_nf4_textbook", _dequantize_textbook, lambda BYTES: -(-n // (2 * BYTES)), *arguments, **options)


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels and the 256 values of the 8-bit map, kept on each device."""
    return table(nf4_codebook, device), table(dynamic_map, device)
