"""The reference again, fast on a CPU without a compiler: the same bits from table look-ups, a chunk at a time.

Eager torch pays per pass over memory, so work goes in chunks that stay in cache, and each look-up moves much data:

    dequantise   a byte is two codes: their fp32 levels are one entry of a table of 256, gathered as a single fp64
                 (8 bytes in one piece, never a number); one multiplication by absmax rounds into the result
    quantise     [-1, 1] is cut into 33 bins, narrower than any gap between thresholds, so a bin holds one at most:
                 code = (thresholds in lower bins) + (x > the bin's own threshold)
                 the first term is read, with the packing of two codes, from a table of all pairs
    scales       likewise, the first 16 bits of an fp32 value being its bin

`bin` is monotone under rounding, so comparing with one threshold gives exactly the count of all; the comparison is
the sign bit of t - x, which is exact, and faster than torch's fp32 -> bool. A 1-D `index_select` on one wide element
is faster than the same gather by rows. What is left over after the last whole block runs in the
reference. Buffers live for one call; nothing is shared between threads but read-only tables.
"""

from functools import lru_cache

import torch
from torch import Tensor

from minilora_kernels.nf4 import reference
from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE, TINY

CHUNK = 1 << 18  # values at a time: 1 MiB of fp32; any multiple of 4096, the largest block
BINS = 32  # steps of the bins, 1/16 wide; thresholds are 0.0796 apart or more, and 0.004 from a bin's edge


def quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize: any floating tensor -> packed uint8 (ceil(n/2),), absmax fp32 (K,)."""
    x_N = x.detach().reshape(-1)
    n, whole = x_N.numel(), x_N.numel() // blocksize * blocksize
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax_K = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    scratch = torch.empty(3, min(CHUNK, whole), dtype=torch.float32, device="cpu")
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        values, second, third = scratch[:, : stop - start].unbind()  # (N',) each
        x_KB = values.copy_(x_N[start:stop]).view(-1, blocksize)  # (K', B)
        magnitudes = torch.abs(x_KB, out=second.view(-1, blocksize))
        scale_K = torch.amax(magnitudes, dim=1, out=absmax_K[start // blocksize : stop // blocksize])
        if not torch.isfinite(scale_K).all():
            reference.raise_not_finite(x)
        x_KB.mul_(torch.where(scale_K < TINY, 0.0, 1 / scale_K)[:, None])
        _pack_chunk(values, second, third, packed[start // 2 : stop // 2])
    if whole < n:
        if not torch.isfinite(x_N[whole:].float()).all():
            reference.raise_not_finite(x)
        packed[whole // 2 :], absmax_K[-1:] = reference.quantize(x_N[whole:], blocksize)
    return packed, absmax_K


def dequantize(packed: Tensor, absmax_K: Tensor, blocksize: int, out: Tensor) -> None:
    """As reference.dequantize, written to `out` (contiguous, any shape and floating dtype)."""
    out_N, n, whole = out.view(-1), out.numel(), out.numel() // blocksize * blocksize
    levels_of_byte = _levels_of_byte()  # (256,), each two fp32
    levels = torch.empty(min(CHUNK, whole) // 2, dtype=torch.float64, device="cpu")
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        bytes_N2 = packed[start // 2 : stop // 2].int()
        levels_N2 = torch.index_select(levels_of_byte, 0, bytes_N2, out=levels[: (stop - start) // 2])
        scale_K = absmax_K[start // blocksize : stop // blocksize, None]  # (K', 1)
        # x' = level[code] * absmax in fp32, rounded once as it is stored; mul(out=) would cast value by value
        out_N[start:stop].view(-1, blocksize).copy_(levels_N2.view(torch.float32).view(-1, blocksize).mul_(scale_K))
    if whole < n:
        reference.dequantize(packed[whole // 2 :], absmax_K[-1:], blocksize, out_N[whole:])


def double_quantize(absmax_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.double_quantize: absmax fp32 (K,) -> codes uint8 (K,), nested absmax (ceil(K/256),), offset (1,)."""
    offset = reference.stable_mean(absmax_K)
    x_KB, nested_absmax = reference.scaled_blocks(absmax_K - offset, NESTED_BLOCKSIZE)
    return _nested_codes(x_KB.view(-1)[: absmax_K.numel()]), nested_absmax, offset


def double_dequantize(codes_K: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """As reference.double_dequantize: 8-bit codes (K,) -> absmax fp32 (K,)."""
    absmax_K = torch.index_select(_dynamic_table(), 0, codes_K.int())
    whole = codes_K.numel() // NESTED_BLOCKSIZE
    absmax_K[: whole * NESTED_BLOCKSIZE].view(whole, NESTED_BLOCKSIZE).mul_(nested_absmax[:whole, None])
    absmax_K[whole * NESTED_BLOCKSIZE :].mul_(nested_absmax[whole:])
    return absmax_K.add_(offset)


def _nested_codes(x_K: Tensor) -> Tensor:
    """Scaled values, fp32 (K,) in [-1, 1] -> uint8 (K,): how many midpoints of the dynamic map are below."""
    threshold_of_bin, below_of_bin = _nested_bin_tables()
    bins_K = x_K.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    above_K = x_K > torch.index_select(threshold_of_bin, 0, bins_K)
    return torch.index_select(below_of_bin, 0, bins_K).add_(above_K)


def _pack_chunk(x_N: Tensor, bins_N: Tensor, differences_N: Tensor, packed: Tensor) -> None:
    """Scaled values, fp32 (N',) in [-1, 1] give or take an ulp -> bytes (N' / 2,); two more fp32 (N',) as scratch."""
    threshold_of_bin, byte_of_pair = _bin_tables()
    bins_N = _bin(x_N, bins_N)
    torch.index_select(threshold_of_bin, 0, bins_N, out=differences_N).sub_(x_N)  # t - x
    above_N = differences_N.view(torch.int32).bitwise_right_shift_(31)  # -1 where x > t, else 0
    half_bins_N = bins_N.sub_(above_N, alpha=64).to(torch.int8)  # bin + 64 (x > t)
    torch.index_select(byte_of_pair, 0, half_bins_N.view(torch.int16).int(), out=packed)


def _bin(x_N: Tensor, out: Tensor | None = None) -> Tensor:
    """round(16 x) + 16, int32 0..32, in `out`: near 2^23 fp32 has no fractions, and its last bits are the integer."""
    shift = torch.tensor(2.0**23 + BINS / 2, device="cpu")
    return torch.add(shift, x_N, alpha=BINS / 2, out=out).view(torch.int32).bitwise_and_(63)


@lru_cache(maxsize=1)
def _bin_tables() -> tuple[Tensor, Tensor]:
    """Per bin its threshold or +inf, fp32 (33,); per two int8 `bin + 64 above`, read as one int16, a byte (32768,)."""
    bins = _bin(nf4_thresholds())  # (15,)
    threshold_of_bin = torch.full((BINS + 1,), torch.inf, device="cpu").index_put_((bins.long(),), nf4_thresholds())
    every = torch.arange(128, dtype=torch.int8, device="cpu")  # bin + 64 above
    codes = (bins < (every[:, None] & 63)).sum(1) + (every >> 6)  # (128,); meaningless where no such bin exists
    first, second = every.repeat_interleave(128), every.repeat(128)  # (16384,)
    byte_of_pair = torch.zeros(1 << 15, dtype=torch.uint8, device="cpu")
    pair = torch.stack([first, second], dim=1).view(torch.int16).view(-1).long()
    byte_of_pair[pair] = (codes[first.long()] << 4 | codes[second.long()]).to(torch.uint8)
    return threshold_of_bin, byte_of_pair


@lru_cache(maxsize=1)
def _nested_bin_tables() -> tuple[Tensor, Tensor]:
    """Per first 16 bits of an fp32 value: their threshold or +inf, fp32; how many lie below, uint8 (65536,)."""
    thresholds = reference.midpoints(dynamic_map())  # (255,)
    first = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([first, first | 0xFFFF]).view(torch.float32)  # of each bin, the larger first if negative
    below, through = torch.bucketize(ends, thresholds).sort(dim=0).values
    threshold_of_bin = torch.cat([thresholds, thresholds.new_tensor([torch.inf])])[below]
    return threshold_of_bin.masked_fill(below == through, torch.inf), below.to(torch.uint8)


@lru_cache(maxsize=1)
def _levels_of_byte() -> Tensor:
    """The two fp32 levels of every byte, as one fp64 (256,): 8 bytes in one piece, never used as a number."""
    every = torch.arange(256, dtype=torch.uint8, device="cpu")
    return nf4_codebook()[reference.unpack(every).int()].view(torch.float64)


@lru_cache(maxsize=1)
def _dynamic_table() -> Tensor:
    return dynamic_map()
