"""Checks of every kernel against the reference, before kernel_bench.py times any.

    check_all(torch.device("cuda"))         # or "cpu" with TRITON_INTERPRET=1; raises Mismatch

    dequantise, quantise, second level      the reference's bits, computed on the CPU
    GEMV, any x                             |y - W x| <= n u sum_k |W x_k|, n roundings in any order
    GEMV, x = one 1 among zeros             exactly a column of W: the bound hides no wrong element
    few tokens                              both checks of the GEMV
    a layer, a head, AdamW                  step_check.py

The shapes end in the middle of a block, of a word and of a byte. The weights contain a block of
zeros, a block below fp32's normal numbers, and every threshold with its neighbours. On a GPU a
large matrix is checked too, on which many programs run.
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
    """Check all kernels; return their names in launch.TILES. Raises Mismatch at the first error."""
    for name, check in CHECKS.items():
        check(name, device)
    return list(CHECKS)


def cases(device: torch.device) -> list[tuple[tuple[int, ...], int]]:
    """Return each (shape, blocksize) to check on this device."""
    return [*CASES, (LARGE, 64)] if device.type == "cuda" else [*CASES]


# Results of the reference for sample(shape) on the CPU. They are cached, because tuning checks many
# tiles.


@cache
def codes_of(
    shape: tuple[int, ...], blocksize: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return packed and absmax."""
    return reference.quantize(sample(shape, dtype), blocksize)


@cache
def parts_of(shape: tuple[int, ...], blocksize: int, double: bool) -> tuple[Tensor | None, ...]:
    """Return packed, scales, nested_absmax and offset."""
    packed, absmax = codes_of(shape, blocksize)
    if not double:
        return packed, absmax, None, None
    return packed, *reference.double_quantize(absmax)


@cache
def dense_of(shape: tuple[int, ...], blocksize: int, double: bool, dtype: torch.dtype) -> Tensor:
    """Return the dequantised weight."""
    packed, absmax = codes_of(shape, blocksize)
    if double:
        absmax = reference.double_dequantize(*reference.double_quantize(absmax))
    out = torch.empty(shape, dtype=dtype)
    reference.dequantize(packed, absmax, blocksize, out)
    return out


def parts_on(
    device: torch.device, shape: tuple[int, ...], blocksize: int, double: bool
) -> list[Tensor | None]:
    """Return parts_of(...) on `device`."""
    parts = parts_of(shape, blocksize, double)
    return [None if part is None else part.to(device) for part in parts]


def quantised(double: bool) -> str:
    """Return the end of a label: whether the scales are quantised."""
    return ", double quantised" if double else ""


def check_dequantize(name: str, run: Run, device: torch.device) -> None:
    """Check run(packed, scales, nested_absmax, offset, blocksize, out) to every dtype."""
    for shape, blocksize in cases(device):
        for double in (False, True):
            parts = parts_on(device, shape, blocksize, double)
            for dtype in DTYPES:
                label = f"{name} {shape} in blocks of {blocksize} to {dtype}{quantised(double)}"
                buffer = torch.full((math.prod(shape) + 64,), 7, dtype=dtype, device=device)
                run(*parts, blocksize, buffer[:-64].view(shape))
                same_bits(label, buffer[:-64], dense_of(shape, blocksize, double, dtype))
                untouched = torch.full((64,), 7, dtype=dtype)
                same_bits(f"{label}, past its end", buffer[-64:], untouched)


def check_quantize(name: str, run: Run, device: torch.device) -> None:
    """Check run(x, blocksize) -> packed, absmax, from every dtype."""
    for shape, blocksize in cases(device):
        for dtype in DTYPES:
            found = run(sample(shape, dtype).to(device), blocksize)
            expected = codes_of(shape, blocksize, dtype)
            for part, *pair in zip(("codes", "absmax"), found, expected, strict=True):
                same_bits(f"{name} {shape} in blocks of {blocksize} from {dtype}, {part}", *pair)


def check_double_quantize(name: str, run: Run, device: torch.device) -> None:
    """Check run(absmax) -> codes, nested absmax, offset."""
    counts = [1, 256, 3000]
    if device.type == "cuda":
        counts.append(math.prod(LARGE) // 64)
    for count in counts:
        scales = {"random": sample((count,)).abs(), "equal": torch.full((count,), 0.1)}
        for kind, absmax in scales.items():
            found = run(absmax.to(device))
            expected = reference.double_quantize(absmax)
            for part, *pair in zip(("codes", "nested", "offset"), found, expected, strict=True):
                same_bits(f"{name} of {count} {kind} scales, {part}", *pair)


def check_gemv(
    name: str, run: Run, shapes: tuple[tuple[int, int], ...], device: torch.device
) -> None:
    """Check run(x, packed, scales, nested_absmax, offset, shape, blocksize, bias) -> y (out,).

    x has every dtype.
    """
    if device.type == "cuda":
        shapes = (*shapes, (1536, 576) if shapes[0][1] <= nf4_gemv.SMALL else LARGE)
    for shape, double in itertools.product(shapes, (False, True)):
        parts = parts_on(device, shape, 64, double)
        W = dense_of(shape, 64, double, torch.float32)
        few = device.type != "cuda" or shape == LARGE
        columns = range(0, shape[1], shape[1] // 2 + 3 if few else 1)
        for dtype in DTYPES:
            label = f"{name} {shape} in {dtype}{quantised(double)}"
            x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = x.new_ones(shape[0])
            got = run(x.to(device), *parts, shape, 64, bias.to(device))
            within_bound(label, got, W, x, bias)
            for k in columns:
                one = torch.zeros(shape[1], dtype=dtype, device=device)
                one[k] = 1
                got = run(one, *parts, shape, 64)
                column = W[:, k].to(dtype)
                # + 0.0 makes every zero +0: a sum of zeros is +0, but a zero in W can be negative.
                same_bits(f"{label}, column {k}", got + 0.0, column + 0.0)


def check_matmul(
    name: str, run: Run, shape: tuple[int, int], counts: tuple[int, int], device: torch.device
) -> None:
    """Check run(x, packed, scales, nested_absmax, offset, shape, blocksize, bias).

    The first of `counts` is the number of tokens, the second that on LARGE, on a GPU.

    The result is y (tokens, out). x has every dtype and at most as many tokens as the kernel takes.
    The kernel rounds W to x's dtype.
    """
    cuda = device.type == "cuda"
    sizes = [(shape, counts[0])]
    if cuda:
        sizes.append((LARGE, counts[1]))
    for shape, tokens in sizes:
        for double, dtype in itertools.product((False, True), DTYPES):
            count = min(tokens, nf4_matmul.MOST[dtype])
            if cuda and not nf4_matmul.fits(dtype, device, shape, count):
                continue  # this card uses a dense W
            parts = parts_on(device, shape, 64, double)
            W = dense_of(shape, 64, double, dtype)
            label = f"{name} {shape}, {count} tokens in {dtype}{quantised(double)}"
            x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = x.new_ones(shape[0])
            found = run(x.to(device), *parts, shape, 64, bias.to(device))
            ulp = 4 if cuda and dtype.itemsize == 2 else 1
            for token, got in zip(x, found.cpu(), strict=True):
                within_bound(label, got, W.float(), token, bias, ulp)
            columns = torch.arange(count) * (shape[1] - 1) // (count - 1)
            one = torch.zeros_like(x).scatter_(1, columns[:, None], 1)
            found = run(one.to(device), *parts, shape, 64)
            same_bits(f"{label}, columns", found + 0.0, W[:, columns].T.contiguous() + 0.0)


def within_bound(label: str, got: Tensor, W: Tensor, x: Tensor, bias: Tensor, ulp: int = 1) -> None:
    """Raise Mismatch unless got (out,) is W x + bias up to roundings; W is fp32 (out, in).

    The roundings are those of sums in fp32 and one to x's dtype. Each term of a row passes at most
    one rounding for each addition (in + 1 of them, in any order) and 3 more: W to fp32 (here),
    level * x, and * absmax. n roundings by a factor of at most 1 + u make a factor of at most
    1 + n u / (1 - n u).

    `ulp` is the error of one rounding in units of u. Tensor cores align the terms of a sum to the
    largest term and cut off (Fasi et al., 2021, doi.org/10.7717/peerj-cs.330): 2 u for each term,
    and 2 u for the sum of 8 or more terms so far, together 4.
    """
    y = W.double() @ x.double() + bias.double()  # (out,)
    size = W.double().abs() @ x.double().abs() + bias.double().abs()  # (out,)
    n_u = (W.shape[1] + 4) * ulp * torch.finfo(torch.float32).eps / 2
    info = torch.finfo(x.dtype)
    bound = n_u / (1 - n_u) * size
    # The last term covers subnormal results.
    bound += info.eps / 2 * (y.abs() + bound) + info.smallest_normal * info.eps
    within(label, got, y, bound)


# Names as in launch.TILES. Each launcher is looked up when its check runs.
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
    "matmul_nf4": lambda name, on: check_matmul(name, nf4_matmul.matmul, (70, 96), (2, 16), on),
    "matmul_nf4_many": lambda name, on: check_matmul(
        name, nf4_matmul.matmul, (33, 1056), (17, 64), on
    ),
    **step_check.CHECKS,
}
