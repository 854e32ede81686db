"""Gate of an MLP (SwiGLU, GeGLU): reference implementation, and a fast form that keeps less.

    y = f(g) · u,    f = SiLU (SwiGLU) or GELU in its tanh form (GeGLU)    (arXiv:2002.05202, eq. 6)
    du = dy · f(g)        dg = dy · u · f'(g)

Backward keeps g and u. It computes f(g), which autograd would keep, from g again. A layer that
reads y computes y again from g and u as well (recompute.py). Its backward comes first, and the
backward of the gate then uses the f(g) of that computation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels.c import bindings
from minilora_kernels.ops.dispatch import use_triton
from minilora_kernels.ops.mode import fast
from minilora_kernels.ops.recompute import Recipe, attach_recipe


def plain_gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """Return f(gate) · up: the reference implementation.

    Args:
        gate: Tensor g of shape (…, D).
        up: Tensor u with the shape of `gate`.
        gelu: f is GELU in its tanh form; by default f is SiLU.

    Returns:
        y of shape (…, D).
    """
    return _activation(gate, gelu) * up


def gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """Return f(gate) · up.

    Args:
        gate: Tensor g of shape (…, D).
        up: Tensor u with the shape of `gate`.
        gelu: f is GELU in its tanh form; by default f is SiLU.

    Returns:
        y of shape (…, D).
    """
    if not fast():
        return plain_gated(gate, up, gelu)
    if not torch.is_grad_enabled():
        return _forward(gate, up, gelu)
    recipe = _GatedRecipe(gelu)
    y: Any = _Gated.apply(gate, up, recipe)
    return attach_recipe(y, recipe, gate, up)


class _Gated(torch.autograd.Function):
    """The gate with its own backward, which keeps g and u."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recipe: "_GatedRecipe") -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recipe = recipe
        return _forward(gate, up, recipe.gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        gate, up = ctx.saved_tensors
        dgate, dup = _backward(gate, up, grads[0], ctx.recipe)
        return dgate, dup, None


class _GatedRecipe(Recipe):
    """The recipe of y, which also keeps f(g) for the backward of the gate, if torch computed it."""

    def __init__(self, gelu: bool) -> None:
        super().__init__(self.compute_gated)
        self.gelu = gelu
        self.active: Tensor | None = None

    def compute_gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return y = f(gate) · up again."""
        y = _fused_forward(gate, up, self.gelu)
        if y is not None:
            return y
        self.active = _activation(gate, self.gelu)
        return self.active * up

    def take_active(self, gate: Tensor) -> Tensor:
        """Return f(gate) in memory that the caller may overwrite."""
        active = self.active
        self.active = None
        if active is None:
            active = _activation(gate, self.gelu)
        return active


def _forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Return y by Triton, C or torch."""
    y = _fused_forward(gate, up, gelu)
    if y is not None:
        return y
    return _activation(gate, gelu).mul_(up)


def _fused_forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor | None:
    """Return y by Triton or C, or None."""
    if use_triton(gate, up):
        from minilora_kernels.triton import swiglu as kernels

        return kernels.gated(gate, up, gelu)
    return bindings.gated(gate, up, gelu)


def _backward(gate: Tensor, up: Tensor, dy: Tensor, recipe: _GatedRecipe) -> tuple[Tensor, Tensor]:
    """Return dgate and dup by Triton, C or torch."""
    if use_triton(gate, up, dy):
        from minilora_kernels.triton import swiglu as kernels

        return kernels.gated_backward(gate, up, dy, recipe.gelu)
    compiled = bindings.gated_backward(gate, up, dy, recipe.gelu)
    if compiled is not None:
        return compiled
    dup = recipe.take_active(gate).mul_(dy)
    if recipe.gelu:
        dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
    else:
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
    return dgate, dup


def _activation(x: Tensor, gelu: bool) -> Tensor:
    """Return f(x)."""
    if gelu:
        return F.gelu(x, approximate="tanh")
    return F.silu(x)
