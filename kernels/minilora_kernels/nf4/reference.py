"""Specification of NF4: quantise, pack, dequantise and double-quantise in plain torch.

Every other implementation (torch_cpu.py, c/, the Triton kernels) must give the same bits. The
tensor x is cut into blocks of B values that share one scale, absmax (QLoRA §3, arXiv:2305.14314):

    absmax[k] = max |x| in block k            code = number of thresholds below x * (1 / absmax[k])
    x' = level[code] * absmax[k]              in fp32; x' is rounded once, to the requested dtype

Double quantisation stores the absmax values themselves in 8 bits, in blocks of 256. With B = 64 an
fp32 absmax costs 32 / 64 = 0.5 bits per weight. Its 8-bit code and its share of a2 cost
8 / 64 + 32 / (64 * 256) = 0.127 bits per weight:

    d[k] = absmax[k] - offset                 offset = mean(absmax)
    a2[j] = max |d| in block j                code = number of map midpoints below d * (1 / a2[j])
    absmax'[k] = map[code] * a2[j] + offset   multiply, round, add, round

Layout: the tensor is flattened in row-major order, and blocks continue across the ends of rows. The
last block may be short. Two codes share a byte, and the first one is in the high nibble. An odd
number of codes is padded with code 7, the level 0. A tie takes the lower code.

The result differs from bitsandbytes in three cases. bitsandbytes divides in a last short block
instead of multiplying by the reciprocal, which can change a code for an fp32 value on a threshold;
it stores absmax 1e-38 for a short block of zeros; and its CPU kernel rounds the 8-bit codes through
a coarse table.

Names: the suffix _N means one entry per value, _K one per block, _KB a matrix of blocks by values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, midpoints, nf4_codebook, nf4_thresholds

NESTED_BLOCKSIZE = 256  # absmax values that share one second-level scale
TINY = 2.0**-126  # smallest normal fp32; below it 1 / absmax may overflow: the block counts as zero


def quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to packed NF4 codes and one scale per block.

    Args:
        x: Tensor of n values, of any shape and floating dtype.
        blocksize: Number of values B that share one scale, even.

    Returns:
        The packed codes, uint8 of shape (ceil(n / 2),), and absmax, fp32 of shape (K,) with
        K = ceil(n / blocksize).

    Raises:
        ValueError: If a value is NaN, or infinite in fp32.
    """
    x_N = x.detach().reshape(-1).float()  # (n,)
    codes_KB, absmax_K = _quantize_blocks(x_N, nf4_thresholds(), blocksize)
    if not torch.isfinite(absmax_K).all():
        raise_not_finite(x)
    # blocksize is even: if n is odd, the next code is that of a padded zero, which is 7
    n = x_N.numel()
    n_even = n + n % 2
    codes_N = codes_KB.reshape(-1)[:n_even]  # (n or n + 1,)
    return pack(codes_N), absmax_K


def dequantize(packed: Tensor, absmax_K: Tensor, blocksize: int, out: Tensor) -> None:
    """Write x' = level[code] * absmax to `out`, computed in fp32 and rounded once.

    Args:
        packed: Packed codes, uint8 of shape (ceil(n / 2),).
        absmax_K: Scales, fp32 of shape (K,).
        blocksize: Number of values that share one scale.
        out: Tensor of n values that receives the result, of any shape and floating dtype.
    """
    n = out.numel()
    codes_N = unpack(packed)[:n].int()  # (n,)
    levels = nf4_codebook().to(packed.device)  # (16,)
    levels_N = levels[codes_N]  # (n,)
    scales_N = absmax_K.repeat_interleave(blocksize)[:n]  # (n,)
    out.copy_((levels_N * scales_N).view(out.shape))


def raise_not_finite(x: Tensor) -> None:
    """Raise the error for a tensor that has a value which is not finite.

    Args:
        x: Tensor with at least one value that is NaN, or infinite in fp32.

    Raises:
        ValueError: Always, with the index of the first such value.
    """
    x_N = x.detach().reshape(-1).float()  # (n,)
    bad_N = ~torch.isfinite(x_N)  # (n,)
    first = bad_N.nonzero()[0, 0].cpu()
    index = tuple(int(i) for i in torch.unravel_index(first, x.shape))
    raise ValueError(
        f"quantize_nf4: expected values that are finite in fp32, got {x[index].item()} at index "
        f"{index} of a tensor of shape {tuple(x.shape)}; the source is damaged, or it needs "
        "torch.nan_to_num first"
    )


def pack(codes_N: Tensor) -> Tensor:
    """Pack pairs of codes into bytes.

    Args:
        codes_N: Codes from 0 to 15, uint8 of shape (2m,).

    Returns:
        Bytes with the first code of each pair in the high nibble, uint8 of shape (m,).
    """
    return codes_N[0::2] << 4 | codes_N[1::2]


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes into pairs of codes.

    Args:
        packed: Bytes, uint8 of shape (m,).

    Returns:
        Codes from 0 to 15, uint8 of shape (2m,).
    """
    high = packed >> 4  # (m,)
    low = packed & 0xF  # (m,)
    return torch.stack([high, low], dim=1).reshape(-1)


def double_quantize(absmax_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the scales themselves to 8 bits.

    Args:
        absmax_K: Scales, fp32 of shape (K,).

    Returns:
        The codes, uint8 of shape (K,); the second-level absmax, fp32 of shape (ceil(K / 256),);
        and the offset, fp32 of shape (1,).
    """
    offset = stable_mean(absmax_K)  # (1,)
    thresholds = midpoints(dynamic_map())  # (255,)
    codes_KB, nested_absmax = _quantize_blocks(absmax_K - offset, thresholds, NESTED_BLOCKSIZE)
    codes_K = codes_KB.reshape(-1)[: absmax_K.numel()]  # (K,)
    return codes_K.clone(), nested_absmax, offset


def double_dequantize(codes_K: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Return the scales of double-quantised blocks: absmax' = map[code] * a2 + offset.

    Args:
        codes_K: Codes of the scales, uint8 of shape (K,).
        nested_absmax: Second-level absmax a2, fp32 of shape (ceil(K / 256),).
        offset: Mean of the scales, fp32 of shape (1,).

    Returns:
        Scales, fp32 of shape (K,).
    """
    scales_K = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes_K.numel()]  # (K,)
    map_values = dynamic_map().to(codes_K.device)  # (256,)
    values_K = map_values[codes_K.int()]  # (K,)
    return values_K * scales_K + offset


def stable_mean(x: Tensor) -> Tensor:
    """Return a mean that has the same bits on every device and with every number of threads.

    `torch.mean` adds in an order that depends on the number of threads. Here the vector is halved
    by element-wise additions until one sum is left, which fixes the order.

    Args:
        x: Values, fp32 of shape (n,).

    Returns:
        The fp64 mean rounded to fp32, of shape (1,).
    """
    count = x.numel()
    width = 1 << max(count - 1, 0).bit_length()  # the smallest power of two >= count
    sums = F.pad(x.double(), (0, width - count))  # (width,)
    while sums.numel() > 1:
        half = sums.numel() // 2
        sums = sums[:half] + sums[half:]  # (half,)
    # divide by a tensor: by a Python number CUDA would multiply with the reciprocal
    divisor = torch.full_like(sums, max(count, 1))  # (1,)
    return (sums / divisor).float()  # (1,)


def scaled_blocks(x_N: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Divide a tensor into blocks and scale each one by 1 / absmax.

    Args:
        x_N: Values, fp32 of shape (n,).
        blocksize: Number of values B in a block.

    Returns:
        The scaled blocks x * (1 / absmax), fp32 of shape (K, B), where zeros fill the last block;
        and absmax, fp32 of shape (K,).
    """
    missing = -x_N.numel() % blocksize  # values to the end of the last block
    x_KB = F.pad(x_N, (0, missing)).view(-1, blocksize)  # (K, B)
    absmax_K = x_KB.abs().amax(dim=1)  # (K,)
    inverse_K = torch.where(absmax_K < TINY, 0.0, 1 / absmax_K)  # (K,)
    # no clamp to [-1, 1]: rounding can exceed 1 by one ulp, and every threshold is well below 1
    return x_KB * inverse_K[:, None], absmax_K


def _quantize_blocks(x_N: Tensor, thresholds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 (K, B), and absmax, fp32 (K,), of fp32 values (n,)."""
    x_KB, absmax_K = scaled_blocks(x_N, blocksize)
    codes_KB = torch.bucketize(x_KB, thresholds.to(x_N.device), out_int32=True)  # (K, B)
    return codes_KB.to(torch.uint8), absmax_K
