"""Checks of the training kernels in minilora_kernels/triton, for kernel_check.py.

8-bit AdamW                             the reference step's bits on the CPU, over several steps
cross-entropy                           fp64's loss and gradient, up to the roundings of fp32 and of
                                        the logits
norm, gate, and their gradients         fp64's values, up to the roundings of fp32 and of results
rotation                                the reference implementation's bits on the CPU
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_kernels.check_parts import DTYPES, LARGE, Run, same_bits, sample, within
from minilora.training.optim.adamw_8bit import plain_step, zero_moments
from minilora_kernels import dynamic_map
from minilora_kernels.nf4.codebook import midpoints
from minilora_kernels.ops.rms_norm import plain_rms_norm
from minilora_kernels.ops.rope import plain_rotate
from minilora_kernels.ops.swiglu import plain_gated
from minilora_kernels.triton import adamw_8bit, cross_entropy, rms_norm, rope, swiglu

# rows and columns of a layer's steps; neither is a multiple of a tile
SHAPES = ((5, 24), (3, 576), (260, 24), (2, 5000))
LARGE_STEP = (2048, 4096)


def check_adamw(name: str, run: Run, device: torch.device) -> None:
    """Check run(p, g, moments, numbers), each time from the moments of the reference step."""
    edges = midpoints(dynamic_map())
    below = torch.nextafter(edges, edges - 1)
    above = torch.nextafter(edges, edges + 1)
    one = torch.ones(1)  # makes 1 the scale of its block
    special = torch.cat([one, edges, one, below, one, above])
    sizes = [4099]
    if device.type == "cuda":
        sizes.append(math.prod(LARGE))
    for n in sizes:
        p, moments = sample((n,)), zero_moments(torch.empty(n), True)
        for t in range(1, 4):
            # Gradients of eight decades. In the first step beta1 = 0, so that the moments are
            # exactly the thresholds.
            g = sample((n,)) * 10.0 ** (torch.arange(n) % 9 - 8)
            g[: len(special)] = special
            beta1 = 0.9 if t > 1 else 0.0
            numbers = (
                beta1,
                1 - beta1,
                0.99,
                1 - 0.99,
                1 / math.sqrt(1 - 0.99**t),
                1e-8,
                0.999,
                -1e-3,
            )
            found = [part.to(device, copy=True) for part in (p, *moments)]
            run(found[0], g.to(device), found[1:], numbers)
            plain_step(p, g, moments, numbers)
            parts = ("p", "m", "m's scale", "v", "v's scale")
            for part, *pair in zip(parts, found, (p, *moments), strict=True):
                same_bits(f"{name} of {n} values, step {t}, {part}", *pair)


def check_cross_entropy(name: str, run: Run, device: torch.device) -> None:
    """Check run(logits, labels, loss, gradient, lift), from every dtype."""
    sizes = [(5, 300), (3, 4097)]
    if device.type == "cuda":
        sizes.append((512, 128256))
    for rows, columns in sizes:
        for dtype in DTYPES:
            label = f"{name} {rows} x {columns} in {dtype}"
            logits = (sample((rows, columns)) * 200).to(dtype)
            labels = (torch.arange(rows) * 977 - 1) % columns
            log_p = logits.double().log_softmax(1)
            own = log_p.gather(1, labels[:, None])
            expected = log_p.exp().scatter_(1, labels[:, None], own.expm1())
            found, loss = logits.to(device, copy=True), torch.empty(rows, device=device)
            run(found, labels.to(device), loss, True, 1.0)
            # Errors: 2^-19 of z - m below 2^6, as much again of the product with log2 e, 2^-22 of
            # 2^x, and less than these of the sums.
            within(f"{label}, loss", loss, -own, torch.full_like(own, 2.0**-16))
            bound = (2.0**-16 + torch.finfo(dtype).eps / 2) * expected.abs() + 1e-38
            if dtype == torch.float16:
                bound += 2.0**-25  # subnormal results
            within(f"{label}, gradient", found, expected, bound)


def check_norm(name: str, run: Run, wanted: int, device: torch.device) -> None:
    """Check run(x, w, dy, gemma) -> y, dx or dw: result 0, 1 or 2 in `wanted`."""
    for shape, gemma in itertools.product(shapes(device), (False, True)):
        variant = ", w - 1" if gemma else ""
        for dtype in DTYPES:
            x, dy = numbers(shape, dtype), numbers(shape, dtype, 7)
            exact = gradients(partial(plain_rms_norm, eps=1e-5, gemma=gemma), (x, x[-1]), dy)
            found = run(*(t.to(device) for t in (x, x[-1], dy)), gemma)
            nearly(f"{name} {shape} in {dtype}{variant}", found, exact[wanted])


def check_gate(name: str, run: Run, wanted: Sequence[int], device: torch.device) -> None:
    """Check run(gate, up, dy, gelu) -> y ([0] in `wanted`), or dgate and dup ([1, 2])."""
    for shape, gelu in itertools.product(shapes(device), (False, True)):
        variant = ", GELU" if gelu else ""
        for dtype in DTYPES:
            inputs = [numbers(shape, dtype, shift) for shift in (0, 3, 7)]
            exact = gradients(partial(plain_gated, gelu=gelu), inputs[:2], inputs[2])
            found = run(*(t.to(device) for t in inputs), gelu)
            for i, got in zip(wanted, found, strict=True):
                nearly(f"{name} {shape} in {dtype}{variant}, result {i}", got, exact[i])


def check_rotate(name: str, run: Run, device: torch.device) -> None:
    """Check run(x, cos, sin, sign) -> y, from every dtype; in memory x is (B, T, heads, d)."""
    sizes = [(2, 3, 5, 24), (1, 4, 33, 128)]
    if device.type == "cuda":
        sizes.append((2, 32, 1024, 128))
    for B, heads, T, d in sizes:
        for dtype in DTYPES:
            x = numbers((B, T, heads, d), dtype).transpose(1, 2)  # (B, heads, T, d)
            angles = sample((1, 1, T, d // 2)) * 200
            cos = torch.cat([angles.cos()] * 2, -1).to(dtype)  # (1, 1, T, d)
            sin = torch.cat([angles.sin()] * 2, -1).to(dtype)
            for sign in (1.0, -1.0):
                found = run(x.to(device), cos.to(device), sin.to(device), sign)
                expected = plain_rotate(x, cos, sin * sign)
                same_bits(f"{name} {(B, heads, T, d)} in {dtype}", found + 0.0, expected + 0.0)


def shapes(device: torch.device) -> list[tuple[int, int]]:
    """Return each (rows, columns) to check on this device."""
    return [*SHAPES, LARGE_STEP] if device.type == "cuda" else [*SHAPES]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Return numbers of about N(0, 1), some of them zero.

    None is subnormal, because Triton's interpreter misreads subnormal bf16.
    """
    x = sample(shape) * 50
    return x.where(x.abs() > 1e-30, 0).roll(shift, -1).to(dtype)


def gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor, ...]:
    """Return value and gradients of a reference implementation in fp64."""
    wide = [x.double().requires_grad_() for x in inputs]
    y = plain(*wide)
    return y.detach(), *torch.autograd.grad(y, wide, dy.double())


def nearly(label: str, got: Tensor, expected: Tensor) -> None:
    """Raise Mismatch unless `got` is `expected` up to two roundings to its dtype and those of fp32.

    In fp32 the sum of a row, the sum of 260 rows into dw, and a sigmoid have errors of some dozen
    units of the largest values; 2^-18 covers them.
    """
    largest = max(1.0, expected.abs().max().item())
    within(label, got, expected, torch.finfo(got.dtype).eps * expected.abs() + 2.0**-18 * largest)


def norm_gradient(x: Tensor, weight: Tensor, dy: Tensor, gemma: bool) -> Tensor:
    """Return dx, with r from the forward kernel."""
    _, r = rms_norm.rms_norm(x, weight, 1e-5, gemma)
    return rms_norm.rms_norm_backward(x, weight, r, dy, gemma)


def norm_weight_gradient(x: Tensor, weight: Tensor, dy: Tensor, gemma: bool) -> Tensor:
    """Return dw, with r from the forward kernel."""
    _, r = rms_norm.rms_norm(x, weight, 1e-5, gemma)
    return rms_norm.rms_norm_weight(x, r, dy)


# Names as in launch.TILES. Each launcher is looked up when its check runs.
CHECKS: dict[str, Callable[[str, torch.device], None]] = {
    "cross_entropy": lambda name, on: check_cross_entropy(name, cross_entropy.cross_entropy, on),
    "adamw_8bit": lambda name, on: check_adamw(name, adamw_8bit.step, on),
    "rms_norm": lambda name, on: check_norm(
        name, lambda x, w, dy, gemma: rms_norm.rms_norm(x, w, 1e-5, gemma)[0], 0, on
    ),
    "rms_norm_backward": lambda name, on: check_norm(name, norm_gradient, 1, on),
    "rms_norm_weight": lambda name, on: check_norm(name, norm_weight_gradient, 2, on),
    "rotate": lambda name, on: check_rotate(name, rope.rotate, on),
    "gated": lambda name, on: check_gate(
        name, lambda g, u, dy, gelu: [swiglu.gated(g, u, gelu)], [0], on
    ),
    "gated_backward": lambda name, on: check_gate(name, swiglu.gated_backward, [1, 2], on),
}
