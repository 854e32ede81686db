"""Are the kernels of training right? Those of minilora_kernels/triton, for kernel_check.py.

8-bit AdamW                             the plain step's bits, computed on the CPU, over several steps
cross-entropy                           fp64's loss and gradient, up to fp32's roundings and one of the logits
norm, gate, and their gradients         fp64's values, up to fp32's roundings and those of what is stored
rotation                                the plain form's bits, computed on the CPU
"""

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

SHAPES = (
    (5, 24),
    (3, 576),
    (260, 24),
    (2, 5000),
)  # rows and columns of a layer's steps, ragged in both directions
LARGE_STEP = (2048, 4096)


def check_adamw(name: str, run: Run, device: torch.device) -> None:
    """run(p, g, moments, numbers), from the plain step's own moments each time."""
    edges = midpoints(dynamic_map())
    one = torch.ones(1)  # blocks, scaled by 1
    special = torch.cat(
        [one, edges, *(x for side in (-1, 1) for x in (one, torch.nextafter(edges, edges + side)))]
    )
    for n in (4099, *[math.prod(LARGE)] * (device.type == "cuda")):
        p, moments = sample((n,)), zero_moments(torch.empty(n), True)
        for t in range(1, 4):
            # gradients of eight decades; at first beta1 = 0, so that thresholds are met exactly
            g = sample((n,)) * 10.0 ** (torch.arange(n) % 9 - 8)
            g[: len(special)] = special
            beta1 = 0.9 * (t > 1)
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
            for part, *pair in zip(
                ("p", "m", "m's scale", "v", "v's scale"), found, (p, *moments), strict=True
            ):
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
            # z - m below 2^6 is off by 2^-19, times log2 e by as much again, 2^x by 2^-22, sums by
            # less than both
            within(
                f"{name} {rows} x {columns} in {dtype}, loss",
                loss,
                -own,
                torch.full_like(own, 2.0**-16),
            )
            bound = (2.0**-16 + torch.finfo(dtype).eps / 2) * expected.abs() + 2.0**-25 * (
                dtype == torch.float16
            )
            within(
                f"{name} {rows} x {columns} in {dtype}, gradient", found, expected, bound + 1e-38
            )


def check_norm(name: str, run: Run, wanted: int, device: torch.device) -> None:
    """run(x, w, dy, gemma) -> y, dx or dw, as `wanted` says."""
    for shape, gemma in ((shape, gemma) for shape in shapes(device) for gemma in (False, True)):
        for dtype in DTYPES:
            x, dy = numbers(shape, dtype), numbers(shape, dtype, 7)
            exact = gradients(partial(plain_rms_norm, eps=1e-5, gemma=gemma), (x, x[-1]), dy)
            found = run(*(t.to(device) for t in (x, x[-1], dy)), gemma)
            nearly(f"{name} {shape} in {dtype}{', w - 1' * gemma}", found, exact[wanted])


def check_gate(name: str, run: Run, wanted: Sequence[int], device: torch.device) -> None:
    """run(gate, up, dy, gelu) -> y, or dgate and dup, as `wanted` says."""
    for shape, gelu in ((shape, gelu) for shape in shapes(device) for gelu in (False, True)):
        for dtype in DTYPES:
            inputs = [numbers(shape, dtype, shift) for shift in (0, 3, 7)]
            exact = gradients(partial(plain_gated, gelu=gelu), inputs[:2], inputs[2])
            found = run(*(t.to(device) for t in inputs), gelu)
            for i, got in zip(wanted, found, strict=True):
                nearly(f"{name} {shape} in {dtype}{', GELU' * gelu}, result {i}", got, exact[i])


def check_rotate(name: str, run: Run, device: torch.device) -> None:
    """run(x, cos, sin, sign) -> y, from every dtype, heads inside."""
    for B, heads, T, d in (
        (2, 3, 5, 24),
        (1, 4, 33, 128),
        *[(2, 32, 1024, 128)] * (device.type == "cuda"),
    ):
        for dtype in DTYPES:
            x, turn = (
                numbers((B, T, heads, d), dtype).transpose(1, 2),
                sample((1, 1, T, d // 2)) * 200,
            )
            cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (turn.cos(), turn.sin()))
            for sign in (1.0, -1.0):
                found = run(*(t.to(device) for t in (x, cos, sin)), sign)
                same_bits(
                    f"{name} {(B, heads, T, d)} in {dtype}",
                    found + 0.0,
                    plain_rotate(x, cos, sin * sign) + 0.0,
                )


def shapes(device: torch.device) -> list[tuple[int, int]]:
    """(rows, columns) to check on this device."""
    return [*SHAPES, *[LARGE_STEP] * (device.type == "cuda")]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """About N(0, 1), and zeros among them; nothing subnormal, which Triton's interpreter misreads in bf16."""
    x = sample(shape) * 50
    return x.where(x.abs() > 1e-30, 0).roll(shift, -1).to(dtype)


def gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor, ...]:
    """A plain form's value and gradients, in fp64."""
    wide = [x.double().requires_grad_() for x in inputs]
    y = plain(*wide)
    return y.detach(), *torch.autograd.grad(y, wide, dy.double())


def nearly(what: str, got: Tensor, expected: Tensor) -> None:
    """Raises Mismatch unless got is `expected` up to two roundings to its dtype, and fp32's: the sums of a row, or of
    260 rows into dw, and a sigmoid err by some dozen units of the largest values there are, which
    2^-18 covers."""
    largest = max(1.0, expected.abs().max().item())
    within(what, got, expected, torch.finfo(got.dtype).eps * expected.abs() + 2.0**-18 * largest)


def norm_gradient(x: Tensor, weight: Tensor, dy: Tensor, gemma: bool) -> Tensor:
    """dx, with r of the forward kernel."""
    return rms_norm.rms_norm_backward(
        x, weight, rms_norm.rms_norm(x, weight, 1e-5, gemma)[1], dy, gemma
    )


def norm_weight_gradient(x: Tensor, weight: Tensor, dy: Tensor, gemma: bool) -> Tensor:
    """dw, with r of the forward kernel."""
    return rms_norm.rms_norm_weight(x, rms_norm.rms_norm(x, weight, 1e-5, gemma)[1], dy)


# by their names in launch.TILES; a launcher is looked up as its check runs
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
