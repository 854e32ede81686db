"""RMSNorm: the plain form, and one that keeps x and a number a row for backward.

    h = x · r,  r = 1 / √(mean(x²) + ε)        y = w · h                      (arXiv 1910.07467, eq. 4)
    dx = r · (dh - h · mean(dh · h)),          dh = w · dy,       dw = Σ dy · h

All in fp32 between x and y. Autograd keeps h twice in fp32, eight bytes a value where x has two. Here rows are worked
on a cacheful at a time. Gemma stores w - 1, so that weight decay pulls to 1, and rounds once; Llama rounds h first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.ops import fast, row_blocks


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
        return _RMSNorm.apply(x, weight, eps, gemma)  # pyright: ignore[reportReturnType] untyped
    return plain_rms_norm(x, weight, eps, gemma)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        x_ND, y = x.reshape(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_ND, r_N1 = y.view(x_ND.shape), torch.empty(len(x_ND), 1, dtype=_wide(x), device=x.device)
        for rows in row_blocks(len(x_ND), x.shape[-1], x.device):
            h = x_ND[rows].to(_wide(x))
            r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
            r_N1[rows], h = r, h * r
            y_ND[rows] = (1 + weight.to(h.dtype)) * h if gemma else weight * h.to(x.dtype)
        ctx.save_for_backward(x, weight, r_N1)
        ctx.gemma = gemma
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        x, weight, r_N1 = ctx.saved_tensors
        x_ND, g_ND = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        w = weight.to(_wide(x)) + ctx.gemma  # (D,)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
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
