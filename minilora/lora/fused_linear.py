"""A frozen linear layer and its adapter in one autograd step, for dense and quantised weights.

    z = A x           y  = W x + b + s · B z               LoRA §4.1, eq. 3 (arXiv:2106.09685)
    q = s · Bᵀ dy     dx = Wᵀ dy + Aᵀ q,    dA = q xᵀ,    dB = s · dy zᵀ

As separate steps (layer.py), W x and s · B z are two tensors that forward adds, and backward adds
two gradients of x. Here the second product is added into the memory of the first one.

α. The factor s = α/r is applied in three places: to B z when it is added to y, to q, and to dB. A,
B and z never contain it.

Dtypes. A and B are fp32 parameters. Forward and backward each cast them to the dtype of x and
compute all products in it. The gradients dA and dB are computed in that dtype too and then cast to
fp32. W is dense in the dtype of x, or quantised and dequantised to that dtype.

Kept for backward are
    z                  (N, r) in the dtype of x, for dB
    A, B               the fp32 parameters themselves, not copies, for q, dx and dA
    W                  the dense parameter, or the codes and scales, both stored anyway
    x, or its recipe   for dA. A norm or gate that computed x left a recipe: how to compute x again
                       from tensors that it keeps itself (minilora_kernels/ops/recompute.py)

Not kept are y, the 16-bit copies of A and B, and the dense W of a quantised layer. Backward
dequantises again, on a CPU into a buffer that all layers share.

This step has no hand-written kernel, not even on a GPU. With N tokens and D = in = out, z and
s · B z take 2 N D r multiply-adds, and W x takes N D². The term must read x, read y and write y:
6 N D bytes in 16 bits. addmm moves no more bytes, so a hand-written kernel for y += s · B z would
not be faster. Only a kernel that adds B z while it stores W x could save time, and it would have to
be as fast as the vendor's product (`python benchmarks/gpu_model/fusing.py`, docs/LOG.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.quant.quantized_linear import QuantizedLinear
from minilora_kernels import allocator
from minilora_kernels.ops.mode import fast
from minilora_kernels.ops.recompute import Recipe, recipe_of
from minilora_kernels.quantized_weight import TENSORS, dequantize_parts, dequantize_parts_into


def plain_lora_linear(layer: LoRALayer, x: Tensor) -> Tensor:
    """Return W x + b + Σ s · B A dropout(x), the reference implementation.

    Args:
        layer: The layer and its adapters.
        x: Input, (…, in).

    Returns:
        Output, (…, out).
    """
    h = layer.base_layer(x)  # (…, out)
    for name in layer.active:
        h = layer.adapters[name](x, h, layer.base_layer)  # (…, out)
    return h


def lora_linear(layer: LoRALayer, x: Tensor) -> Tensor:
    """Return the same as `plain_lora_linear`, in one autograd step where that is possible.

    The fused step is for training with one active LoRAAdapter, without dropout and lora_bias, on a
    frozen nn.Linear or a QuantizedLinear. Everything else takes the reference implementation.

    Args:
        layer: The layer and its adapters.
        x: Input, (…, in).

    Returns:
        Output, (…, out).
    """
    base: Any = layer.base_layer
    weight_parts = _weight_parts(base, x)
    if weight_parts is None or not _can_fuse(layer, x):
        return plain_lora_linear(layer, x)
    adapter: Any = layer.adapters[layer.active[0]]
    bias = base.bias
    if bias is not None:
        bias = bias.to(x.dtype)  # (out,)
    y: Any = _LoRALinear.apply(
        x, adapter.lora_A, adapter.lora_B, bias, adapter.scaling, recipe_of(x), *weight_parts
    )
    return y  # (…, out)


def _can_fuse(layer: LoRALayer, x: Tensor) -> bool:
    """Return True if the adapters and the present mode allow the fused step."""
    if len(layer.active) != 1:
        return False
    adapter = layer.adapters[layer.active[0]]
    if type(adapter) is not LoRAAdapter or adapter.lora_bias is not None:
        return False
    if adapter.training and not isinstance(adapter.dropout, nn.Identity):
        return False
    for module in (layer.base_layer, adapter):
        if module._forward_hooks or module._forward_pre_hooks:
            return False  # a hook needs the two terms separately
    if not fast() or not torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled(x.device.type)


def _weight_parts(base: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """Return (W,) of a dense layer, the parts and kind of a quantised one, or None for others."""
    if isinstance(base, QuantizedLinear) and type(base).forward is QuantizedLinear.forward:
        weight = base.weight
        return (*weight.parts(), weight.kind)
    if type(base) is nn.Linear:
        W = base.weight
        if W.dtype == x.dtype and not W.requires_grad:
            return (W,)
    return None


def dense(weight_parts: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Return W (out, in). The values are valid until the next call.

    On a CPU a quantised weight is dequantised into a buffer that the next layer uses again.

    Args:
        weight_parts: (W,), or the parts of a QuantizedWeight and its kind.
        dtype: Dtype of a dequantised weight.
    """
    if len(weight_parts) == 1:
        return weight_parts[0]
    *parts, kind = weight_parts
    codes = parts[0]
    if not codes.is_cpu:
        return dequantize_parts(kind, tuple(parts), dtype)  # (out, in)
    shape = parts[TENSORS[kind]]
    W = allocator.empty(shape, dtype, codes.device)  # (out, in)
    dequantize_parts_into(kind, tuple(parts), W)
    return W


class _LoRALinear(torch.autograd.Function):
    """y = W x + b + s · B A x; the module's docstring lists the gradients and the kept tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        s: float,
        recipe_of_x: tuple[Recipe | None, list[Tensor]],
        *weight_parts: Any,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])  # (N, in)
        z = x_NI @ A.to(x.dtype).T  # (N, r)
        y = allocator.empty((len(x_NI), len(B)), x.dtype, x.device)  # (N, out)
        W = dense(weight_parts, x.dtype)  # (out, in)
        if bias is None:
            torch.mm(x_NI, W.T, out=y)
        else:
            torch.addmm(bias, x_NI, W.T, out=y)
        y.addmm_(z, B.to(x.dtype).T, alpha=s)  # y += s · B z

        weight_tensors = [part for part in weight_parts if isinstance(part, Tensor | None)]
        ctx.weight_numbers = weight_parts[len(weight_tensors) :]  # without its tensors
        ctx.weight_tensor_count = len(weight_tensors)
        ctx.recipe, inputs_of_recipe = recipe_of_x  # without a recipe the list holds x itself
        ctx.s = s
        ctx.x_shape = x.shape
        ctx.save_for_backward(z, A, B, *weight_tensors, *inputs_of_recipe)
        return y.view(*x.shape[:-1], len(B))  # (…, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        z, A, B, *saved = ctx.saved_tensors
        weight_tensors = saved[: ctx.weight_tensor_count]
        inputs_of_recipe = saved[ctx.weight_tensor_count :]
        dy = grads[0].reshape(len(z), len(B))  # (N, out)
        # q = s · Bᵀ dy
        q = (dy @ B.to(dy.dtype)).mul_(ctx.s)  # (N, r)
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = Wᵀ dy + Aᵀ q
            dx = allocator.empty((len(dy), A.shape[1]), dy.dtype, dy.device)  # (N, in)
            W = dense((*weight_tensors, *ctx.weight_numbers), dy.dtype)  # (out, in)
            torch.mm(dy, W, out=dx)
            del W  # its buffer is free again
            dx.addmm_(q, A.to(dy.dtype))
            dx = dx.view(ctx.x_shape)  # (…, in)
        if ctx.recipe is None:
            (x,) = inputs_of_recipe  # (…, in)
        else:
            x = ctx.recipe.read(*inputs_of_recipe)  # (…, in)
        # dA = q xᵀ
        dA = q.T @ x.reshape(len(z), A.shape[1])  # (r, in)
        # dB = s · dy zᵀ
        dB = (dy.T @ z).mul_(ctx.s)  # (out, r)
        db = None
        if ctx.needs_input_grad[3]:
            db = dy.sum(0)  # (out,)
        no_gradient = [None] * (2 + len(weight_tensors) + len(ctx.weight_numbers))  # s, recipe, W
        return dx, dA.to(A.dtype), dB.to(B.dtype), db, *no_gradient
