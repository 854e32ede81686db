# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernels for bf16, fp16 or fp32 -> NF4, and for the scales themselves -> 8 bits.

The reference (nf4/reference.py), for a block of B values:

    absmax = max |x|        y = x * (1 / absmax)        code = number of the 15 thresholds below y

    textbook    Add 15 comparisons for each value; a block is a row of B values.
    fast        The same row, but one look-up. [-1, 1] is cut into 32 bins, each narrower than any
                gap between thresholds, so that a bin holds at most one threshold:

                    code = (thresholds in lower bins) + (y > threshold of the bin)

The bin is read from the bits of a sum. Near 2^20, neighbouring fp32 numbers are 1/8 apart. In
y * 15.5 + 16 + 2^20 the lowest three bits of the mantissa are therefore eighths, and the five bits
above them are the integer part. Rounding is monotone, so the values keep their order from bin to
bin, and comparing with the threshold of the bin gives exactly the count of all 15. Thresholds and
counts are two tables of 32 entries of 32 bits, as many as shared memory has banks, so that the
look-ups of a warp never wait for each other. Entries of 64 bits, one look-up instead of two, would
take 3.6 passes instead of 2.

Double quantisation (`double_quantize`) is the same rule with 255 thresholds. The code is found by
binary search, in 8 comparisons.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, midpoints, nf4_thresholds
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE, stable_mean
from minilora_kernels.triton.launch import cdiv, run, table
from minilora_kernels.triton.nf4_dequantize import lookup

BINS = 32

# ---- parts of all kernels


@triton.jit
def _scaled(x):
    """Return absmax (rows, 1) and x / absmax (rows, B), which is zero if absmax is below 2^-126."""
    # read as integers, positive floats keep their order, infinity is above them and NaN above
    # infinity: the maximum loses neither
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # of |x|
    bits = tl.max(bits, axis=1)[:, None]
    absmax = bits.to(tl.float32, bitcast=True)
    # 0x00800000 is 2^-126, the smallest normal number
    inverse = tl.where(bits < 0x00800000, 0.0, tl.div_rn(1.0, absmax))
    return absmax, x * inverse


@triton.jit
def _packed(codes, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """Return int32 words (ROWS, BLOCKSIZE / 8); the first of each pair is in a byte's high half."""
    shift = (tl.arange(0, 8) * 4) ^ 4
    eight = tl.reshape(codes, [ROWS, BLOCKSIZE // 8, 8])
    return tl.sum(eight << shift[None, None, :], axis=2)


@triton.jit
def _load_rows(x_ptr, n_elements, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """Load the ROWS blocks of this program.

    Returns the number of its first block (64-bit), the number of values from there to the end (at
    most those of the program), and the values as fp32 (ROWS, BLOCKSIZE).
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    n_left = n_elements - first_row * BLOCKSIZE
    n_left = tl.minimum(n_left, ROWS * BLOCKSIZE).to(tl.int32)
    row_idx = tl.arange(0, ROWS)[:, None]
    col_offsets = tl.arange(0, BLOCKSIZE)[None, :]
    offsets = row_idx * BLOCKSIZE + col_offsets
    x = tl.load(x_ptr + first_row * BLOCKSIZE + offsets, mask=offsets < n_left, other=0)
    return first_row, n_left, x.to(tl.float32)


@triton.jit
def _store_rows(
    words_ptr,
    absmax_ptr,
    codes,
    absmax,
    first_row,
    n_left,
    ROWS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
):
    """Store the packed codes and the absmax of this program's blocks.

    The last word is complete: the code of zero fills it.
    """
    row_idx = tl.arange(0, ROWS)[:, None]
    word_offsets = row_idx * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None, :]
    # without the hint a thread would store two neighbours, one after the other: half of each sector
    word_offsets = tl.max_contiguous(word_offsets, [1, 1])
    packed = _packed(codes, ROWS, BLOCKSIZE)
    first_word = first_row * (BLOCKSIZE // 8)
    tl.store(words_ptr + first_word + word_offsets, packed, mask=word_offsets * 8 < n_left)
    tl.store(absmax_ptr + first_row + row_idx, absmax, mask=row_idx * BLOCKSIZE < n_left)


# ---- textbook


@triton.jit
def _quantize_textbook(
    x_ptr,  # bf16, fp16 or fp32 (n,)
    words_ptr,  # int32 (ceil(n/8),): 8 codes a word
    absmax_ptr,  # fp32 (K,)
    thresholds_ptr,  # fp32 (15,)
    n_elements,  # n
    BLOCKSIZE: tl.constexpr,  # values that share one absmax: a row
    VALUES: tl.constexpr,  # values of a program, as many rows as fit
):
    """Quantise VALUES values, 15 comparisons each."""
    ROWS: tl.constexpr = VALUES // BLOCKSIZE if VALUES > BLOCKSIZE else 1
    first_row, n_left, x = _load_rows(x_ptr, n_elements, ROWS, BLOCKSIZE)
    absmax, y = _scaled(x)
    codes = tl.zeros([ROWS, BLOCKSIZE], tl.int32)
    for i in tl.static_range(15):
        threshold = tl.load(thresholds_ptr + i)
        codes += (y > threshold).to(tl.int32)
    _store_rows(words_ptr, absmax_ptr, codes, absmax, first_row, n_left, ROWS, BLOCKSIZE)


# ---- fast


@triton.jit
def _bin(y):
    """Return floor(y * 15.5 + 16), rounded to eighths first: 0 to 31 for y in [-1, 1] ± 1 ulp."""
    eighths = tl.fma(y, 15.5, 1048592.0)  # 2^20 + 16
    return (eighths.to(tl.int32, bitcast=True) >> 3) & 31


@triton.jit
def _quantize_fast(
    x_ptr,  # bf16, fp16 or fp32 (n,)
    words_ptr,  # int32 (ceil(n/8),): 8 codes a word
    absmax_ptr,  # fp32 (K,)
    bins_ptr,  # int32 (64,): threshold of each bin (fp32 bits), then the count in lower bins
    n_elements,  # n
    BLOCKSIZE: tl.constexpr,  # values that share one absmax: a row
    VALUES: tl.constexpr,  # values of a program, as many rows as fit
):
    """Quantise VALUES values, one look-up each."""
    ROWS: tl.constexpr = VALUES // BLOCKSIZE if VALUES > BLOCKSIZE else 1
    first_row, n_left, x = _load_rows(x_ptr, n_elements, ROWS, BLOCKSIZE)
    absmax, y = _scaled(x)
    bins = tl.load(bins_ptr + tl.arange(0, 64))
    bin = _bin(y)
    threshold, count = tl.split(lookup(bins_ptr, bins, tl.join(bin, bin + 32)))
    threshold = threshold.to(tl.float32, bitcast=True)
    # y > threshold is the sign of threshold - y, which needs no predicate: shift it down and add
    above = (threshold - y).to(tl.uint32, bitcast=True) >> 31
    codes = count + above.to(tl.int32)
    _store_rows(words_ptr, absmax_ptr, codes, absmax, first_row, n_left, ROWS, BLOCKSIZE)


# ---- the second level


@triton.jit
def _double_quantize(
    absmax_ptr,  # fp32 (K,)
    offset_ptr,  # fp32 (1,): their mean
    thresholds_ptr,  # fp32 (255,): midpoints of the dynamic map
    codes_ptr,  # uint8 (K,)
    nested_ptr,  # fp32 (ceil(K/256),)
    n_elements,  # K
    n_rows,  # ceil(K/256)
    ROWS: tl.constexpr,  # blocks of 256 scales a program
):
    """Quantise ROWS blocks of 256 scales, 8 comparisons each."""
    row_idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = row_idx * 256 + tl.arange(0, 256)[None, :]
    absmax = tl.load(absmax_ptr + offsets, mask=offsets < n_elements, other=0)
    d = tl.where(offsets < n_elements, absmax - tl.load(offset_ptr), 0.0)
    nested, y = _scaled(d)
    codes = tl.zeros([ROWS, 256], tl.int32)  # number of thresholds known to be below y
    for i in tl.static_range(8):
        middle = tl.load(thresholds_ptr + codes + (128 >> i) - 1)
        codes += tl.where(middle < y, 128 >> i, 0)
    tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=offsets < n_elements)
    tl.store(nested_ptr + row_idx, nested, mask=row_idx < n_rows)


# ---- launchers


def quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor by the fast kernel, with the bits of `reference.quantize`.

    Values are not checked: the absmax of a block with NaN or infinity is NaN or infinity.

    Args:
        x: Tensor of n values, of any shape, in bf16, fp16, fp32 or fp64.
        blocksize: Number of values that share one scale.

    Returns:
        The packed codes, uint8 of shape (ceil(n / 2),), and absmax, fp32 of shape (K,) with
        K = ceil(n / blocksize).
    """
    return _quantize(x, blocksize, "quantize_nf4", _quantize_fast, _bin_table)


def quantize_textbook(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor by the textbook kernel.

    Args:
        x: Tensor of n values, of any shape, in bf16, fp16, fp32 or fp64.
        blocksize: Number of values that share one scale.

    Returns:
        The same as `quantize`.
    """
    return _quantize(x, blocksize, "quantize_nf4_textbook", _quantize_textbook, nf4_thresholds)


def double_quantize(
    absmax_K: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise scales to 8 bits, with the bits of `reference.double_quantize`.

    Args:
        absmax_K: Scales, fp32 of shape (K,).
        offset: Mean of the scales, fp32 of shape (1,), if it is known. None stands for computing
            it, which takes about twenty small launches.

    Returns:
        The codes, uint8 of shape (K,); the second-level absmax, fp32 of shape (ceil(K / 256),);
        and the offset, fp32 of shape (1,).
    """
    n = len(absmax_K)
    rows = cdiv(n, NESTED_BLOCKSIZE)
    if offset is None:
        offset = stable_mean(absmax_K)
    codes = torch.empty_like(absmax_K, dtype=torch.uint8)  # (K,)
    nested = absmax_K.new_empty(rows)  # (ceil(K/256),)
    thresholds = table(_nested_thresholds, absmax_K.device)
    arguments = (absmax_K.contiguous(), offset, thresholds, codes, nested, n, rows)

    def programs(ROWS: int) -> int:
        return cdiv(rows, ROWS)

    run("double_quantize_nf4", _double_quantize, programs, *arguments)
    return codes, nested, offset


def _quantize(
    x: Tensor, blocksize: int, name: str, kernel: Any, make_table: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Launch one of the two kernels with its table."""
    n = x.numel()
    blocks = cdiv(n, blocksize)
    x_N = x.detach().reshape(-1).contiguous()  # (n,)
    if x.dtype == torch.float64:
        x_N = x_N.float()
    words = torch.empty(cdiv(n, 8), dtype=torch.int32, device=x.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=x.device)  # (K,)
    arguments = (x_N, words, absmax, table(make_table, x.device), n)

    def programs(VALUES: int) -> int:
        rows = max(VALUES // blocksize, 1)
        return cdiv(blocks, rows)

    run(name, kernel, programs, *arguments, BLOCKSIZE=blocksize)
    packed = words.view(torch.uint8)[: (n + 1) // 2]
    return packed, absmax


def _nested_thresholds() -> Tensor:
    """Return the 255 midpoints of the dynamic map, fp32."""
    return midpoints(dynamic_map())


def _bin_table() -> Tensor:
    """Return the tables of `_quantize_fast`, int32 (64,).

    First the threshold in each bin (bits of an fp32, +inf without one), then the number of
    thresholds in lower bins.
    """
    thresholds = nf4_thresholds()  # (15,)
    # exact in fp64, then rounded once: this is the result of tl.fma
    eighths = (thresholds.double() * 15.5 + 1048592.0).float()
    bins = (eighths.view(torch.int32) >> 3) & 31  # (15,)
    threshold_of_bin = torch.full((BINS,), torch.inf, dtype=torch.float32, device="cpu")
    threshold_of_bin.index_put_((bins.long(),), thresholds)
    all_bins = torch.arange(BINS, device="cpu")[:, None]  # (32, 1)
    below = (bins[None, :] < all_bins).sum(1)  # (32,)
    return torch.cat([threshold_of_bin.view(torch.int32), below.int()])
