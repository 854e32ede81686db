"""RMSNorm: reference implementation, and a fast form that keeps less for backward.

    h = x · r,  r = 1 / √(mean(x²) + ε)        y = w · h              (arXiv:1910.07467, eq. 4)
    dx = r · (dh - h · mean(dh · h)),          dh = w · dy,       dw = Σ dy · h

All steps between x and y are in fp32. Gemma stores w - 1, so that weight decay pulls w to 1, and
rounds once; Llama rounds h before the product.

Backward keeps x, w and r, one number a row, and computes h = x · r again. (Autograd would keep h
twice in fp32: eight bytes a value, where x has two.) A layer that reads y computes y again from x
and w as well (recompute.py). In torch the rows are processed in blocks that fit in the cache.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels import allocator
from minilora_kernels.allocator import row_blocks
from minilora_kernels.c import bindings
from minilora_kernels.ops.dispatch import use_triton
from minilora_kernels.ops.mode import fast
from minilora_kernels.ops.recompute import Recipe, attach_recipe


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Return the norm of each row: the reference implementation.

    Args:
        x: Tensor of shape (…, D).
        weight: Vector w, or w - 1 if `gemma`, of shape (D,).
        eps: ε of the norm.
        gemma: The weight is stored as w - 1, and the result is rounded once.

    Returns:
        y of shape (…, D), in the dtype of x (Llama: of x times weight).
    """
    h = x.to(_wide_dtype(x))
    mean = h.square().mean(-1, keepdim=True)  # (…, 1)
    h = h * torch.rsqrt(mean + eps)
    return _times_weight(h, weight, gemma, x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Return the norm of each row.

    An x and a weight of different dtypes take the reference implementation.

    Args:
        x: Tensor of shape (…, D).
        weight: Vector w, or w - 1 if `gemma`, of shape (D,).
        eps: ε of the norm.
        gemma: The weight is stored as w - 1, and the result is rounded once.

    Returns:
        y with the shape and dtype of x.
    """
    if not fast() or x.dtype != weight.dtype:
        return plain_rms_norm(x, weight, eps, gemma)
    if not torch.is_grad_enabled():
        y, _ = _forward(x, weight, eps, gemma)
        return y

    def compute(x: Tensor, weight: Tensor) -> Tensor:
        y, _ = _forward(x, weight, eps, gemma)
        return y

    y, _ = cast(tuple[Tensor, Tensor], _RMSNorm.apply(x, weight, eps, gemma))
    return attach_recipe(y, Recipe(compute), x, weight)


class _RMSNorm(torch.autograd.Function):
    """The norm with its own backward, which keeps x, w and r."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, gemma: bool
    ) -> tuple[Tensor, Tensor]:
        y, r = _forward(x, weight, eps, gemma)
        ctx.save_for_backward(x, weight, r)
        ctx.gemma = gemma
        ctx.mark_non_differentiable(r)
        return y, r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        x, weight, r = ctx.saved_tensors
        with_weight = ctx.needs_input_grad[1]
        dx, dw = _backward(x, weight, r, grads[0], with_weight, ctx.gemma)
        if dw is not None:
            dw = dw.to(weight.dtype)
        return dx, dw, None, None


def _forward(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Return y (…, D), and r (…, 1) in fp32."""
    if use_triton(x, weight):
        from minilora_kernels.triton import rms_norm as kernels

        return kernels.rms_norm(x, weight, eps, gemma)
    compiled = bindings.rms_norm(x, weight, eps, gemma)
    if compiled is not None:
        return compiled
    return _forward_in_torch(x, weight, eps, gemma)


def _forward_in_torch(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Return y and r, block of rows by block of rows."""
    D = x.shape[-1]
    y = allocator.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=_wide_dtype(x), device=x.device)  # (…, 1)
    x_ND = x.reshape(-1, D)  # (N, D)
    y_ND = y.reshape(-1, D)  # (N, D)
    r_N1 = r.reshape(-1, 1)  # (N, 1)
    for rows in row_blocks(len(x_ND), D, x.device):
        h = x_ND[rows].to(r.dtype)  # (R, D)
        mean = h.square().mean(-1, keepdim=True)  # (R, 1)
        r_N1[rows] = torch.rsqrt(mean + eps)
        y_ND[rows] = _times_weight(h * r_N1[rows], weight, gemma, x.dtype)
    return y, r


def _backward(
    x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, with_weight: bool, gemma: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dx (…, D), and dw (D,) in fp32 if it is wanted."""
    if use_triton(x, weight, dy):
        from minilora_kernels.triton import rms_norm as kernels

        dx = kernels.rms_norm_backward(x, weight, r, dy, gemma)
        dw = None
        if with_weight:
            dw = kernels.rms_norm_weight(x, r, dy)
        return dx, dw
    compiled = bindings.rms_norm_backward(x, weight, r, dy, with_weight, gemma)
    if compiled is not None:
        return compiled
    return _backward_in_torch(x, weight, r, dy, with_weight, gemma)


def _backward_in_torch(
    x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, with_weight: bool, gemma: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dx and dw, block of rows by block of rows."""
    D = x.shape[-1]
    x_ND = x.reshape(-1, D)  # (N, D)
    dy_ND = dy.reshape(-1, D)  # (N, D)
    r_N1 = r.reshape(-1, 1)  # (N, 1)
    shift = 1 if gemma else 0
    w = weight.to(_wide_dtype(x)) + shift  # (D,)
    dx = allocator.empty_like(x)
    dx_ND = dx.view(x_ND.shape)  # (N, D)
    dw = None
    if with_weight:
        dw = torch.zeros_like(w)  # (D,)
    for rows in row_blocks(len(x_ND), D, x.device):
        g = dy_ND[rows].to(w.dtype, copy=True)  # (R, D)
        h = x_ND[rows] * r_N1[rows]  # (R, D), in fp32 because r is
        if dw is not None:
            dw += (g * h).sum(0)
        dh = g.mul_(w)
        # dx = r · (dh - h · mean(dh · h))
        mean = (dh * h).mean(-1, keepdim=True)  # (R, 1)
        dh.sub_(h.mul_(mean))
        dx_ND[rows] = dh.mul_(r_N1[rows])
    return dx, dw


def _times_weight(h: Tensor, weight: Tensor, gemma: bool, dtype: torch.dtype) -> Tensor:
    """Return w · h; Gemma rounds after the product, Llama before it, as in transformers."""
    if gemma:
        return ((1 + weight.to(h.dtype)) * h).to(dtype)
    return weight * h.to(dtype)


def _wide_dtype(x: Tensor) -> torch.dtype:
    """Return fp32, or fp64 for an x in fp64."""
    return torch.promote_types(x.dtype, torch.float32)
