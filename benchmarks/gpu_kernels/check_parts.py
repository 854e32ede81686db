"""Shared parts of the kernel checks: sample numbers, and comparisons of bits and within bounds."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora_kernels import nf4_thresholds

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = (4096, 4096)  # an additional shape on a GPU
Run = Callable[..., Any]


class Mismatch(Exception):
    """A wrong result of a kernel. The message gives the first wrong position."""


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the same weights of this shape at every call, on the CPU, special values first."""
    x = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0)) * 0.02
    edges = nf4_thresholds()
    below = torch.nextafter(edges, torch.full_like(edges, -1.0))
    above = torch.nextafter(edges, torch.full_like(edges, 1.0))
    # Triton's interpreter misreads subnormal bf16, so only fp32 has tiny values.
    tiny = x[:64] * (2.0**-126 if dtype == torch.float32 else 0)
    # whole blocks of 64; the scale of the last block is 1
    special = torch.cat([torch.zeros(64), tiny, edges, below, above, torch.ones(19)])
    x[: len(special)] = special[: len(x)]
    return x.to(dtype).view(shape)


def same_bits(label: str, got: Tensor, expected: Tensor) -> None:
    """Raise Mismatch unless both have the same bits; a negative zero differs from a zero."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    got, expected = got.cpu().reshape(-1), expected.reshape(-1)
    if (got.dtype, len(got)) != (expected.dtype, len(expected)):
        raise Mismatch(
            f"{label}: {len(got)} of {got.dtype}, expected {len(expected)} of {expected.dtype}"
        )
    wrong = (got.view(bits) != expected.view(bits)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        values = f"got {got[i].item()!r}, expected {expected[i].item()!r}"
        raise Mismatch(
            f"{label}: {len(wrong)} of {len(got)} differ from the reference, first [{i}]: {values}"
        )


def within(label: str, got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Raise Mismatch unless `got` differs from `expected` by at most `bound`."""
    got, expected, bound = got.cpu().double().reshape(-1), expected.reshape(-1), bound.reshape(-1)
    error = (got - expected).abs()
    wrong = (~(error <= bound)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise Mismatch(
            f"{label}: {len(wrong)} of {len(got)} are off, first [{i}]: got {got[i].item()!r}, "
            f"expected {expected[i].item()!r} ± {bound[i].item():.2g}"
        )
