# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""bf16, fp16 or fp32 -> NF4 on a GPU, and the scales themselves -> 8 bits.

The reference (reference.py), for a block of B values:

    absmax = max |x|        y = x * (1 / absmax)        code = number of the 15 thresholds below y

    textbook    15 comparisons, summed, from a row of B values
    fast        the same row, but one look-up: [-1, 1] is cut into 32 bins, narrower than any gap between thresholds,
                so a bin holds one at most, and

                    code = (thresholds in lower bins) + (y > the bin's own threshold)

The bin is read off the bits of a sum: near 2^20 neighbouring fp32 numbers are 1/8 apart, so that in
y * 15.5 + 16 + 2^20 the lowest three bits of the mantissa are eighths and the five above them the whole number.
Rounding is monotone, so values keep their order from bin to bin, and comparing with the bin's own threshold gives
exactly the count of all 15. Threshold and count share one 64-bit entry of a table: one look-up instead of two.

Double quantisation (`double_quantize`) is the same rule with 255 thresholds, found by halving: 8 comparisons each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, midpoints, nf4_thresholds
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE, stable_mean
from minilora_kernels.triton.launch import run, table
from minilora_kernels.triton.nf4_dequantize import lookup

BINS = 32


@triton.jit
def _scaled(x):
    """(rows, B) fp32 -> absmax (rows, 1) and x / absmax (rows, B), zero where absmax is below 2^-126."""
    # read as integers, positive floats keep their order, with infinity above and NaN on top: max loses neither
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)[:, None]
    absmax = bits.to(tl.float32, bitcast=True)
    inverse = tl.where(bits < 0x00800000, 0.0, tl.div_rn(1.0, absmax))  # 0x00800000: 2^-126, the smallest normal
    return absmax, x * inverse


@triton.jit
def _packed(codes, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """Codes (ROWS, BLOCKSIZE) -> int32 words (ROWS, BLOCKSIZE / 8), the first of each pair in a byte's high half."""
    shift = (tl.arange(0, 8) * 4) ^ 4
    eight = tl.reshape(codes, [ROWS, BLOCKSIZE // 8, 8])
    return tl.sum(eight << shift[None, None, :], axis=2)


@triton.jit
def _rows(x_ptr, n, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """My ROWS blocks: the first's number (64-bit), the values that are left from there, the values as fp32."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(n - first * BLOCKSIZE, ROWS * BLOCKSIZE).to(tl.int32)
    value = tl.arange(0, ROWS)[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(x_ptr + first * BLOCKSIZE + value, mask=value < left, other=0)
    return first, left, x.to(tl.float32)


@triton.jit
def _store(words_ptr, absmax_ptr, codes, absmax, first, left, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """Packed codes and absmax of my blocks; a last word is whole, its rest filled with the code of zero."""
    row = tl.arange(0, ROWS)[:, None]
    word = row * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None, :]
    packed = _packed(codes, ROWS, BLOCKSIZE)
    tl.store(words_ptr + first * (BLOCKSIZE // 8) + word, packed, mask=word * 8 < left)
    tl.store(absmax_ptr + first + row, absmax, mask=row * BLOCKSIZE < left)


# ---- textbook


@triton.jit
def _quantize_textbook(
    x_ptr,  # bf16, fp16 or fp32 (n,)
    words_ptr,  # int32 (ceil(n/8),): 8 codes a word
    absmax_ptr,  # fp32 (K,)
    thresholds_ptr,  # fp32 (15,)
    n,  # values
    BLOCKSIZE: tl.constexpr,  # values that share one absmax: a row
    VALUES: tl.constexpr,  # values of a program, as many rows as fit
):
    ROWS: tl.constexpr = VALUES // BLOCKSIZE if VALUES > BLOCKSIZE else 1
    first, left, x = _rows(x_ptr, n, ROWS, BLOCKSIZE)
    absmax, y = _scaled(x)
    codes = tl.zeros([ROWS, BLOCKSIZE], tl.int32)
    for i in tl.static_range(15):
        codes += (y > tl.load(thresholds_ptr + i)).to(tl.int32)
    _store(words_ptr, absmax_ptr, codes, absmax, first, left, ROWS, BLOCKSIZE)


# ---- fast


@triton.jit
def _bin(y):
    """floor(y * 15.5 + 16), rounded to eighths first: 0..31 for y in [-1, 1] give or take an ulp."""
    return (tl.fma(y, 15.5, 1048592.0).to(tl.int32, bitcast=True) >> 3) & 31  # 2^20 + 16


@triton.jit
def _quantize_fast(
    x_ptr,  # bf16, fp16 or fp32 (n,)
    words_ptr,  # int32 (ceil(n/8),): 8 codes a word
    absmax_ptr,  # fp32 (K,)
    bins_ptr,  # int64 (32,): the bin's threshold, fp32 bits, above the count of thresholds in lower bins
    n,  # values
    BLOCKSIZE: tl.constexpr,  # values that share one absmax: a row
    VALUES: tl.constexpr,  # values of a program, as many rows as fit
):
    ROWS: tl.constexpr = VALUES // BLOCKSIZE if VALUES > BLOCKSIZE else 1
    first, left, x = _rows(x_ptr, n, ROWS, BLOCKSIZE)
    absmax, y = _scaled(x)
    entry = lookup(bins_ptr, tl.load(bins_ptr + tl.arange(0, 32)), _bin(y))
    threshold = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    # y > threshold is the sign of threshold - y, which needs no predicate: shift it down and add
    above = (threshold - y).to(tl.uint32, bitcast=True) >> 31
    codes = (entry.to(tl.uint32) + above).to(tl.int32)
    _store(words_ptr, absmax_ptr, codes, absmax, first, left, ROWS, BLOCKSIZE)


# ---- the second level


@triton.jit
def _double_quantize(
    absmax_ptr,  # fp32 (K,)
    offset_ptr,  # fp32 (1,): their mean
    thresholds_ptr,  # fp32 (255,): midpoints of the dynamic map
    codes_ptr,  # uint8 (K,)
    nested_ptr,  # fp32 (ceil(K/256),)
    n,  # K
    n_rows,  # ceil(K/256)
    ROWS: tl.constexpr,  # blocks of 256 scales a program
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    value = row * 256 + tl.arange(0, 256)[None, :]
    absmax = tl.load(absmax_ptr + value, mask=value < n, other=0)
    d = tl.where(value < n, absmax - tl.load(offset_ptr), 0.0)
    nested, y = _scaled(d)
    codes = tl.zeros([ROWS, 256], tl.int32)  # thresholds known to be below y
    for i in tl.static_range(8):
        middle = tl.load(thresholds_ptr + codes + (128 >> i) - 1)
        codes += tl.where(middle < y, 128 >> i, 0)
    tl.store(codes_ptr + value, codes.to(tl.uint8), mask=value < n)
    tl.store(nested_ptr + row, nested, mask=row < n_rows)


# ---- launchers


def quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize, but for its check: absmax is NaN or infinite where a block's values are."""
    return _launch("quantize_nf4", _quantize_fast, _bin_table, x, blocksize)


def quantize_textbook(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The same by the textbook kernel."""
    return _launch("quantize_nf4_textbook", _quantize_textbook, nf4_thresholds, x, blocksize)


def double_quantize(absmax_K: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.double_quantize: absmax fp32 (K,) -> codes uint8 (K,), nested absmax, offset (1,).

    offset: their mean, where it is known already; else some twenty small launches add it up.
    """
    n, rows = len(absmax_K), -(-len(absmax_K) // NESTED_BLOCKSIZE)
    offset = stable_mean(absmax_K) if offset is None else offset
    codes = torch.empty_like(absmax_K, dtype=torch.uint8)
    nested = absmax_K.new_empty(rows)
    thresholds = table(_nested_thresholds, absmax_K.device)
    arguments = (absmax_K.contiguous(), offset, thresholds, codes, nested, n, rows)
    run("double_quantize_nf4", _double_quantize, lambda ROWS: -(-rows // ROWS), *arguments)
    return codes, nested, offset


def _launch(name: str, kernel, make_table, x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n, blocks = x.numel(), -(-x.numel() // blocksize)
    x_N = x.detach().reshape(-1).contiguous()
    x_N = x_N.float() if x.dtype == torch.float64 else x_N
    words = torch.empty(-(-n // 8), dtype=torch.int32, device=x.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=x.device)
    arguments = (x_N, words, absmax, table(make_table, x.device), n)
    run(name, kernel, lambda VALUES: -(-blocks // max(VALUES // blocksize, 1)), *arguments, BLOCKSIZE=blocksize)
    return words.view(torch.uint8)[: (n + 1) // 2], absmax


def _nested_thresholds() -> Tensor:
    return midpoints(dynamic_map())


def _bin_table() -> Tensor:
    """int64 (32,): each bin's threshold (bits of an fp32; +inf if it has none), and how many lie in lower bins."""
    thresholds = nf4_thresholds()
    sums = (thresholds.double() * 15.5 + 1048592.0).float()  # exact in fp64, then rounded once: what tl.fma does
    bins = (sums.view(torch.int32) >> 3) & 31  # (15,)
    own = torch.full((BINS,), torch.inf, device="cpu").index_put_((bins.long(),), thresholds)
    below = (bins[None, :] < torch.arange(BINS, device="cpu")[:, None]).sum(1)  # (32,)
    return own.view(torch.int32).long() << 32 | below
