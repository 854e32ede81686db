"""Rotary position embeddings: reference implementation, and a fast form.

The two halves of a head are the coordinates of points. Each point is rotated by an angle that grows
with the position:

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)        RoFormer §3.2, eq. 34 (arXiv:2104.09864)

Backward rotates the gradient by the negative angle. It keeps cos and sin, which all layers share,
and nothing of x. The fast form writes each half in place, where the reference makes four tensors;
every rounding is the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels.c import bindings
from minilora_kernels.ops.dispatch import use_triton
from minilora_kernels.ops.mode import fast


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by the angles of its position: the reference implementation.

    Args:
        x: Tensor of shape (B, heads, T, d).
        cos: Cosine of the angles, of shape (B or 1, 1, T, d), each angle in both halves.
        sin: Sine of the angles, with the shape of `cos`.

    Returns:
        y of shape (B, heads, T, d).
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by the angles of its position; cos and sin receive no gradient.

    Args:
        x: Tensor of shape (B, heads, T, d).
        cos: Cosine of the angles, of shape (B or 1, 1, T, d), each angle in both halves.
        sin: Sine of the angles, with the shape of `cos`.

    Returns:
        y of shape (B, heads, T, d).
    """
    if not fast():
        return plain_rotate(x, cos, sin)
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin, 1.0)
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType] untyped


class _Rotate(torch.autograd.Function):
    """The rotation with its own backward, which keeps cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return x rotated by `sign` times the angles, (B, heads, T, d)."""
    if use_triton(x, cos, sin) and x.stride(-1) == 1:
        from minilora_kernels.triton import rope as kernels

        return kernels.rotate(x, cos, sin, sign)
    compiled = bindings.rotate(x, cos, sin, sign)
    if compiled is not None:
        return compiled
    return _rotate_in_torch(x, cos, sin, sign)


def _rotate_in_torch(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return the rotation, each half written in place."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    sin_half, _ = (sin * sign).chunk(2, dim=-1)  # (B or 1, 1, T, d/2)
    y = x * cos  # (B, heads, T, d)
    y1, y2 = y.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    y1.sub_(x2 * sin_half)
    y2.add_(x1 * sin_half)
    return y
