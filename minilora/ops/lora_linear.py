"""A frozen linear layer and its one adapter as one step, for dense and 4-bit weights.

    z = A x                  y  = W x + b + s · B z                    LoRA §4.1, eq. 3 (arXiv 2106.09685)
    q = s · Bᵀ dy            dx = Wᵀ dy + Aᵀ q,    dA = q xᵀ,    dB = s · dy zᵀ

Written apart (lora.py), the two terms are two tensors that are added in forward, and two gradients of x that are added
in backward. Here the second product is added into the first one's result as it is computed. Kept for backward: z
(r numbers a token), and x or what x is made of. A dense W of a 4-bit layer lies in a buffer that all layers share, for
as long as it is used.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.lora import LoRAAdapter, LoRALayer
from minilora.ops import Recipe, fast, recipe_of
from minilora.quant import NF4Linear


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


class _Workspace(threading.local):
    """One buffer a thread for a dense weight on the CPU, as large as the largest yet: a new one costs page faults."""

    buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.buffer[:size].view(dtype).view(shape)


_workspace = _Workspace()


def dense(parts: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """W (out, in), valid until the next call."""
    if len(parts) == 1:
        return parts[0]
    *codes, shape, blocksize = parts
    if not codes[0].is_cpu:
        return torch.ops.minilora.dequantize_nf4(*parts, dtype)
    W = _workspace.take(torch.Size(shape), dtype)
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
        y = F.linear(x_NI, dense(parts, x.dtype), bias)  # (N, out)
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
            dx = g @ dense((*codes, *ctx.layout), g.dtype)  # (N, in)
            dx = dx.addmm_(q, A.to(g.dtype)).view(ctx.shape)
        x = kept[0] if ctx.recipe is None else ctx.recipe.read(*kept)
        dA = q.T @ x.reshape(len(z), A.shape[1])  # (r, in)
        dB = (g.T @ z).mul_(ctx.s)  # (out, r)
        if ctx.needs_input_grad[3]:
            db = g.sum(0)
        return dx, dA.to(A.dtype), dB.to(B.dtype), db, *[None] * (len(codes) + len(ctx.layout) + 2)
