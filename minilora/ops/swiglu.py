"""The gate of an MLP: y = f(g) · u, with f = silu (SwiGLU) or gelu in its tanh form (GeGLU), arXiv 2002.05202 eq. 6.

    du = dy · f(g)        dg = dy · u · f'(g)

Autograd keeps f(g) for the first; here it is computed again from g, which is kept for the second anyway.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.ops import fast


def plain_gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """gate, up (…, D) -> (…, D)."""
    return _activation(gate, gelu) * up


def gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """The same."""
    if fast():
        return _Gated.apply(gate, up, gelu)  # pyright: ignore[reportReturnType] untyped
    return plain_gated(gate, up, gelu)


def _activation(x: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x, approximate="tanh") if gelu else F.silu(x)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _activation(gate, gelu).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        (g,), (gate, up) = grads, ctx.saved_tensors
        du = _activation(gate, ctx.gelu).mul_(g)
        if ctx.gelu:
            return torch.ops.aten.gelu_backward(g * up, gate, approximate="tanh"), du, None
        return torch.ops.aten.silu_backward(g * up, gate), du, None
