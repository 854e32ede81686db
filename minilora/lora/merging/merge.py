"""Merging: fold the active adapters into the weight, W' = W + Σ s · B A, and b' = b + Σ s · b_A, in a new model.

Summed in fp32 and rounded once, to the dtype of the base; a 4-bit base comes out dense. There is no unmerge: rounding
loses what it would need (in bf16, PEFT's merge and unmerge change weights of the base). Layers that share a weight
still share it if they share its adapters too (tie="shared"); else they are no longer tied, and the config says so.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.common import is_conv1d, output_layer
from minilora.lora.embedding_conv import active_adapters, unwrapped
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import Injected, lora_configs, lora_layers
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import quantize_nf4

STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "nf4": None}


def merged_weight(layer: nn.Module) -> Tensor:
    """W + Σ s · B A over the active adapters, fp32, laid out as the base stores W: (out, in) for most."""
    if isinstance(layer, NF4Linear):
        return layer.dequantize(torch.float32)
    if not isinstance(layer, LoRALayer):
        return layer.get_parameter("weight").detach().float()
    W = merged_weight(layer.base_layer)
    for delta in deltas(layer, torch.float32):
        W = delta.contiguous().add_(W)  # in delta's memory, which nobody else holds
    return W


def deltas(layer: LoRALayer, dtype: torch.dtype) -> Iterator[Tensor]:
    """s · B A of each active adapter, computed in `dtype`, laid out as the base stores its weight."""
    for adapter in active_adapters(layer):
        beside = getattr(adapter, "delta_beside", None)  # of a variant whose change depends on W
        delta = adapter.delta(dtype) if beside is None else beside(layer.base_layer, dtype)
        yield delta.T if is_conv1d(layer.base_layer) else delta


def merged_bias(layer: nn.Module) -> Tensor | None:
    """b + Σ s · lora_bias over the active adapters (out,), fp32 where there are any; None if there is neither."""
    bias: Tensor | None = getattr(unwrapped(layer), "bias", None)
    bias = None if bias is None else bias.detach()
    for adapter in active_adapters(layer):
        if adapter.lora_bias is not None:
            delta = adapter.scaling * adapter.lora_bias.detach()
            bias = delta if bias is None else bias.float() + delta
    return bias


def merged_from(layer: nn.Module) -> tuple[int, ...]:
    """What the merged weight is made from: layers for which it is equal have one weight, and may share it."""
    base = unwrapped(layer)
    return id(base._parameters.get("weight", base)), *map(id, active_adapters(layer))


def merge(model: nn.Module, storage: str | None = None) -> nn.Module:
    """A new model without adapters that computes what `model` does; `model` itself is not changed.

    storage: of the layers with an active adapter or in 4 bits: "float32", "bfloat16" or "float16"; None takes the
        dtype of the weight each was made from. "nf4" quantises layers of a 4-bit base again, which costs most of a
        small adapter: measure it first (merge_report).
    A bias that a transformers model did not have is announced, as its config has no word for it.
    Raises ValueError if no adapter is active, for an unknown storage, for "nf4" without a 4-bit layer under one, and
    for a convolution with groups.
    """
    layers = lora_layers(model).values()
    at_work = [layer for layer in layers if layer.active]
    if not at_work:
        raise ValueError("there is no active adapter to merge: inject, load_adapter or set_adapter first.")
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"storage: expected None or one of {', '.join(STORAGES)}, got {storage!r}.")
    if storage == "nf4":
        if not any(isinstance(layer.base_layer, NF4Linear) for layer in at_work):
            raise ValueError("storage='nf4': no layer with an adapter is in 4 bits; merge without it, then quantise.")
        replaced: dict[int, Any] = {id(layer): _quantized(layer) for layer in at_work}
    else:
        inside = {id(layer.base_layer) for layer in layers}
        in_4_bits = [m for m in model.modules() if isinstance(unwrapped(m), NF4Linear) and id(m) not in inside]
        dtype = None if storage is None else STORAGES[storage]
        replaced = {id(m): dense(m, dtype) for m in dict.fromkeys([*at_work, *in_4_bits])}
    weights: dict[tuple[int, ...], Any] = {}
    for layer in at_work:
        parameters = replaced[id(layer)]._parameters
        if "weight" in parameters:
            parameters["weight"] = weights.setdefault(merged_from(layer), parameters["weight"])
    replaced |= _trained_parts(lora_configs(model))
    for layer in layers:  # the others go back to their base, copied in one go with the model: what is tied stays so
        if id(layer) not in replaced:
            replaced[id(layer)] = copy.deepcopy(layer.base_layer, replaced)
    merged = copy.deepcopy(model, replaced)  # which takes the replaced ones for the modules' copies
    for key in ("_lora_configs", "_trainable_before_lora"):
        merged.__dict__.pop(key, None)
    _declare_untied(merged)
    added = [path for path, m in lora_layers(model).items() if merged_bias(m) is not None and m.base_layer.bias is None]
    if added and hasattr(merged, "save_pretrained"):
        warnings.warn(
            f"{len(added)} layers have a bias now (lora_bias), first {added[0]}: what save_pretrained writes of it is "
            "left out by from_pretrained. Keep the adapter unmerged (save_adapter) to use it elsewhere.",
            stacklevel=2,
        )
    return merged


def _trained_parts(configs: Injected) -> dict[int, Any]:
    """id of each module that trains with an active adapter → a plain one that holds its values."""
    found = {}
    for name in configs.parts.active:
        memo: dict[int, Any] = {}  # with one for all, copies share what the originals share
        for path, part in configs.parts.trained.get(name, {}).items():
            if isinstance(part, nn.Module):
                memo = memo if configs[name].tie == "shared" else {}
                found[id(part)] = plain = copy.deepcopy(cast(nn.Module, configs.parts.originals[path]), memo)
                plain.load_state_dict(part.state_dict())  # in the original's dtype, without the hooks of training
    return found


def _declare_untied(model: Any) -> None:
    """tie_word_embeddings=False where the config says True and the weights are two."""
    config: Any = getattr(model, "config", None)
    head = output_layer(model)
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        if hasattr(model, "declare_untied"):
            model.declare_untied()
        else:
            config.tie_word_embeddings = False


def dense(layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A LoRALayer or NF4Linear as a frozen dense layer, its active adapters merged; in the base's dtype by default."""
    base, bias = unwrapped(layer), merged_bias(layer)
    if isinstance(base, NF4Linear):
        own = base.dtype
        plain: nn.Module = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    else:
        own = base.get_parameter("weight").dtype
        plain = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # all but what is replaced below
    weight = merged_weight(layer).to(dtype or own)
    plain.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if bias is not None:
        plain.register_parameter("bias", nn.Parameter(bias.to(weight.dtype, copy=True), requires_grad=False))
    return plain.train(layer.training)


@contextmanager
def dequantized_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every NF4Linear of `model` is dense, of the same values: made once instead of in each forward pass.

    For text on a CPU, where each token would make them again. It takes the 16 bits a weight that NF4 saves, meanwhile;
    afterwards the 4-bit layers are back in place.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    try:
        for path, layer in layers.items():
            model.set_submodule(path, dense(layer))
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer.train(model.get_submodule(path).training))


def _quantized(layer: LoRALayer) -> nn.Module:
    """The layer merged and stored as its base is: a 4-bit one is quantised again, with its own block size and kind."""
    base = layer.base_layer
    if not isinstance(base, NF4Linear):
        return dense(layer)
    again = quantize_nf4(merged_weight(layer), base.blocksize, base.weight.double_quant)
    bias = merged_bias(layer)
    bias = None if bias is None else bias.to(base.dtype, copy=True)
    return NF4Linear(replace(again, dtype=base.dtype), bias).train(layer.training)
