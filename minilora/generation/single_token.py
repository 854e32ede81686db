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

from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels.ops.mode import plain_now


@contextmanager
def matrix_vector(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model on a CPU take a single token fast, inside the context.

    Dense bf16 layers: where the processor has AMX, one token goes through `torch.mv`, because
    F.linear's product with one row fills AMX's tiles of 16. Without AMX, F.linear is the faster of
    the two (benchmarks/training/choices.py, docs/LOG.md). 4-bit layers look up the addresses of
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
    if torch.cpu._is_amx_tile_supported():
        for layer in layers:
            dense = type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
            if dense and layer.weight.is_cpu:
                fast.append((layer, partial(_one_token, layer)))
    sharded = any(hasattr(m, "unshard") for m in model.modules())  # FSDP's weights change address
    if plain_now() or sharded or torch.is_autocast_enabled("cpu"):
        return fast
    for layer in layers:
        if type(layer) is NF4Linear and layer.packed.is_cpu:
            fast.append((layer, layer.for_tokens()))
    return fast


def _one_token(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return nn.Linear's output, (…, in) -> (…, out)."""
    if x.numel() != layer.in_features:
        return F.linear(x, layer.weight, layer.bias)
    token = x.reshape(-1)  # (in,)
    if layer.bias is None:
        y = torch.mv(layer.weight, token)  # (out,)
    else:
        y = torch.addmv(layer.bias, layer.weight, token)  # (out,)
    return y.view(*x.shape[:-1], -1)
