"""The gate of an MLP: y = f(g) · u, with f = silu (SwiGLU) or gelu in its tanh form (GeGLU), arXiv 2002.05202 eq. 6.

    du = dy · f(g)        dg = dy · u · f'(g)

Autograd keeps f(g) for the first; here it is computed again from g, which is kept for the second anyway.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels.ops import dispatch
from minilora_kernels.ops.mode import fast
from minilora_kernels.ops.recompute import Recipe, attach


def plain_gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """gate, up (…, D) -> (…, D)."""
    return _activation(gate, gelu) * up


def gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """The same."""
    if not fast():
        return plain_gated(gate, up, gelu)
    if not torch.is_grad_enabled():
        return _gated(gate, up, gelu)
    recipe = _GatedRecipe(gelu)
    y: Any = _Gated.apply(gate, up, recipe)
    return attach(y, recipe, gate, up)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    y = dispatch.gated(gate, up, gelu)
    return _activation(gate, gelu).mul_(up) if y is None else y


def _activation(x: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x, approximate="tanh") if gelu else F.silu(x)


class _GatedRecipe(Recipe):
    """y again for the layer behind, whose backward comes first; f(g) then is there for backward of the gate as well."""

    def __init__(self, gelu: bool) -> None:
        super().__init__(self.both)
        self.gelu = gelu
        self.active: Tensor | None = None

    def both(self, gate: Tensor, up: Tensor) -> Tensor:
        if (y := dispatch.gated(gate, up, self.gelu)) is not None:
            return y
        self.active = _activation(gate, self.gelu)
        return self.active * up

    def take(self, gate: Tensor) -> Tensor:
        """f(gate), to be written over."""
        active = _activation(gate, self.gelu) if self.active is None else self.active
        self.active = None
        return active


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recipe: _GatedRecipe) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recipe = recipe
        return _gated(gate, up, recipe.gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        (dy,), (gate, up) = grads, ctx.saved_tensors
        if found := dispatch.gated_backward(gate, up, dy, ctx.recipe.gelu):
            return *found, None
        du = ctx.recipe.take(gate).mul_(dy)
        if ctx.recipe.gelu:
            return torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh"), du, None
        return torch.ops.aten.silu_backward(dy * up, gate), du, None
