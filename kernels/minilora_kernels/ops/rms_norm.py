"""RMSNorm: the plain form, and one that keeps x and a number a row for backward.

    h = x · r,  r = 1 / √(mean(x²) + ε)        y = w · h                      (arXiv 1910.07467, eq. 4)
    dx = r · (dh - h · mean(dh · h)),          dh = w · dy,       dw = Σ dy · h

All in fp32 between x and y. Autograd keeps h twice in fp32, eight bytes a value where x has two. Here rows are worked
on a cacheful at a time. Gemma stores w - 1, so that weight decay pulls to 1, and rounds once; Llama rounds h first.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels import allocator
from minilora_kernels.allocator import row_blocks
from minilora_kernels.ops import dispatch
from minilora_kernels.ops.mode import fast
from minilora_kernels.ops.recompute import Recipe, attach


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """x (…, D), weight (D,) -> (…, D) in x's dtype."""
    h = x.to(_wide(x))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if gemma:
        return ((1 + weight.to(h.dtype)) * h).to(x.dtype)
    return weight * h.to(x.dtype)  # rounded before the product, as transformers does


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """The same; x and weight of two dtypes take the plain form."""
    if fast() and x.dtype == weight.dtype:
        if not torch.is_grad_enabled():
            return _normed(x, weight, eps, gemma)[0]
        y, r = cast(tuple[Tensor, Tensor], _RMSNorm.apply(x, weight, eps, gemma))
        return attach(y, Recipe(lambda x, weight: _normed(x, weight, eps, gemma)[0]), x, weight)
    return plain_rms_norm(x, weight, eps, gemma)


def _normed(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """y, and r (…, 1) in fp32."""
    if found := dispatch.rms_norm(x, weight, eps, gemma):
        return found
    y = allocator.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=_wide(x), device=x.device)
    x_ND, y_ND, r_N1 = (t.reshape(-1, t.shape[-1]) for t in (x, y, r))
    for rows in row_blocks(len(x_ND), x.shape[-1], x.device):
        h = x_ND[rows].to(r.dtype)
        r_N1[rows] = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        y_ND[rows] = _weighted(h * r_N1[rows], weight, gemma, x.dtype)
    return y, r


def _weighted(h: Tensor, weight: Tensor, gemma: bool, dtype: torch.dtype) -> Tensor:
    return ((1 + weight.to(h.dtype)) * h).to(dtype) if gemma else weight * h.to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
        y, r = _normed(x, weight, eps, gemma)
        ctx.save_for_backward(x, weight, r)
        ctx.gemma = gemma
        ctx.mark_non_differentiable(r)
        return y, r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        x, weight, r_all = ctx.saved_tensors
        if found := dispatch.rms_norm_backward(x, weight, r_all, grads[0], ctx.needs_input_grad[1], ctx.gemma):
            dx, dw = found
            return dx, None if dw is None else dw.to(weight.dtype), None, None
        x_ND, g_ND, r_N1 = (t.reshape(-1, t.shape[-1]) for t in (x, grads[0], r_all))
        w = weight.to(_wide(x)) + ctx.gemma  # (D,)
        dx = allocator.empty_like(x)
        dx_ND, dw = dx.view(x_ND.shape), torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for rows in row_blocks(len(x_ND), x.shape[-1], x.device):
            g, r = g_ND[rows].to(w.dtype, copy=True), r_N1[rows]
            h = x_ND[rows] * r  # in fp32, for r is
            if dw is not None:
                dw += (g * h).sum(0)
            dh = g.mul_(w)
            # dx = r · (dh - h · mean(dh · h))
            dx_ND[rows] = dh.sub_(h.mul_((dh * h).mean(-1, keepdim=True))).mul_(r)
        return dx, None if dw is None else dw.to(weight.dtype), None, None
