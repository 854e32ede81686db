"""NF4, the specification: quantise, pack, dequantise, double-quantise in plain torch, without a trick.

Every other path (torch_cpu.py, the Triton kernels) must give these bits. QLoRA §3; x is cut into blocks of B values:

    absmax[k] = max |x| in block k            code = number of thresholds below x * (1 / absmax[k])
    x' = level[code] * absmax[k]              both in fp32; x' is rounded once, to the dtype asked for

Double quantisation stores the absmax themselves in 8 bits, again blockwise, 256 to a block. With B = 64 an fp32 absmax
costs 32 / 64 = 0.5 bits a weight, its code and a share of a2 8 / 64 + 32 / (64 * 256) = 0.127:

    d[k] = absmax[k] - offset                 offset = mean(absmax)
    a2[j] = max |d| in block j                code = number of dynamic-map midpoints below d * (1 / a2[j])
    absmax'[k] = map[code] * a2[j] + offset   multiply, round, add, round

Layout: the tensor is flattened row-major and blocks run over row ends; the last one may be short. Two codes share a
byte, the first in the high nibble; an odd end is padded with code 7, the level 0. A tie takes the lower code.
Differs from bitsandbytes in three corners: its last short block divides instead of multiplying by the reciprocal
(may change an fp32 code on a threshold), an all-zero short block stores absmax 1e-38, and its CPU kernel rounds the
8-bit codes through a coarse table.

Names: _N per element, _K per block, _KB per block and element.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, midpoints, nf4_codebook, nf4_thresholds

NESTED_BLOCKSIZE = 256  # absmax values that share one second-level scale
TINY = 2.0**-126  # smallest normal fp32: below it 1/absmax may overflow, and the block is taken as zero


def quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Any floating tensor of n values -> packed uint8 (ceil(n/2),), absmax fp32 (K,), K = ceil(n/blocksize).

    Raises ValueError for NaN and for what is infinite in fp32.
    """
    x_N = x.detach().reshape(-1).float()
    codes_KB, absmax_K = _quantize_blocks(x_N, nf4_thresholds(), blocksize)
    if not torch.isfinite(absmax_K).all():
        raise_not_finite(x)
    n_even = x_N.numel() + x_N.numel() % 2  # blocksize is even, so an odd end is followed by a padded zero: code 7
    return pack(codes_KB.reshape(-1)[:n_even]), absmax_K


def dequantize(packed: Tensor, absmax_K: Tensor, blocksize: int, out: Tensor) -> None:
    """packed (ceil(n/2),), absmax fp32 (K,) -> `out` of n values: level[code] * absmax in fp32, rounded once."""
    n = out.numel()
    levels_N = nf4_codebook().to(packed.device)[unpack(packed)[:n].int()]  # (n,)
    out.copy_((levels_N * absmax_K.repeat_interleave(blocksize)[:n]).view(out.shape))


def raise_not_finite(x: Tensor) -> None:
    """Raises ValueError with the first index of x that is NaN, or infinite in fp32."""
    first = int((~torch.isfinite(x.detach().reshape(-1).float())).nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), x.shape))
    raise ValueError(
        f"quantize_nf4: expected values that are finite in fp32, got {x[index].item()} at index {index} of a tensor "
        f"of shape {tuple(x.shape)}; the source is damaged, or needs torch.nan_to_num first"
    )


def pack(codes_N: Tensor) -> Tensor:
    """Codes 0..15, uint8 (2m,) -> bytes (m,), the first of each pair in the high nibble."""
    return codes_N[0::2] << 4 | codes_N[1::2]


def unpack(packed: Tensor) -> Tensor:
    """Bytes (m,) -> codes 0..15, uint8 (2m,)."""
    return torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)


def double_quantize(absmax_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 (K,) -> codes uint8 (K,), second-level absmax fp32 (ceil(K/256),), offset fp32 (1,)."""
    offset = stable_mean(absmax_K)
    codes_KB, nested_absmax = _quantize_blocks(absmax_K - offset, midpoints(dynamic_map()), NESTED_BLOCKSIZE)
    return codes_KB.reshape(-1)[: absmax_K.numel()].clone(), nested_absmax, offset


def double_dequantize(codes_K: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Codes uint8 (K,), second-level absmax (ceil(K/256),), offset (1,) -> absmax fp32 (K,)."""
    scales_K = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes_K.numel()]
    return dynamic_map().to(codes_K.device)[codes_K.int()] * scales_K + offset


def stable_mean(x: Tensor) -> Tensor:
    """The fp64 mean rounded to fp32, (1,): the same bits on any device and with any number of threads.

    `torch.mean` is not: each thread sums its own part. Halving the vector with element-wise additions fixes the order.
    """
    count, width = x.numel(), 1 << max(x.numel() - 1, 0).bit_length()
    sums = F.pad(x.double(), (0, width - count))  # (2^m,)
    while sums.numel() > 1:
        half = sums.numel() // 2
        sums = sums[:half] + sums[half:]
    return (sums / torch.full_like(sums, max(count, 1))).float()  # (1,); CUDA would multiply by 1 / a Python number


def _quantize_blocks(x_N: Tensor, thresholds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """fp32 (n,) -> codes uint8 (K, B), absmax fp32 (K,)."""
    x_KB, absmax_K = scaled_blocks(x_N, blocksize)
    codes_KB = torch.bucketize(x_KB, thresholds.to(x_N.device), out_int32=True)
    return codes_KB.to(torch.uint8), absmax_K


def scaled_blocks(x_N: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """fp32 (n,) -> x / absmax (K, B) and absmax (K,); the last block is filled up with zeros."""
    x_KB = F.pad(x_N, (0, -x_N.numel() % blocksize)).view(-1, blocksize)  # (K, B)
    absmax_K = x_KB.abs().amax(dim=1)
    inverse_K = torch.where(absmax_K < TINY, 0.0, 1 / absmax_K)
    # no clamp to [-1, 1]: rounding can pass 1 by one ulp only, and every threshold is further in
    return x_KB * inverse_K[:, None], absmax_K
