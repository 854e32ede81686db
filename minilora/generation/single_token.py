"""Faster products of linear layers on a CPU with a single token.

Sums are in fp32 and rounded once, as in F.linear.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.quant.quantized_linear import QuantizedLinear
from minilora_kernels.c.bindings import token_product
from minilora_kernels.ops.mode import plain_now


@contextmanager
def matrix_vector(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model on a CPU take a single token fast, inside the context.

    Dense bf16 layers: compiled code reads each weight once (linear_token.c). F.linear, made for
    matrices, takes up to three times as long for the layers of a small model. Without a compiler, a
    processor with AMX takes `torch.mv`, because F.linear's product with one row fills AMX's tiles
    of 16 (benchmarks/training/choices.py, docs/LOG.md). Quantised layers look up the addresses of
    their codes only once.

    Args:
        model: the model; its layers get their own `forward` until the context ends.

    Yields:
        Nothing.
    """
    fast = _fast_forwards(model)
    for layer, forward in fast:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in fast:
            del layer.forward


def _fast_forwards(model: nn.Module) -> list[tuple[Any, Callable[[Tensor], Tensor]]]:
    """Return the layers that have a faster forward, with it."""
    layers: list[Any] = [m for m in model.modules() if "forward" not in vars(m)]
    fast: list[tuple[Any, Callable[[Tensor], Tensor]]] = []
    for layer in layers:
        dense = type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
        if dense and layer.weight.is_cpu:
            product = _dense_product(layer)
            if product is not None:
                fast.append((layer, partial(_one_token, layer, product)))
    sharded = any(hasattr(m, "unshard") for m in model.modules())  # FSDP's weights change address
    if plain_now() or sharded or torch.is_autocast_enabled("cpu"):
        return fast
    for layer in layers:
        if isinstance(layer, QuantizedLinear) and layer.weight.device.type == "cpu":
            fast.append((layer, layer.for_tokens()))
    return fast


def _dense_product(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """Return the fastest product of one token with a dense layer; None if that is F.linear."""
    compiled = None
    if not plain_now() and not torch.is_autocast_enabled("cpu") and layer.weight.is_contiguous():
        compiled = token_product(layer)
    if compiled is None and torch.cpu._is_amx_tile_supported():
        return partial(_vector_product, layer)
    return compiled


def _one_token(layer: nn.Linear, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return nn.Linear's output, (…, in) -> (…, out)."""
    is_token = x.numel() == layer.in_features == x.shape[-1]
    if not is_token or x.dtype != layer.weight.dtype:
        return F.linear(x, layer.weight, layer.bias)
    return product(x)


def _vector_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the output for one token by torch's product of a matrix and a vector."""
    token = x.reshape(-1)  # (in,)
    if layer.bias is None:
        y = torch.mv(layer.weight, token)  # (out,)
    else:
        y = torch.addmv(layer.bias, layer.weight, token)  # (out,)
    return y.view(*x.shape[:-1], -1)
