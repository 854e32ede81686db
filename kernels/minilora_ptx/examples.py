"""One small launch of each kernel of minilora, with the result that its reference gives.

The sizes end in the middle of a block, a word and a program, so that every mask is used. Exact
kernels are compared by bits. A sum in another order, and functions that a GPU approximates, have a
tolerance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora_kernels.nf4 import reference
from minilora_kernels.ops.rms_norm import plain_rms_norm
from minilora_kernels.ops.rope import plain_rotate
from minilora_kernels.ops.swiglu import plain_gated
from minilora_kernels.triton import (
    adamw_8bit,
    cross_entropy,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)

BF16 = torch.bfloat16


@dataclass
class Result:
    """A result of a launch.

    Attributes:
        name: Name of the result.
        found: Tensor that the kernel wrote.
        expected: Result of the reference.
        tolerance: Largest difference, as a share of the largest expected value; 0: equal bits.
    """

    name: str
    found: Tensor
    expected: Tensor
    tolerance: float = 0.0

    def right(self) -> bool:
        """Return True if the result is as expected."""
        if not self.tolerance:
            return torch.equal(self.found, self.expected)
        expected = self.expected.double()
        error = (self.found.double() - expected).abs().max()
        return bool(error <= self.tolerance * expected.abs().max())


def _random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return normal values, the same in every run."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def _weight(rows: int, inner: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the parts of a weight in NF4 with double quantisation, and the dense weight in fp32."""
    packed, absmax = reference.quantize(_random(rows, inner, dtype=torch.float32), 64)
    codes, nested, offset = reference.double_quantize(absmax)
    parts = (packed, codes, nested, offset)
    scales = reference.double_dequantize(codes, nested, offset)
    dense = torch.empty(rows, inner)
    reference.dequantize(packed, scales, 64, dense)
    return parts, dense


def _dequantize(launcher: Callable[..., None]) -> list[Result]:
    """Dequantise to bf16."""
    parts, dense = _weight(7, 600)
    out = torch.zeros(7, 600, dtype=BF16)
    launcher(*parts, 64, out)
    return [Result("W", out, dense.to(BF16))]


def _quantize(launcher: Callable[..., tuple[Tensor, Tensor]]) -> list[Result]:
    """Quantise bf16 in blocks of 64."""
    x = _random(5, 483)
    packed, absmax = launcher(x, 64)
    expected = reference.quantize(x, 64)
    return [Result("codes", packed, expected[0]), Result("absmax", absmax, expected[1])]


def _double_quantize() -> list[Result]:
    """Quantise scales."""
    scales = _random(1000, dtype=torch.float32).abs()
    codes, nested, offset = nf4_quantize.double_quantize(scales)
    expected = reference.double_quantize(scales)
    return [
        Result("codes", codes, expected[0]),
        Result("nested absmax", nested, expected[1]),
        Result("offset", offset, expected[2]),
    ]


def _gemv(launcher: Callable[..., Tensor]) -> list[Result]:
    """Multiply a vector, and one-hot vectors, which give a column exactly."""
    short_parts, short_dense = _weight(3, 1056)  # rows shorter than a step
    parts, dense = _weight(9, 2112)
    x = _random(2112)
    one = torch.zeros(2112, dtype=BF16)
    one[1001] = 1
    y = launcher(x, *parts, (9, 2112), 64)
    column = launcher(one, *parts, (9, 2112), 64)
    short = launcher(one[1:1057].clone(), *short_parts, (3, 1056), 64)
    return [
        Result("y", y, dense.double() @ x.double(), 2.0**-8),
        Result("column 1001", column, dense[:, 1001].to(BF16)),
        Result("column 1000", short, short_dense[:, 1000].to(BF16)),
    ]


def _matmul() -> list[Result]:
    """Multiply three one-hot tokens, which give columns exactly."""
    parts, dense = _weight(70, 192)
    x = torch.eye(192, dtype=BF16)[[0, 100, 191]]
    y = nf4_matmul.matmul(x, *parts, (70, 192), 64)
    return [Result("columns", y, dense[:, [0, 100, 191]].T.to(BF16))]


def _cross_entropy() -> list[Result]:
    """Compute loss and gradient of three rows."""
    logits = _random(3, 2100, dtype=torch.float32)
    labels = torch.tensor([0, 2099, 77])
    loss = torch.zeros(3)
    gradient = logits.clone()
    cross_entropy.cross_entropy(gradient, labels, loss, True, 1.0)
    log_p = logits.double().log_softmax(1)
    expected = log_p.exp()
    expected[range(3), labels] -= 1
    return [
        Result("loss", loss, -log_p[range(3), labels], 2.0**-16),
        Result("gradient", gradient, expected, 2.0**-16),
    ]


def _adamw() -> list[Result]:
    """Take the first step, whose moments are those of the gradient."""
    p = _random(1500, dtype=torch.float32)
    g = _random(1500, 1, dtype=torch.float32)[:, 0].contiguous()
    zero = torch.full((6, 256), 127, dtype=torch.uint8)
    moments = [zero.clone(), torch.zeros(6), zero * 0, torch.zeros(6)]
    m = g * torch.tensor(0.1)
    v = g * g * torch.tensor(0.01)
    # torch's fp32 root is not correctly rounded on every CPU
    root = v.double().sqrt().float() * torch.tensor(10.0) + torch.tensor(1e-8)
    expected = p * torch.tensor(0.999) + m / root * torch.tensor(-0.1)
    adamw_8bit.step(p, g, moments, (0.9, 0.1, 0.99, 0.01, 10.0, 1e-8, 0.999, -0.1))
    return [Result("p", p, expected)]


def _rms_norm() -> list[Result]:
    """Normalise rows of 300."""
    x, w = _random(5, 300), _random(300)
    y, _ = rms_norm.rms_norm(x, w, 1e-5, False)
    return [Result("y", y, plain_rms_norm(x, w, 1e-5), 2.0**-8)]


def _norm_gradients() -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return x, w, r and dy of a norm, and the gradients of x and w in fp64."""
    x, w, dy = _random(5, 300), _random(300), _random(300, 5).T.contiguous()
    exact_x = x.double().requires_grad_()
    exact_w = w.double().requires_grad_()
    y = plain_rms_norm(exact_x, exact_w, 1e-5)
    r = 1 / (x.float().square().mean(1, keepdim=True) + 1e-5).sqrt()
    return x, w, r, dy, torch.autograd.grad(y, (exact_x, exact_w), dy.double())


def _rms_norm_backward() -> list[Result]:
    """Compute dx."""
    x, w, r, dy, (dx, _) = _norm_gradients()
    found = rms_norm.rms_norm_backward(x, w, r, dy, False)
    return [Result("dx", found, dx, 2.0**-8)]


def _rms_norm_weight() -> list[Result]:
    """Compute dw."""
    x, _, r, dy, (_, dw) = _norm_gradients()
    return [Result("dw", rms_norm.rms_norm_weight(x, r, dy), dw, 2.0**-20)]


def _rotate() -> list[Result]:
    """Rotate heads of 64 values."""
    q = _random(2, 7, 3, 64).transpose(1, 2)
    angles = _random(1, 1, 7, 32, dtype=torch.float32)
    cos, sin = (f(angles).to(BF16).repeat(1, 1, 1, 2) for f in (torch.cos, torch.sin))
    return [Result("y", rope.rotate(q, cos, sin, 1.0), plain_rotate(q, cos, sin))]


def _gated() -> list[Result]:
    """Compute SwiGLU."""
    gate, up = _random(3, 500), _random(500, 3).T.contiguous()
    return [Result("y", swiglu.gated(gate, up, False), plain_gated(gate, up), 2.0**-7)]


def _gated_backward() -> list[Result]:
    """Compute the gradients of SwiGLU."""
    gate, up, dy = _random(3, 500), _random(500, 3).T.contiguous(), _random(3, 500, 1)[:, :, 0]
    dgate, dup = swiglu.gated_backward(gate, up, dy.contiguous(), False)
    exact_gate = gate.double().requires_grad_()
    exact_up = up.double().requires_grad_()
    y = plain_gated(exact_gate, exact_up)
    expected = torch.autograd.grad(y, (exact_gate, exact_up), dy.double())
    return [
        Result("dgate", dgate, expected[0], 2.0**-7),
        Result("dup", dup, expected[1], 2.0**-7),
    ]


EXAMPLES: dict[str, Callable[[], list[Result]]] = {
    "dequantize_nf4": lambda: _dequantize(nf4_dequantize.dequantize),
    "dequantize_nf4_textbook": lambda: _dequantize(nf4_dequantize.dequantize_textbook),
    "quantize_nf4": lambda: _quantize(nf4_quantize.quantize),
    "quantize_nf4_textbook": lambda: _quantize(nf4_quantize.quantize_textbook),
    "double_quantize_nf4": _double_quantize,
    "gemv_nf4": lambda: _gemv(nf4_gemv.gemv),
    "gemv_nf4_textbook": lambda: _gemv(nf4_gemv.gemv_textbook),
    "matmul_nf4": _matmul,
    "cross_entropy": _cross_entropy,
    "adamw_8bit": _adamw,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rms_norm_weight": _rms_norm_weight,
    "rotate": _rotate,
    "gated": _gated,
    "gated_backward": _gated_backward,
}
