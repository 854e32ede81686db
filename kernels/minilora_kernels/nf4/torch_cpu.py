"""NF4 on a CPU without a compiler: the bits of the reference from look-up tables, chunk by chunk.

Eager torch pays for each pass over memory. The work is therefore done in chunks that stay in the
cache, and each look-up moves as much data as possible:

    dequantise   A byte is two codes. Their two fp32 levels are one entry of a table of 256,
                 gathered as a single fp64: 8 bytes in one piece, never used as a number. One
                 multiplication by absmax rounds into the result.
    quantise     [-1, 1] is cut into 33 bins, each narrower than any gap between thresholds, so that
                 a bin holds at most one threshold:
                 code = (thresholds in lower bins) + (x > threshold of the bin)
                 One table of all pairs of bins gives the byte with both codes.
    scales       The same with the first 16 bits of the fp32 value as its bin.

The bin is a monotone function of x, also after rounding. Comparing with the one threshold of the
bin therefore gives exactly the number of all thresholds below x. The comparison is the sign bit of
threshold - x, which is exact, and faster than torch's conversion from fp32 to bool. A 1-D
`index_select` of one wide element is faster than the same gather by rows.

The values after the last full block go to the reference. Buffers live for one call, and threads
share nothing but read-only tables.
"""

from functools import lru_cache

import torch
from torch import Tensor

from minilora_kernels.nf4 import reference
from minilora_kernels.nf4.codebook import dynamic_map, midpoints, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE, TINY

CHUNK = 1 << 18  # values at a time: 1 MiB of fp32; a multiple of 4096, the largest block
BINS = 32  # bins are 1/16 wide; thresholds are 0.0796 apart or more, and 0.004 from a bin's edge


def quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor with the bits of `reference.quantize`.

    Args:
        x: Tensor of n values, of any shape and floating dtype, on the CPU.
        blocksize: Number of values that share one scale.

    Returns:
        The packed codes, uint8 of shape (ceil(n / 2),), and absmax, fp32 of shape (K,) with
        K = ceil(n / blocksize).

    Raises:
        ValueError: If a value is NaN, or infinite in fp32.
    """
    x_N = x.detach().reshape(-1)  # (n,)
    n = x_N.numel()
    n_full = n // blocksize * blocksize  # values in full blocks
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax_K = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    scratch = torch.empty(3, min(CHUNK, n_full), dtype=torch.float32, device="cpu")
    for start in range(0, n_full, CHUNK):
        stop = min(start + CHUNK, n_full)
        values, buffer1, buffer2 = scratch[:, : stop - start].unbind()  # (N',) each
        values.copy_(x_N[start:stop])
        chunk_absmax_K = absmax_K[start // blocksize : stop // blocksize]  # (K',)
        values_KB = values.view(-1, blocksize)  # (K', B)
        buffer_KB = buffer1.view(-1, blocksize)  # (K', B)
        _scale_chunk(values_KB, chunk_absmax_K, buffer_KB)
        if not torch.isfinite(chunk_absmax_K).all():
            reference.raise_not_finite(x)
        _pack_chunk(values, buffer1, buffer2, packed[start // 2 : stop // 2])
    if n_full < n:
        short_block = x_N[n_full:]
        if not torch.isfinite(short_block.float()).all():
            reference.raise_not_finite(x)
        packed[n_full // 2 :], absmax_K[-1:] = reference.quantize(short_block, blocksize)
    return packed, absmax_K


def dequantize(packed: Tensor, absmax_K: Tensor, blocksize: int, out: Tensor) -> None:
    """Write the values to `out`, with the bits of `reference.dequantize`.

    Args:
        packed: Packed codes, uint8 of shape (ceil(n / 2),).
        absmax_K: Scales, fp32 of shape (K,).
        blocksize: Number of values that share one scale.
        out: Contiguous tensor of n values that receives the result, of any shape and floating
            dtype.
    """
    out_N = out.view(-1)  # (n,)
    n = out.numel()
    n_full = n // blocksize * blocksize  # values in full blocks
    levels_of_byte = _levels_of_byte()  # (256,), two fp32 levels each
    levels = torch.empty(min(CHUNK, n_full) // 2, dtype=torch.float64, device="cpu")
    for start in range(0, n_full, CHUNK):
        stop = min(start + CHUNK, n_full)
        chunk_bytes = packed[start // 2 : stop // 2].int()  # (N' / 2,)
        chunk_levels = levels[: (stop - start) // 2]  # (N' / 2,)
        torch.index_select(levels_of_byte, 0, chunk_bytes, out=chunk_levels)
        levels_KB = chunk_levels.view(torch.float32).view(-1, blocksize)  # (K', B)
        scale_K1 = absmax_K[start // blocksize : stop // blocksize, None]  # (K', 1)
        # x' = level[code] * absmax in fp32; the copy rounds once (mul(out=) would cast one by one)
        levels_KB.mul_(scale_K1)
        out_N[start:stop].view(-1, blocksize).copy_(levels_KB)
    if n_full < n:
        short_bytes = packed[n_full // 2 :]
        reference.dequantize(short_bytes, absmax_K[-1:], blocksize, out_N[n_full:])


def double_quantize(absmax_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise scales to 8 bits, with the bits of `reference.double_quantize`.

    Args:
        absmax_K: Scales, fp32 of shape (K,).

    Returns:
        The codes, uint8 of shape (K,); the second-level absmax, fp32 of shape (ceil(K / 256),);
        and the offset, fp32 of shape (1,).
    """
    offset = reference.stable_mean(absmax_K)  # (1,)
    x_KB, nested_absmax = reference.scaled_blocks(absmax_K - offset, NESTED_BLOCKSIZE)
    x_K = x_KB.view(-1)[: absmax_K.numel()]  # (K,)
    return _nested_codes(x_K), nested_absmax, offset


def double_dequantize(codes_K: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Return the scales of double-quantised blocks, with the bits of `reference.double_dequantize`.

    Args:
        codes_K: Codes of the scales, uint8 of shape (K,).
        nested_absmax: Second-level absmax, fp32 of shape (ceil(K / 256),).
        offset: Mean of the scales, fp32 of shape (1,).

    Returns:
        Scales, fp32 of shape (K,).
    """
    absmax_K = torch.index_select(_dynamic_table(), 0, codes_K.int())  # (K,)
    n_full = codes_K.numel() // NESTED_BLOCKSIZE  # full blocks
    full_blocks = absmax_K[: n_full * NESTED_BLOCKSIZE].view(n_full, NESTED_BLOCKSIZE)
    full_blocks.mul_(nested_absmax[:n_full, None])
    short_block = absmax_K[n_full * NESTED_BLOCKSIZE :]  # empty, or the last one
    short_block.mul_(nested_absmax[n_full:])
    return absmax_K.add_(offset)


def _scale_chunk(x_KB: Tensor, absmax_K: Tensor, buffer_KB: Tensor) -> None:
    """Write the absmax of each block, and scale the blocks in place; `buffer_KB` is scratch."""
    torch.abs(x_KB, out=buffer_KB)
    torch.amax(buffer_KB, dim=1, out=absmax_K)
    inverse_K = torch.where(absmax_K < TINY, 0.0, 1 / absmax_K)  # (K',)
    x_KB.mul_(inverse_K[:, None])


def _pack_chunk(x_N: Tensor, bins_N: Tensor, differences_N: Tensor, packed: Tensor) -> None:
    """Write the bytes (N' / 2,) of scaled values (N',); two buffers of fp32 (N',) are scratch.

    The values are in [-1, 1], or one ulp outside.
    """
    threshold_of_bin, byte_of_pair = _bin_tables()
    bins_N = _bin(x_N, bins_N)  # (N',)
    torch.index_select(threshold_of_bin, 0, bins_N, out=differences_N)
    differences_N.sub_(x_N)  # threshold - x
    above_N = differences_N.view(torch.int32).bitwise_right_shift_(
        31
    )  # -1 where x is above, else 0
    half_bins_N = bins_N.sub_(above_N, alpha=64).to(torch.int8)  # bin + 64 if x is above
    pairs_N2 = half_bins_N.view(torch.int16).int()  # (N' / 2,)
    torch.index_select(byte_of_pair, 0, pairs_N2, out=packed)


def _bin(x_N: Tensor, out: Tensor | None = None) -> Tensor:
    """Return round(16 x) + 16 as int32 from 0 to 32, in the memory of `out`.

    Near 2^23, fp32 numbers have no fractions, and their last bits are the integer.
    """
    shift = torch.tensor(2.0**23 + BINS / 2, dtype=torch.float32, device="cpu")
    shifted = torch.add(shift, x_N, alpha=BINS / 2, out=out)  # (N',)
    return shifted.view(torch.int32).bitwise_and_(63)


@lru_cache(maxsize=1)
def _bin_tables() -> tuple[Tensor, Tensor]:
    """Return the threshold of each bin, fp32 (33,), and the byte of each pair, uint8 (32768,).

    A bin without a threshold has +inf. A pair is two int8 numbers `bin + 64 * above`, read as one
    int16.
    """
    bins = _bin(nf4_thresholds())  # (15,)
    threshold_of_bin = torch.full((BINS + 1,), torch.inf, dtype=torch.float32, device="cpu")
    threshold_of_bin.index_put_((bins.long(),), nf4_thresholds())

    keys = torch.arange(128, dtype=torch.int8, device="cpu")  # bin + 64 * above
    key_bins = keys & 63  # (128,)
    lower = (bins < key_bins[:, None]).sum(1)  # (128,), thresholds in lower bins
    codes = lower + (keys >> 6)  # (128,), without meaning for keys that never occur
    first = keys.repeat_interleave(128)  # (16384,)
    second = keys.repeat(128)  # (16384,)
    pairs = torch.stack([first, second], dim=1).view(torch.int16)  # (16384, 1)
    byte_of_pair = torch.zeros(1 << 15, dtype=torch.uint8, device="cpu")
    high = codes[first.long()]  # (16384,)
    low = codes[second.long()]  # (16384,)
    packed = (high << 4 | low).to(torch.uint8)  # (16384,)
    byte_of_pair[pairs.view(-1).long()] = packed
    return threshold_of_bin, byte_of_pair


def _nested_codes(x_K: Tensor) -> Tensor:
    """Return the number of midpoints of the dynamic map below each scaled value, uint8 (K,)."""
    threshold_of_bin, below_of_bin = _nested_bin_tables()
    bins_K = x_K.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)  # (K,)
    above_K = x_K > torch.index_select(threshold_of_bin, 0, bins_K)  # (K,)
    return torch.index_select(below_of_bin, 0, bins_K).add_(above_K)


@lru_cache(maxsize=1)
def _nested_bin_tables() -> tuple[Tensor, Tensor]:
    """Return two tables by the first 16 bits of an fp32 value, (65536,) each.

    The first holds the threshold in the bin, fp32, or +inf. The second holds the number of
    thresholds below the bin, uint8.
    """
    thresholds = midpoints(dynamic_map())  # (255,)
    first_bits = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16  # (65536,)
    ends = torch.stack([first_bits, first_bits | 0xFFFF])  # (2, 65536)
    counts = torch.bucketize(ends.view(torch.float32), thresholds)  # (2, 65536)
    below, through = counts.sort(dim=0).values  # a negative bin has its larger end first
    infinity = thresholds.new_tensor([torch.inf])
    threshold_of_bin = torch.cat([thresholds, infinity])[below]  # (65536,)
    threshold_of_bin = threshold_of_bin.masked_fill(below == through, torch.inf)
    return threshold_of_bin, below.to(torch.uint8)


@lru_cache(maxsize=1)
def _levels_of_byte() -> Tensor:
    """Return the two fp32 levels of every byte as one fp64 (256,), which is never a number."""
    all_bytes = torch.arange(256, dtype=torch.uint8, device="cpu")
    codes = reference.unpack(all_bytes).int()  # (512,)
    return nf4_codebook()[codes].view(torch.float64)  # (256,)


@lru_cache(maxsize=1)
def _dynamic_table() -> Tensor:
    """Return the cached dynamic map, fp32 (256,)."""
    return dynamic_map()
