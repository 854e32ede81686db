"""Rotary positions: the halves of each head are the coordinates of points, turned by angles that grow with position.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)               RoFormer §3.2, eq. 34 (arXiv 2104.09864)

Turning back is turning by the negative angle, so backward needs nothing of x. The fast form writes each half in place
where the plain one makes four tensors; every rounding is the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels.ops import dispatch
from minilora_kernels.ops.mode import fast


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, d); cos, sin (B or 1, 1, T, d), each angle in both halves -> (B, heads, T, d)."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same; no gradient reaches cos and sin."""
    if fast() and torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType] untyped
    if fast():
        return _turn(x, cos, sin)
    return plain_rotate(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    if (y := dispatch.rotate(x, cos, sin, sign)) is not None:
        return y
    (x1, x2), half = x.chunk(2, dim=-1), (sin * sign).chunk(2, dim=-1)[0]
    y = x * cos
    y1, y2 = y.chunk(2, dim=-1)
    y1.sub_(x2 * half)
    y2.add_(x1 * half)
    return y
