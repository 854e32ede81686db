"""Where the numbers of NF4 come from: 16 levels, 15 thresholds, and the 8-bit map of double quantisation.

Pre-trained weights are close to normal, so NF4 puts its 16 levels at quantiles of N(0, 1), densest where weights are
(QLoRA §3, eq. 4), then divides by the largest so that they span [-1, 1]; an exact 0 keeps zeros zero:

    level = Q(p) / Q(p_max)      Q = inverse normal CDF, p_max = 0.9677083
    8 positive levels: p = linspace(p_max, 0.5, 9) without 0.5        0 is a level of its own
    7 negative levels: p = linspace(p_max, 0.5, 8) without 0.5, mirrored

The dynamic map is the 8-bit code of the scales (reference.py) and of 8-bit AdamW's moments. It spends its 256 codes on
7 decades: decade i (10^(i-7) .. 10^(i-6)) has 2^i values of each sign, or, of a moment never negative, 2^(i+1).

Everything is derived, in the one order of roundings that gives bitsandbytes' numbers bit for bit: fp32 `linspace`,
quantiles rounded to fp32 *before* the division, and p_max cut to seven decimals (the exact mean of 1 - 1/32 and
1 - 1/30 would change 12 of the 16 levels). Plain tuples are cached, not tensors: a cached tensor could be
changed by its caller, or be born on "meta" inside `with torch.device("meta")`.
"""

from functools import lru_cache

import torch
from torch import Tensor

P_MAX = 0.9677083  # bitsandbytes' literal for 1 - (1/32 + 1/30) / 2 = 0.96770833...


def nf4_codebook() -> Tensor:
    """The 16 NF4 levels, ascending, -1 to 1 with an exact 0 at index 7: fp32 (16,)."""
    return torch.tensor(_nf4_levels(), dtype=torch.float32, device="cpu")


def nf4_thresholds() -> Tensor:
    """The 15 midpoints between neighbouring levels, in fp32: code = number of thresholds below x. fp32 (15,)."""
    return midpoints(nf4_codebook())


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type, ascending, 0 at index 127, unsigned at 0: fp32 (256,)."""
    return torch.tensor(_dynamic_values(signed), dtype=torch.float32, device="cpu")


def midpoints(levels: Tensor) -> Tensor:
    """(level[i] + level[i+1]) / 2 in fp32: (n,) -> (n - 1,)."""
    return (levels[:-1] + levels[1:]) / 2


@lru_cache(maxsize=1)
def _nf4_levels() -> tuple[float, ...]:
    def quantiles(steps: int) -> Tensor:
        p = torch.linspace(P_MAX, 0.5, steps, dtype=torch.float32, device="cpu")[:-1]  # (steps - 1,)
        return torch.special.ndtri(p.double()).float()

    levels = torch.cat([-quantiles(8), torch.zeros(1, device="cpu"), quantiles(9)]).sort().values  # (16,)
    return tuple((levels / levels.max()).tolist())


@lru_cache(maxsize=2)
def _dynamic_values(signed: bool) -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32, device="cpu")
        means = midpoints(edges) * 10 ** (i - 6)  # (2^i,) or (2^(i+1),)
        values += means.tolist() + (-means).tolist() * signed
    return tuple(sorted(values))
