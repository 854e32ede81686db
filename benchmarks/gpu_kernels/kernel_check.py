"""Are the kernels right? Every one against the reference, before kernel_bench.py times any.

    check_all(torch.device("cuda"))         # or "cpu", if TRITON_INTERPRET=1 made Triton interpret; raises Mismatch

    dequantise, quantise, second level      the reference's bits, computed on the CPU
    GEMV, any x                             |y - W x| <= n u sum_k |W x_k|, the bound on any order of n roundings
    GEMV, x = one 1 among zeros             a column of W exactly: a wrong element cannot hide in the bound
    few tokens                              both of these
    what a layer, a head and AdamW do       step_check.py

The shapes end in the middle of a block, of a word and of a byte; the weights hold a block of zeros,
one below fp32's normal numbers, and every threshold with its neighbours. On a GPU a large matrix
comes on top, where many programs run.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.gpu_kernels import step_check
from benchmarks.gpu_kernels.check_parts import DTYPES, LARGE, Run, same_bits, sample, within
from minilora_kernels.nf4 import reference
from minilora_kernels.triton import nf4_dequantize, nf4_gemv, nf4_matmul, nf4_quantize

CASES = (((7, 129), 64), ((13, 1056), 32), ((24, 576), 64), ((2, 4100), 4096))  # shape, blocksize


def check_all(device: torch.device) -> list[str]:
    """The kernels checked, by their names in launch.TILES. Raises Mismatch at the first that fails."""
    for name, check in CHECKS.items():
        check(name, device)
    return list(CHECKS)


def cases(device: torch.device) -> list[tuple[tuple[int, ...], int]]:
    """(shape, blocksize) to check on this device."""
    return [*CASES, (LARGE, 64)] if device.type == "cuda" else [*CASES]


# what the reference says of sample(shape) on the CPU; kept, since tuning checks tile after tile


@cache
def codes_of(
    shape: tuple[int, ...], blocksize: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """packed, absmax."""
    return reference.quantize(sample(shape, dtype), blocksize)


@cache
def parts_of(shape: tuple[int, ...], blocksize: int, double: bool) -> tuple[Tensor | None, ...]:
    """packed, scales, nested_absmax, offset."""
    packed, absmax = codes_of(shape, blocksize)
    return packed, *(reference.double_quantize(absmax) if double else (absmax, None, None))


@cache
def dense_of(shape: tuple[int, ...], blocksize: int, double: bool, dtype: torch.dtype) -> Tensor:
    """The weight, dequantised."""
    packed, absmax = codes_of(shape, blocksize)
    if double:
        absmax = reference.double_dequantize(*reference.double_quantize(absmax))
    out = torch.empty(shape, dtype=dtype)
    reference.dequantize(packed, absmax, blocksize, out)
    return out


def check_dequantize(name: str, run: Run, device: torch.device) -> None:
    """run(packed, scales, nested_absmax, offset, blocksize, out), plain and double, to every dtype."""
    for shape, blocksize in cases(device):
        for double in (False, True):
            parts = [
                None if part is None else part.to(device)
                for part in parts_of(shape, blocksize, double)
            ]
            for dtype in DTYPES:
                what = f"{name} {shape} in blocks of {blocksize} to {dtype}{', double quantised' * double}"
                buffer = torch.full((math.prod(shape) + 64,), 7, dtype=dtype, device=device)
                run(*parts, blocksize, buffer[:-64].view(shape))
                same_bits(what, buffer[:-64], dense_of(shape, blocksize, double, dtype))
                same_bits(what + ", past its end", buffer[-64:], torch.full((64,), 7, dtype=dtype))


def check_quantize(name: str, run: Run, device: torch.device) -> None:
    """run(x, blocksize) -> packed, absmax, from every dtype."""
    for shape, blocksize in cases(device):
        for dtype in DTYPES:
            found, expected = (
                run(sample(shape, dtype).to(device), blocksize),
                codes_of(shape, blocksize, dtype),
            )
            for part, *pair in zip(("codes", "absmax"), found, expected, strict=True):
                same_bits(f"{name} {shape} in blocks of {blocksize} from {dtype}, {part}", *pair)


def check_double_quantize(name: str, run: Run, device: torch.device) -> None:
    """run(absmax) -> codes, nested absmax, offset."""
    for count in (1, 256, 3000, *[math.prod(LARGE) // 64] * (device.type == "cuda")):
        for kind, absmax in (
            ("random", sample((count,)).abs()),
            ("equal", torch.full((count,), 0.1)),
        ):
            found, expected = run(absmax.to(device)), reference.double_quantize(absmax)
            for part, *pair in zip(("codes", "nested", "offset"), found, expected, strict=True):
                same_bits(f"{name} of {count} {kind} scales, {part}", *pair)


def check_gemv(
    name: str, run: Run, shapes: tuple[tuple[int, int], ...], device: torch.device
) -> None:
    """run(x, packed, scales, nested_absmax, offset, shape, blocksize, bias=None) -> y (out,), in every dtype."""
    if device.type == "cuda":
        shapes = (*shapes, (1536, 576) if shapes[0][1] <= nf4_gemv.SMALL else LARGE)
    for shape, double in itertools.product(shapes, (False, True)):
        parts = [None if part is None else part.to(device) for part in parts_of(shape, 64, double)]
        W = dense_of(shape, 64, double, torch.float32)
        few = device.type != "cuda" or shape == LARGE
        columns = range(0, shape[1], shape[1] // 2 + 3 if few else 1)
        for dtype in DTYPES:
            what = f"{name} {shape} in {dtype}{', double quantised' * double}"
            x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = x.new_ones(shape[0])
            within_bound(what, run(x.to(device), *parts, shape, 64, bias.to(device)), W, x, bias)
            for k in columns:
                one = torch.zeros(shape[1], dtype=dtype, device=device)
                one[k] = 1
                # + 0.0: a sum of zeros of either sign is +0, whatever sign the column's zero has
                got, column = run(one, *parts, shape, 64), W[:, k].to(dtype)
                same_bits(f"{what}, column {k}", got + 0.0, column + 0.0)


def check_matmul(name: str, run: Run, device: torch.device) -> None:
    """run(x, packed, scales, nested_absmax, offset, shape, blocksize, bias=None) -> y (tokens, out), in every dtype
    and with as many tokens as it takes; W is rounded to x's dtype on the way."""
    cuda = device.type == "cuda"
    for shape, tokens in (((70, 96), 2), ((33, 1056), 17), *[(LARGE, 16), (LARGE, 64)] * cuda):
        for double, dtype in itertools.product((False, True), DTYPES):
            count = min(tokens, nf4_matmul.MOST[dtype])
            if cuda and not nf4_matmul.fits(dtype, device, shape, count):
                continue  # on this card W is made dense
            parts = [
                None if part is None else part.to(device) for part in parts_of(shape, 64, double)
            ]
            W = dense_of(shape, 64, double, dtype)
            what = f"{name} {shape}, {count} tokens in {dtype}{', double quantised' * double}"
            x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = x.new_ones(shape[0])
            found = run(x.to(device), *parts, shape, 64, bias.to(device))
            for token, got in zip(x, found.cpu(), strict=True):
                within_bound(
                    what, got, W.float(), token, bias, ulp=4 if cuda and dtype.itemsize == 2 else 1
                )
            columns = torch.arange(count) * (shape[1] - 1) // (count - 1)
            one = torch.zeros_like(x).scatter_(1, columns[:, None], 1)
            found = run(one.to(device), *parts, shape, 64)
            same_bits(f"{what}, columns", found + 0.0, W[:, columns].T.contiguous() + 0.0)


def within_bound(what: str, got: Tensor, W: Tensor, x: Tensor, bias: Tensor, ulp: int = 1) -> None:
    """Raises Mismatch unless got (out,) is W x + bias up to fp32 sums and one rounding to x's dtype; W fp32 (out, in).

    Each of a row's terms passes at most one rounding an addition, in + 1 of them in whatever order,
    and 3 more: W to fp32 (here), level * x, and * absmax. n roundings by 1 + u or less make a
    factor of 1 + n u / (1 - n u) or less. ulp: of u, how many a rounding may be off. Tensor cores
    align the terms of a sum to the largest and cut off (Fasi et al., 2021,
    doi.org/10.7717/peerj-cs.330): 2 u a term, and again for the sum of 8 or more so far, which
    makes 4.
    """
    y, size = (
        t(W.double()) @ t(x.double()) + t(bias.double()) for t in (torch.clone, torch.abs)
    )  # (out,) each
    n_u = (W.shape[1] + 4) * ulp * torch.finfo(torch.float32).eps / 2
    info = torch.finfo(x.dtype)
    bound = n_u / (1 - n_u) * size
    bound += (
        info.eps / 2 * (y.abs() + bound) + info.smallest_normal * info.eps
    )  # the last: subnormal results
    within(what, got, y, bound)


# by their names in launch.TILES; a launcher is looked up as its check runs
CHECKS: dict[str, Callable[[str, torch.device], None]] = {
    "dequantize_nf4": lambda name, on: check_dequantize(name, nf4_dequantize.dequantize, on),
    "dequantize_nf4_textbook": lambda name, on: check_dequantize(
        name, nf4_dequantize.dequantize_textbook, on
    ),
    "quantize_nf4": lambda name, on: check_quantize(name, nf4_quantize.quantize, on),
    "quantize_nf4_textbook": lambda name, on: check_quantize(
        name, nf4_quantize.quantize_textbook, on
    ),
    "double_quantize_nf4": lambda name, on: check_double_quantize(
        name, nf4_quantize.double_quantize, on
    ),
    "gemv_nf4": lambda name, on: check_gemv(name, nf4_gemv.gemv, ((3, 2080),), on),
    "gemv_nf4_small": lambda name, on: check_gemv(name, nf4_gemv.gemv, ((17, 96), (3, 32)), on),
    "gemv_nf4_textbook": lambda name, on: check_gemv(
        name, nf4_gemv.gemv_textbook, ((3, 1030), (5, 2)), on
    ),
    "matmul_nf4": lambda name, on: check_matmul(name, nf4_matmul.matmul, on),
    **step_check.CHECKS,
}
