"""Merging: fold the active adapters into the weight, W' = W + Σ s · B A, in a new model.

Summed in fp32 and rounded once, to the dtype of the base; a 4-bit base comes out dense. There is no unmerge: rounding
loses what it would need (in bf16, PEFT's merge and unmerge change 45 % of the base's weights).
"""

import copy

import torch
from torch import Tensor, nn

from minilora.inject import lora_layers
from minilora.lora import LoRAAdapter, LoRALayer
from minilora.modules import is_conv1d
from minilora.quant import NF4Linear


def merged_weight(layer: nn.Module) -> Tensor:
    """W + Σ s · B A over the active adapters, fp32 (out, in); (in, out) for transformers' Conv1D, as it stores it."""
    if isinstance(layer, NF4Linear):
        return layer.dequantize(torch.float32)
    if not isinstance(layer, LoRALayer):
        return layer.get_parameter("weight").detach().float()
    W = merged_weight(layer.base_layer)
    for name in layer.active:
        adapter = layer.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        delta = adapter.scaling * adapter.lora_B.detach() @ adapter.lora_A.detach()  # (out, in)
        W = W + (delta.T if is_conv1d(layer.base_layer) else delta)
    return W


def merge(model: nn.Module) -> nn.Module:
    """A new model without adapters that computes what `model` does; `model` itself is not changed.

    Every linear layer with an adapter or in 4 bits becomes a dense one, in the dtype of the weight it was made from.
    Raises ValueError if no adapter is active.
    """
    layers = lora_layers(model)
    if not any(layer.active for layer in layers.values()):
        raise ValueError("there is no active adapter to merge: inject, load_adapter or use_adapter first.")
    inside = {id(layer.base_layer) for layer in layers.values()}
    to_dense = {m for m in model.modules() if isinstance(m, (LoRALayer, NF4Linear)) and id(m) not in inside}
    replaced = {id(module): dense(module) for module in to_dense}  # deepcopy takes these for the modules' copies
    merged = copy.deepcopy(model, replaced)
    for key in ("_lora_configs", "_trainable_before_lora"):
        merged.__dict__.pop(key, None)
    return merged


def dense(layer: nn.Module) -> nn.Module:
    """A LoRALayer or NF4Linear as a frozen dense layer, its active adapters merged."""
    base = layer.base_layer if isinstance(layer, LoRALayer) else layer
    if isinstance(base, NF4Linear):
        dtype = base.dtype
        linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        linear.register_parameter("bias", copy.deepcopy(base.bias))
    else:
        dtype = base.get_parameter("weight").dtype
        linear = copy.copy(base)
        linear._parameters = dict(base._parameters)
    linear.register_parameter("weight", nn.Parameter(merged_weight(layer).to(dtype), requires_grad=False))
    return linear.train(layer.training)
