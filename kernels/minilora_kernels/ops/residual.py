"""Residual sum x + y, in memory that is reused.

The sums of a layer are the tensors that are kept the longest. They take their memory from the
allocator, which reuses that of the step before. Backward keeps nothing: dx = dy = the gradient of
the sum.
"""

from typing import Any

import torch
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.ops.mode import fast


def residual(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y.

    Args:
        x: Tensor of any shape.
        y: Tensor with the shape of x.

    Returns:
        The sum.
    """
    if fast() and torch.is_grad_enabled() and x.dtype == y.dtype:
        return _Sum.apply(x, y)  # pyright: ignore[reportReturnType] untyped
    return x + y


class _Sum(torch.autograd.Function):
    """The sum of two tensors of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, out=allocator.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]
