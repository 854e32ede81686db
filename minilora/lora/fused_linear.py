"""A frozen linear layer and its one adapter as one step, for dense and 4-bit weights.

    z = A x                  y  = W x + b + s · B z                    LoRA §4.1, eq. 3 (arXiv 2106.09685)
    q = s · Bᵀ dy            dx = Wᵀ dy + Aᵀ q,    dA = q xᵀ,    dB = s · dy zᵀ

Written apart (layer.py), the two terms are two tensors that are added in forward, and two gradients of x that are added
in backward. Here the second product is added into the first one's result as it is computed. Kept for backward: z
(r numbers a token), and x or what x is made of. A dense W of a 4-bit layer lies in a buffer that all layers share, for
as long as it is used.

There is no kernel for it, on a GPU either. With N tokens and D = in = out, z and y take 2 N D r multiply-adds beside
the N D² of W x, but their own 6 N D bytes in 16 bits: x is read, y read and written. addmm moves no more than that, so
a kernel of one's own for y += s · B z could not win. Only the product W x could, by adding as it stores, and would have
to be as fast as the vendor's in all else (`python benchmarks/gpu_model/fusing.py`, docs/LOG.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import allocator
from minilora_kernels.ops.mode import fast
from minilora_kernels.ops.recompute import Recipe, recipe_of


def plain_lora_linear(layer: LoRALayer, x: Tensor) -> Tensor:
    """x (…, in) -> W x + b + s · B A dropout(x), (…, out): the layer's own terms, one after the other."""
    h = layer.base_layer(x)
    for name in layer.active:
        h = layer.adapters[name](x, h, layer.base_layer)
    return h


def lora_linear(layer: LoRALayer, x: Tensor) -> Tensor:
    """The same. Anything but one plain adapter without dropout on a plain frozen matrix takes the plain form."""
    base, adapter = layer.base_layer, layer.adapters[layer.active[0]] if len(layer.active) == 1 else None
    parts = _parts(base, x)
    if (
        parts is None
        or type(adapter) is not LoRAAdapter
        or (adapter.training and not isinstance(adapter.dropout, nn.Identity))
        or adapter.lora_bias is not None
        or any(m._forward_hooks or m._forward_pre_hooks for m in (base, adapter))  # somebody wants to see the two terms
        or not (fast() and torch.is_grad_enabled())
        or torch.is_autocast_enabled(x.device.type)
    ):
        return plain_lora_linear(layer, x)
    bias = None if base.bias is None else base.bias.to(x.dtype)  # pyright: ignore[reportCallIssue] a parameter
    inputs = x, adapter.lora_A, adapter.lora_B, bias, adapter.scaling, recipe_of(x)
    return _LoRALinear.apply(*inputs, *parts)  # pyright: ignore[reportReturnType] untyped


def _parts(base: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """(W,) of a dense layer, the parts of a 4-bit one; None for another layer, or another dtype than x's."""
    if type(base) is NF4Linear:
        return base.weight.parts()
    if type(base) is nn.Linear and base.weight.dtype == x.dtype and not base.weight.requires_grad:
        return (base.weight,)
    return None


def dense(parts: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """W (out, in), valid until the next call."""
    if len(parts) == 1:
        return parts[0]
    *codes, shape, blocksize = parts
    if not codes[0].is_cpu:
        return torch.ops.minilora.dequantize_nf4(*parts, dtype)
    W = allocator.empty(shape, dtype, codes[0].device)
    torch.ops.minilora.dequantize_nf4_out(*codes, blocksize, W)
    return W


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, s: float,
        again: tuple[Recipe | None, list[Tensor]], *parts: Any,
    ) -> Tensor:  # fmt: skip
        x_NI = x.reshape(-1, x.shape[-1])
        z = x_NI @ A.to(x.dtype).T  # (N, r)
        y = allocator.empty((len(x_NI), len(B)), x.dtype, x.device)  # (N, out)
        W = dense(parts, x.dtype)
        torch.mm(x_NI, W.T, out=y) if bias is None else torch.addmm(bias, x_NI, W.T, out=y)
        y.addmm_(z, B.to(x.dtype).T, alpha=s)
        ctx.s, ctx.shape = s, x.shape
        ctx.recipe, kept = again  # of x
        ctx.layout = [part for part in parts if not isinstance(part, Tensor | None)]
        ctx.codes = len(parts) - len(ctx.layout)
        ctx.save_for_backward(z, A, B, *parts[: ctx.codes], *kept)
        return y.view(*x.shape[:-1], len(B))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        z, A, B, *tensors = ctx.saved_tensors
        codes, kept = tensors[: ctx.codes], tensors[ctx.codes :]
        g = grads[0].reshape(len(z), len(B))  # (N, out)
        q = (g @ B.to(g.dtype)).mul_(ctx.s)  # (N, r)
        dx = db = None
        if ctx.needs_input_grad[0]:
            # dx = Wᵀ dy + Aᵀ q
            dx = allocator.empty((len(g), A.shape[1]), g.dtype, g.device)  # (N, in)
            dx = torch.mm(g, dense((*codes, *ctx.layout), g.dtype), out=dx).addmm_(q, A.to(g.dtype)).view(ctx.shape)
        x = kept[0] if ctx.recipe is None else ctx.recipe.read(*kept)
        dA = q.T @ x.reshape(len(z), A.shape[1])  # (r, in)
        dB = (g.T @ z).mul_(ctx.s)  # (out, r)
        if ctx.needs_input_grad[3]:
            db = g.sum(0)
        return dx, dA.to(A.dtype), dB.to(B.dtype), db, *[None] * (len(codes) + len(ctx.layout) + 2)
