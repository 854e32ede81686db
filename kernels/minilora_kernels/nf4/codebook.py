"""NF4 codebook: 16 levels, 15 thresholds, and the 8-bit map of double quantisation.

Pre-trained weights are close to normally distributed. NF4 therefore puts its 16 levels at quantiles
of N(0, 1), which are densest near zero, where most weights are (QLoRA §3, eq. 4). The levels are
divided by the largest one, so that they span [-1, 1]. An exact 0 keeps zeros zero:

    level = Q(p) / Q(p_max)      Q = inverse of the normal CDF, p_max = 0.9677083
    8 positive levels: p = linspace(p_max, 0.5, 9) without 0.5        0 is a level as well
    7 negative levels: p = linspace(p_max, 0.5, 8) without 0.5, mirrored

p_max is the number of bitsandbytes. 1 - 1/32 and 1 - 1/30 are the centres of the outermost of 16
and of 15 equal parts of [0, 1]; p_max is their mean.

The dynamic map is the 8-bit code of the scales (reference.py) and of the moments of 8-bit AdamW. It
spreads its 256 codes over 7 decades. Decade i, from 10^(i-7) to 10^(i-6), has 2^i values of each
sign. The unsigned map, for a moment that is never negative, has 2^(i+1) values in decade i.

All values are computed here, not copied. The order of the roundings is the one that gives the
numbers of bitsandbytes bit for bit: `linspace` in fp32, quantiles rounded to fp32 *before* the
division, and p_max cut to seven decimals (the exact mean would change 12 of the 16 levels). Both
tables are the same on every machine.

The caches hold tuples, not tensors. A caller could change a cached tensor, and inside
`with torch.device("meta")` a tensor would be created without values.
"""

from functools import lru_cache

import torch
from torch import Tensor

P_MAX = 0.9677083  # the literal of bitsandbytes for 1 - (1/32 + 1/30) / 2 = 0.96770833...


def nf4_codebook() -> Tensor:
    """Return the 16 NF4 levels.

    Returns:
        Levels in ascending order from -1 to 1, with an exact 0 at index 7, fp32 of shape (16,).

    Source: QLoRA (arXiv:2305.14314) §3, eq. 4; the values are those of bitsandbytes.
    """
    return torch.tensor(_nf4_levels(), dtype=torch.float32, device="cpu")


def nf4_thresholds() -> Tensor:
    """Return the 15 midpoints between neighbouring levels: code = number of thresholds below x.

    Returns:
        Thresholds in ascending order, fp32 of shape (15,).
    """
    return midpoints(nf4_codebook())


def dynamic_map(signed: bool = True) -> Tensor:
    """Return the 256 values of the dynamic 8-bit type of bitsandbytes.

    Args:
        signed: True (the default) for values between -1 and 1, without -1, with 0 at index 127.
            False for values from 0 to 1 with 0 at index 0.

    Returns:
        Values in ascending order, fp32 of shape (256,).

    Source: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861) §1.3.
    """
    return torch.tensor(_dynamic_values(signed), dtype=torch.float32, device="cpu")


def midpoints(levels: Tensor) -> Tensor:
    """Return the midpoints (level[i] + level[i+1]) / 2.

    Args:
        levels: Values in ascending order, fp32 of shape (n,).

    Returns:
        Midpoints, computed in fp32, of shape (n - 1,).
    """
    return (levels[:-1] + levels[1:]) / 2


@lru_cache(maxsize=1)
def _nf4_levels() -> tuple[float, ...]:
    """Compute the 16 levels."""
    positive = _normal_quantiles(9)  # (8,)
    negative = -_normal_quantiles(8)  # (7,)
    zero = torch.zeros(1, dtype=torch.float32, device="cpu")
    levels = torch.cat([negative, zero, positive]).sort().values  # (16,)
    levels = levels / levels.max()  # (16,)
    return tuple(levels.tolist())


def _normal_quantiles(steps: int) -> Tensor:
    """Return the quantiles of N(0, 1) at `steps` equal steps from P_MAX to 0.5, without 0.5."""
    p = _linspace(P_MAX, 0.5, steps)[:-1]  # (steps - 1,)
    return torch.special.ndtri(p.double()).float()  # (steps - 1,)


def _linspace(start: float, end: float, steps: int) -> Tensor:
    """Return `steps` equally spaced fp32 values, with one rounding each, on every machine.

    The first half is counted from the start and the second half from the end. torch.linspace rounds
    in the same way where the processor multiplies and adds in one instruction (AVX2, AVX-512, ARM).
    Elsewhere it rounds twice, which changes up to 12 of 65 values in the last bit.
    """
    first = torch.tensor(start, dtype=torch.float32, device="cpu")
    last = torch.tensor(end, dtype=torch.float32, device="cpu")
    step = ((last - first) / (steps - 1)).double()
    index = torch.arange(steps, dtype=torch.float64, device="cpu")  # (steps,)
    from_start = first.double() + step * index  # (steps,), exact in fp64 up to 2^-52
    from_end = last.double() - step * (steps - 1 - index)  # (steps,)
    return torch.where(index < steps // 2, from_start, from_end).float()  # (steps,)


@lru_cache(maxsize=2)
def _dynamic_values(signed: bool) -> tuple[float, ...]:
    """Compute the 256 values of the dynamic map: 0, 1, and the values of seven decades."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        if not signed:
            count *= 2
        edges = _linspace(0.1, 1.0, count + 1)  # (count + 1,)
        means = midpoints(edges) * 10 ** (decade - 6)  # (count,)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return tuple(sorted(values))
