"""x + y, whose sum takes its memory from the pool: of all a layer makes, its sums are kept the longest."""

from typing import Any

import torch
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.ops.mode import fast


def residual(x: Tensor, y: Tensor) -> Tensor:
    """Two tensors of one shape."""
    if fast() and torch.is_grad_enabled() and x.dtype == y.dtype:
        return _Sum.apply(x, y)  # pyright: ignore[reportReturnType] untyped
    return x + y


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, out=allocator.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]
