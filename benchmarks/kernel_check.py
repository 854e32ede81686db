"""Are the kernels right? Every one against the reference, before kernel_bench.py times any.

    check_all(torch.device("cuda"))         # or "cpu", if TRITON_INTERPRET=1 made Triton interpret; raises Mismatch

    dequantise, quantise, second level      the reference's bits, computed on the CPU
    GEMV, any x                             |y - W x| <= n u sum_k |W x_k|, the bound on any order of n roundings
    GEMV, x = one 1 among zeros             a column of W exactly: a wrong element cannot hide in the bound
    8-bit AdamW                             the plain step's bits, computed on the CPU, over several steps
    cross-entropy                           fp64's loss and gradient, up to fp32's roundings and one of the logits

The shapes end in the middle of a block, of a word and of a byte; the weights hold a block of zeros, one below fp32's
normal numbers, and every threshold with its neighbours. On a GPU a large matrix comes on top, where many programs run.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minilora.engines.adam8bit import plain_step, zero_moments
from minilora_kernels import (
    adam8bit,
    cross_entropy,
    dynamic_map,
    nf4_dequantize,
    nf4_gemv,
    nf4_quantize,
    nf4_thresholds,
    reference,
)
from minilora_kernels.codebook import midpoints

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = (((7, 129), 64), ((13, 1056), 32), ((24, 576), 64), ((2, 4100), 4096))  # shape, blocksize
LARGE = (4096, 4096)
Run = Callable[..., Any]


class Mismatch(Exception):
    """A kernel's result is not what it must be; says where first."""


def check_all(device: torch.device) -> list[str]:
    """The kernels checked, by their names in launch.TILES. Raises Mismatch at the first that fails."""
    for name, check in CHECKS.items():
        check(name, device)
    return list(CHECKS)


def cases(device: torch.device) -> list[tuple[tuple[int, ...], int]]:
    """(shape, blocksize) to check on this device."""
    return [*CASES, (LARGE, 64)] if device.type == "cuda" else [*CASES]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of this shape on the CPU, always the same, with what is special in front."""
    x = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0)) * 0.02
    edges = nf4_thresholds()
    beside = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-1.0, 1.0)]
    tiny = x[:64] * (2.0**-126 if dtype == torch.float32 else 0)  # Triton's interpreter misreads subnormal bf16
    special = torch.cat([torch.zeros(64), tiny, edges, *beside, torch.ones(19)])  # blocks; the last is scaled by 1
    x[: len(special)] = special[: len(x)]
    return x.to(dtype).view(shape)


# what the reference says of sample(shape) on the CPU; kept, since tuning checks tile after tile


@cache
def codes_of(shape: tuple[int, ...], blocksize: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
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


def same_bits(what: str, got: Tensor, expected: Tensor) -> None:
    """Raises Mismatch unless both hold the same bits; a negative zero is not a zero."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    got, expected = got.cpu().reshape(-1), expected.reshape(-1)
    if (got.dtype, len(got)) != (expected.dtype, len(expected)):
        raise Mismatch(f"{what}: {len(got)} of {got.dtype}, expected {len(expected)} of {expected.dtype}")
    wrong = (got.view(bits) != expected.view(bits)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        values = f"got {got[i].item()!r}, expected {expected[i].item()!r}"
        raise Mismatch(f"{what}: {len(wrong)} of {len(got)} differ from the reference, first [{i}]: {values}")


def check_dequantize(name: str, run: Run, device: torch.device) -> None:
    """run(packed, scales, nested_absmax, offset, blocksize, out), plain and double, to every dtype."""
    for shape, blocksize in cases(device):
        for double in (False, True):
            parts = [None if part is None else part.to(device) for part in parts_of(shape, blocksize, double)]
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
            found, expected = run(sample(shape, dtype).to(device), blocksize), codes_of(shape, blocksize, dtype)
            for part, *pair in zip(("codes", "absmax"), found, expected, strict=True):
                same_bits(f"{name} {shape} in blocks of {blocksize} from {dtype}, {part}", *pair)


def check_double_quantize(name: str, run: Run, device: torch.device) -> None:
    """run(absmax) -> codes, nested absmax, offset."""
    for count in (1, 256, 3000, *[math.prod(LARGE) // 64] * (device.type == "cuda")):
        for kind, absmax in (("random", sample((count,)).abs()), ("equal", torch.full((count,), 0.1))):
            found, expected = run(absmax.to(device)), reference.double_quantize(absmax)
            for part, *pair in zip(("codes", "nested", "offset"), found, expected, strict=True):
                same_bits(f"{name} of {count} {kind} scales, {part}", *pair)


def check_gemv(name: str, run: Run, shapes: tuple[tuple[int, int], ...], device: torch.device) -> None:
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


def within_bound(what: str, got: Tensor, W: Tensor, x: Tensor, bias: Tensor) -> None:
    """Raises Mismatch unless got (out,) is W x + bias up to fp32 sums and one rounding to x's dtype; W fp32 (out, in).

    Each of a row's terms passes at most one rounding an addition, in + 1 of them in whatever order, and 3 more: W to
    fp32 (here), level * x, and * absmax. n roundings by 1 + u or less make a factor of 1 + n u / (1 - n u) or less.
    """
    y, size = (t(W.double()) @ t(x.double()) + t(bias.double()) for t in (torch.clone, torch.abs))  # (out,) each
    n_u = (W.shape[1] + 4) * torch.finfo(torch.float32).eps / 2
    info = torch.finfo(x.dtype)
    bound = n_u / (1 - n_u) * size
    bound += info.eps / 2 * (y.abs() + bound) + info.smallest_normal * info.eps  # the last: subnormal results
    within(what, got, y, bound)


def check_adamw(name: str, run: Run, device: torch.device) -> None:
    """run(p, g, moments, numbers), from the plain step's own moments each time."""
    edges = midpoints(dynamic_map())
    one = torch.ones(1)  # blocks, scaled by 1
    special = torch.cat([one, edges, *(x for side in (-1, 1) for x in (one, torch.nextafter(edges, edges + side)))])
    for n in (4099, *[math.prod(LARGE)] * (device.type == "cuda")):
        p, moments = sample((n,)), zero_moments(torch.empty(n), True)
        for t in range(1, 4):
            # gradients of eight decades; at first beta1 = 0, so that thresholds are met exactly
            g = sample((n,)) * 10.0 ** (torch.arange(n) % 9 - 8)
            g[: len(special)] = special
            beta1 = 0.9 * (t > 1)
            numbers = (beta1, 1 - beta1, 0.99, 1 - 0.99, 1 / math.sqrt(1 - 0.99**t), 1e-8, 0.999, -1e-3)
            found = [part.to(device, copy=True) for part in (p, *moments)]
            run(found[0], g.to(device), found[1:], numbers)
            plain_step(p, g, moments, numbers)
            for part, *pair in zip(("p", "m", "m's scale", "v", "v's scale"), found, (p, *moments), strict=True):
                same_bits(f"{name} of {n} values, step {t}, {part}", *pair)


def check_cross_entropy(name: str, run: Run, device: torch.device) -> None:
    """run(logits, labels, loss, gradient, lift), from every dtype."""
    for rows, columns in ((5, 300), (3, 4097), *[(512, 128256)] * (device.type == "cuda")):
        for dtype in DTYPES:
            logits = (sample((rows, columns)) * 200).to(dtype)
            labels = (torch.arange(rows) * 977 - 1) % columns
            log_p = logits.double().log_softmax(1)
            own = log_p.gather(1, labels[:, None])
            expected = log_p.exp().scatter_(1, labels[:, None], own.expm1())
            found, loss = logits.to(device, copy=True), torch.empty(rows, device=device)
            run(found, labels.to(device), loss, True, 1.0)
            # z - m below 2^6 is off by 2^-19, times log2 e by as much again, 2^x by 2^-22, sums by less than both
            within(f"{name} {rows} x {columns} in {dtype}, loss", loss, -own, torch.full_like(own, 2.0**-16))
            bound = (2.0**-16 + torch.finfo(dtype).eps / 2) * expected.abs() + 2.0**-25 * (dtype == torch.float16)
            within(f"{name} {rows} x {columns} in {dtype}, gradient", found, expected, bound + 1e-38)


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


# by their names in launch.TILES; a launcher is looked up as its check runs
CHECKS: dict[str, Callable[[str, torch.device], None]] = {
    "dequantize_nf4": lambda name, on: check_dequantize(name, nf4_dequantize.dequantize, on),
    "dequantize_nf4_textbook": lambda name, on: check_dequantize(name, nf4_dequantize.dequantize_textbook, on),
    "quantize_nf4": lambda name, on: check_quantize(name, nf4_quantize.quantize, on),
    "quantize_nf4_textbook": lambda name, on: check_quantize(name, nf4_quantize.quantize_textbook, on),
    "double_quantize_nf4": lambda name, on: check_double_quantize(name, nf4_quantize.double_quantize, on),
    "gemv_nf4": lambda name, on: check_gemv(name, nf4_gemv.gemv, ((3, 2080),), on),
    "gemv_nf4_small": lambda name, on: check_gemv(name, nf4_gemv.gemv, ((17, 96), (3, 32)), on),
    "gemv_nf4_textbook": lambda name, on: check_gemv(name, nf4_gemv.gemv_textbook, ((3, 1030), (5, 2)), on),
    "cross_entropy": lambda name, on: check_cross_entropy(name, cross_entropy.cross_entropy, on),
    "adamw_8bit": lambda name, on: check_adamw(name, adam8bit.step, on),
}
