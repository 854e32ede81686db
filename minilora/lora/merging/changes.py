"""The change of a layer's weight by its active adapters, for merging and for parents that read it.

Some modules do not call a layer but read its weight: nn.TransformerEncoderLayer in eval mode, the
dt_proj of Mamba, the q, k, v projections of WavLM, a head that computes h Eᵀ with the E of the
embedding. `LoRALayer.weight` is therefore W + Σ s · B A while an adapter is active, and such a
module computes the same as the merged model, with gradients for A and B.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import is_conv1d
from minilora.lora.base_layers.dense_weight import dense_dtype
from minilora.lora.base_layers.linear_forward import holds_codes
from minilora.lora.embedding_conv import active_adapters
from minilora.lora.layer import LoRALayer
from minilora.quant.quantized_linear import QuantizedLinear


def deltas(layer: LoRALayer, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the change of the weight by each active adapter, in the layout of the base's weight.

    Args:
        layer: The layer.
        dtype: Dtype of the computation and of the results.
    """
    for adapter in active_adapters(layer):
        with torch.no_grad():
            delta = change_of_weight(layer.base_layer, adapter, dtype)
        yield delta


def change_of_weight(base: nn.Module, adapter: Any, dtype: torch.dtype) -> Tensor:
    """Return the change of the weight by one adapter, in the layout of the base's weight.

    It is differentiable with respect to the adapter's parameters.

    Args:
        base: The frozen layer.
        adapter: An adapter of it.
        dtype: Dtype of the computation and of the result.
    """
    delta_beside = getattr(adapter, "delta_beside", None)  # of a variant that depends on W
    if delta_beside is None:
        delta = adapter.delta(dtype)
    else:
        delta = delta_beside(base, dtype)
    return delta.T if is_conv1d(base) else delta


def read_merged(layer: LoRALayer, name: str) -> Any:
    """Return the weight or bias of a layer with its active adapters added, for a parent that reads.

    Every read computes the sum again, in fp32, and rounds it to the dtype of W. Dropout is not
    applied.

    Args:
        layer: A layer with an active adapter.
        name: "weight" or "bias".

    Returns:
        The weight in the layout of the base, or the bias. The weight of a layer with codes of
        other libraries is returned as it is stored: only the layer itself can multiply by it.

    Raises:
        ValueError: The layer is a convolution with groups, whose weight cannot hold its adapter.
    """
    base: Any = layer.base_layer
    adapters = active_adapters(layer)
    if name == "bias":
        return _bias_with(base.bias, adapters, dense_dtype(base))
    if isinstance(base, QuantizedLinear):
        W = base.dequantize()
    elif holds_codes(base):
        return base.weight
    else:
        W = base.weight
    merged = W.float()
    for adapter in adapters:
        if getattr(adapter, "groups", 1) > 1:
            raise ValueError(
                "a module reads the weight of a convolution with groups instead of calling it, and "
                "no weight can hold this adapter. Leave the convolution out of target_modules."
            )
        merged = merged + change_of_weight(base, adapter, torch.float32)
    return merged.to(W.dtype)


def _bias_with(
    bias: Tensor | None, adapters: Iterable[Any], dtype: torch.dtype | None
) -> Tensor | None:
    """Return b + Σ s · lora_bias in the dtype of b, or in `dtype`; None without any bias."""
    for adapter in adapters:
        if adapter.lora_bias is None:
            continue
        delta = adapter.scaling * adapter.lora_bias  # (out,)
        if bias is None:
            bias = delta.to(dtype)
        else:
            bias = (bias.float() + delta).to(bias.dtype)
    return bias
