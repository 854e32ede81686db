"""What the checks of kernels share: numbers to check with, bits compared, bounds held (kernel_check.py)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora_kernels import nf4_thresholds

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = (4096, 4096)  # on a GPU on top
Run = Callable[..., Any]


class Mismatch(Exception):
    """A kernel's result is not what it must be; says where first."""


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of this shape on the CPU, always the same, with what is special in front."""
    x = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0)) * 0.02
    edges = nf4_thresholds()
    beside = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-1.0, 1.0)]
    tiny = x[:64] * (
        2.0**-126 if dtype == torch.float32 else 0
    )  # Triton's interpreter misreads subnormal bf16
    special = torch.cat(
        [torch.zeros(64), tiny, edges, *beside, torch.ones(19)]
    )  # blocks; the last is scaled by 1
    x[: len(special)] = special[: len(x)]
    return x.to(dtype).view(shape)


def same_bits(what: str, got: Tensor, expected: Tensor) -> None:
    """Raises Mismatch unless both hold the same bits; a negative zero is not a zero."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    got, expected = got.cpu().reshape(-1), expected.reshape(-1)
    if (got.dtype, len(got)) != (expected.dtype, len(expected)):
        raise Mismatch(
            f"{what}: {len(got)} of {got.dtype}, expected {len(expected)} of {expected.dtype}"
        )
    wrong = (got.view(bits) != expected.view(bits)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        values = f"got {got[i].item()!r}, expected {expected[i].item()!r}"
        raise Mismatch(
            f"{what}: {len(wrong)} of {len(got)} differ from the reference, first [{i}]: {values}"
        )


def within(what: str, got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Raises Mismatch unless got is `expected` give or take `bound`."""
    got, expected, bound = got.cpu().double().reshape(-1), expected.reshape(-1), bound.reshape(-1)
    error = (got - expected).abs()
    wrong = (~(error <= bound)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise Mismatch(
            f"{what}: {len(wrong)} of {len(got)} are off, first [{i}]: got {got[i].item()!r}, expected "
            f"{expected[i].item()!r} give or take {bound[i].item():.2g}"
        )
