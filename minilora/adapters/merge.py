"""Merging: fold the active adapters into the weight, W' = W + Σ s · B A, in a new model.

Summed in fp32 and rounded once, to the dtype of the base; a 4-bit base comes out dense. There is no unmerge: rounding
loses what it would need (in bf16, PEFT's merge and unmerge change 45 % of the base's weights).
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.inject import lora_configs, lora_layers
from minilora.lora import LoRAAdapter, LoRALayer
from minilora.modules import is_conv1d
from minilora.quant import NF4Linear
from minilora_kernels import quantize_nf4

STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "nf4": None}


def merged_weight(layer: nn.Module) -> Tensor:
    """W + Σ s · B A over the active adapters, fp32 (out, in); (in, out) for transformers' Conv1D, as it stores it."""
    if isinstance(layer, NF4Linear):
        return layer.dequantize(torch.float32)
    if not isinstance(layer, LoRALayer):
        return layer.get_parameter("weight").detach().float()
    W = merged_weight(layer.base_layer)
    for delta in deltas(layer, torch.float32):
        W = W + delta
    return W


def deltas(layer: LoRALayer, dtype: torch.dtype) -> Iterator[Tensor]:
    """s · B A of each active adapter, computed in `dtype`, laid out as the base stores its weight."""
    for name in layer.active:
        adapter = layer.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        delta = adapter.scaling * adapter.lora_B.detach().to(dtype) @ adapter.lora_A.detach().to(dtype)  # (out, in)
        yield delta.T if is_conv1d(layer.base_layer) else delta


def merge(model: nn.Module, storage: str | None = None) -> nn.Module:
    """A new model without adapters that computes what `model` does; `model` itself is not changed.

    storage: of the layers with an adapter or in 4 bits: "float32", "bfloat16" or "float16"; None takes the dtype of
        the weight each was made from. "nf4" quantises layers of a 4-bit base again, which costs most of a small
        adapter: measure it first (merge_report).
    Raises ValueError if no adapter is active, or for "nf4" without a 4-bit layer under one.
    """
    layers = lora_layers(model)
    if not any(layer.active for layer in layers.values()):
        raise ValueError("there is no active adapter to merge: inject, load_adapter or use_adapter first.")
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"storage: expected None or one of {', '.join(STORAGES)}, got {storage!r}.")
    inside = {id(layer.base_layer) for layer in layers.values()}
    to_change = {m for m in model.modules() if isinstance(m, (LoRALayer, NF4Linear)) and id(m) not in inside}
    if storage == "nf4":
        if not any(isinstance(layer.base_layer, NF4Linear) for layer in layers.values()):
            raise ValueError("storage='nf4': no layer with an adapter is in 4 bits; merge without it, then quantise.")
        replaced = {id(m): _quantized(m) for m in to_change if isinstance(m, LoRALayer)}
    else:
        dtype = None if storage is None else STORAGES[storage]
        replaced = {id(m): dense(m, dtype) for m in to_change}
    configs = lora_configs(model)
    for path, part in configs.parts.of(configs.parts.active).items():
        if isinstance(part, nn.Module):
            plain: Any = copy.deepcopy(configs.parts.originals[path])
            plain.load_state_dict(part.state_dict())  # rounded to the original's dtype, without the hooks of training
            replaced[id(part)] = plain
    merged = copy.deepcopy(model, replaced)  # which takes the replaced ones for the modules' copies
    for key in ("_lora_configs", "_trainable_before_lora"):
        merged.__dict__.pop(key, None)
    return merged


def dense(layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A LoRALayer or NF4Linear as a frozen dense layer, its active adapters merged; in the base's dtype by default."""
    base = layer.base_layer if isinstance(layer, LoRALayer) else layer
    if isinstance(base, NF4Linear):
        own = base.dtype
        linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        linear.register_parameter("bias", copy.deepcopy(base.bias))
    else:
        own = base.get_parameter("weight").dtype
        linear = copy.copy(base)
        linear._parameters = dict(base._parameters)
    weight = merged_weight(layer).to(dtype or own)
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return linear.train(layer.training)


def _quantized(layer: LoRALayer) -> nn.Module:
    """The layer merged and stored as its base is: a 4-bit one is quantised again, with its own block size and kind."""
    base = layer.base_layer
    if not isinstance(base, NF4Linear):
        return dense(layer)
    again = quantize_nf4(merged_weight(layer), base.blocksize, base.weight.double_quant)
    return NF4Linear(replace(again, dtype=base.dtype), copy.deepcopy(base.bias)).train(layer.training)
