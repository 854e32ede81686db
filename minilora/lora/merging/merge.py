"""Merging: add the active adapters to the weights, in a new model.

    W' = W + Σ s · B A,    b' = b + Σ s · b_A

The sum is computed in fp32 and rounded once, to the dtype of the base. A 4-bit base becomes dense,
and so does a base of bitsandbytes. The storage "nf4" keeps a 4-bit base in 4 bits (four_bits.py).
Merging cannot be undone: rounding loses the values that it would need (in bf16, PEFT's merge and
unmerge change weights of the base). Layers that share a weight still share it after merging if they
share their adapters too (tie="shared"). Otherwise the tie ends, and the config states it.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.common import (
    get_submodule,
    named_modules,
    output_layer,
    set_submodule,
    unwrap_model,
)
from minilora.common.progress import ProgressBar
from minilora.common.wrappers import wrappers_inside
from minilora.lora.base_layers.dense_weight import (
    dense_dtype,
    dense_weight,
    is_quantized,
    no_dense_weight,
)
from minilora.lora.embedding_conv import active_adapters, unwrapped
from minilora.lora.layer import LoRALayer, linear_features
from minilora.lora.merging.changes import deltas
from minilora.lora.merging.four_bits import (
    check_rounding,
    four_bit_weight,
    requantized_original,
)
from minilora.lora.registry import AdapterRegistry, lora_configs, lora_layers
from minilora.lora.trained_parts.trained_state import remove_hooks
from minilora.lora.trained_parts.trained_tokens import TrainedTokens
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantized_linear import QuantizedEmbedding, QuantizedLinear

STORAGES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "nf4": None,
}


# ---- one layer


def merged_weight(layer: nn.Module) -> Tensor:
    """Return W + Σ s · B A over the active adapters, in fp32.

    Args:
        layer: A LoRALayer, a QuantizedLinear, or any layer with a weight.

    Returns:
        The weight in the layout of the base: (out, in) for most layers.

    Raises:
        ValueError: The dense weight of this kind of layer cannot be read.
    """
    if not isinstance(layer, LoRALayer):
        return dense_weight(layer)
    W = dense_weight(layer.base_layer)
    for delta in deltas(layer, torch.float32):
        W = delta.contiguous().add_(W)  # in the memory of delta, which is not used again
    return W


def merged_bias(layer: nn.Module) -> Tensor | None:
    """Return b + Σ s · lora_bias over the active adapters.

    Args:
        layer: A LoRALayer, or any layer.

    Returns:
        The bias (out,), in fp32 if an adapter has a lora_bias; None without any bias.
    """
    bias: Tensor | None = getattr(unwrapped(layer), "bias", None)
    if bias is not None:
        bias = bias.detach()
    for adapter in active_adapters(layer):
        if adapter.lora_bias is None:
            continue
        delta = adapter.scaling * adapter.lora_bias.detach()  # (out,)
        if bias is None:
            bias = delta
        else:
            bias = bias.float() + delta
    return bias


def merged_from(layer: nn.Module) -> tuple[int, ...]:
    """Return a key of the weight and adapters of a layer.

    Layers with equal keys have the same merged weight and may share it.

    Args:
        layer: A LoRALayer, or any layer.
    """
    base = unwrapped(layer)
    parameters = base._parameters
    weight = parameters.get("weight", parameters.get("blocks", base))  # blocks: of a GGUF file
    adapters = active_adapters(layer)
    return (id(weight), *[id(adapter) for adapter in adapters])


def dense(layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a frozen dense copy of a layer, with its active adapters merged.

    Args:
        layer: A LoRALayer, or a layer in 4 or 8 bits.
        dtype: Dtype of the copy; None is the dtype from which the weight was made.
    """
    base = unwrapped(layer)
    bias = merged_bias(layer)
    own_dtype = dense_dtype(base)
    if isinstance(base, QuantizedEmbedding):
        plain: nn.Module = nn.Embedding(base.num_embeddings, base.embedding_dim, device="meta")
    elif is_quantized(base):
        in_features, out_features = linear_features(base)
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
    else:
        # Copy the module but not its parameters, which are replaced below.
        plain = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    weight = merged_weight(layer).to(dtype or own_dtype or torch.float32)
    plain.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if bias is not None:
        bias = bias.to(weight.dtype, copy=True)
        plain.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    return plain.train(layer.training)


def _quantized(
    path: str, layer: LoRALayer, rounding: str, seed: int, original: nn.Module | None
) -> nn.Module:
    """Return the merged layer, in 4 bits with the settings of its base if that is 4-bit."""
    base = layer.base_layer
    if not isinstance(base, NF4Linear):
        return dense(layer)
    if original is None:
        weight = four_bit_weight(layer, path, rounding, seed)
    else:
        weight = requantized_original(layer, path, original)
    bias = merged_bias(layer)
    if bias is not None:
        bias = bias.to(base.dtype, copy=True)
    # deepcopy: the scales of `weight` may be those of the base
    return NF4Linear(copy.deepcopy(weight), bias).train(layer.training)


# ---- a whole model


def merge(
    model: nn.Module,
    storage: str | None = None,
    *,
    rounding: str = "stochastic",
    seed: int = 0,
    original: nn.Module | None = None,
) -> nn.Module:
    """Return a new model without adapters that computes the same. `model` is not changed.

    The new model has no wrappers, such as those of torch.compile. A warning reports biases that a
    transformers model did not have before, because its config cannot describe them.

    Args:
        model: A model with an active adapter.
        storage: Storage of the layers that have an active adapter or are quantised: "float32",
            "bfloat16" or "float16"; None is the dtype from which each weight was made, or for 8-bit
            layers of bitsandbytes, which do not know it, the dtype of the rest of the model. "nf4"
            keeps merged layers of a 4-bit base in 4 bits: measure it first (`merge_report`).
        rounding: Rounding to "nf4". "stochastic" draws one of the two neighbouring levels, so that
            the update is kept on average, with the scales of the base. "nearest" computes new
            scales and takes the nearest level; it returns the base if the adapter is small, and is
            for comparison and for updates as large as the gap between two levels.
        seed: Seed of the draws. They depend on it and on the names of the layers only.
        original: The model in 16 or 32 bits that the base was quantised from. With "nf4", merged
            layers are then W₁₆ + Σ s · B A, quantised as the base was, without draws.

    Raises:
        ValueError: No adapter is active, the storage or the rounding is unknown, "nf4" is requested
            without a 4-bit layer under an active adapter, an adapter of a convolution with groups
            is active, the dense weight of a layer with an active adapter cannot be read, the scales
            of the base cannot hold half of an update, or `original` is given without "nf4" or lacks
            a layer.
    """
    model = unwrap_model(model)
    paths = {id(layer): path for path, layer in lora_layers(model).items()}
    layers = list(lora_layers(model).values())
    active = [layer for layer in layers if layer.active]
    _check_storage(active, storage)
    check_rounding(rounding)
    if original is not None and storage != "nf4":
        raise ValueError(
            f"original: expected storage='nf4' with it, got {storage!r}. To merge into the original "
            "in 16 bits, load the adapter into it and merge that model."
        )
    check_dense_weights(model)
    # Replacements by the id of the module that they replace. As the memo of deepcopy below, they
    # become the modules' copies.
    replaced: dict[int, Any] = {}
    dtype = STORAGES.get(storage or "")
    modules: list[nn.Module] = [*active]
    if storage != "nf4":
        modules = list(dict.fromkeys([*active, *_free_quantized_layers(model, layers)]))
    with ProgressBar("merge", len(modules), "layer") as bar:
        for module in modules:
            if storage == "nf4":
                layer = cast(LoRALayer, module)
                path = paths[id(module)]
                replaced[id(module)] = _quantized(path, layer, rounding, seed, original)
            else:
                own_dtype = dense_dtype(unwrapped(module)) or _dtype_of_the_rest(model)
                replaced[id(module)] = dense(module, dtype or own_dtype)
            bar.update()
    _share_merged_weights(modules, replaced)
    replaced |= _trained_modules(lora_configs(model))
    for layer in layers:
        if id(layer) not in replaced:  # its base is copied with the same memo, so that ties remain
            replaced[id(layer)] = copy.deepcopy(layer.base_layer, replaced)
    for wrapper, inner in wrappers_inside(model):  # the merged model has none
        replaced[id(wrapper)] = copy.deepcopy(inner, replaced)
    merged = copy.deepcopy(model, replaced)
    for key in ("_lora_configs", "_trainable_before_lora"):
        merged.__dict__.pop(key, None)
    remove_hooks(merged)
    _declare_untied(merged)
    _declare_dense(merged)
    if hasattr(merged, "save_pretrained"):
        _warn_of_new_biases(model)
    return merged


@contextmanager
def dequantized_weights(model: nn.Module) -> Iterator[None]:
    """Replace every QuantizedLinear by a dense layer with the same values in a `with` block.

    Text generation on a CPU otherwise dequantises every weight again for each token. The block
    needs the memory that they save. The quantised layers are put back at its end.

    Args:
        model: The model.
    """
    model = unwrap_model(model)
    layers = {
        path: layer for path, layer in named_modules(model) if isinstance(layer, QuantizedLinear)
    }
    try:
        for path, layer in layers.items():
            set_submodule(model, path, dense(layer))
        yield
    finally:
        for path, layer in layers.items():
            layer.train(get_submodule(model, path).training)
            set_submodule(model, path, layer)


def _check_storage(active: list[LoRALayer], storage: str | None) -> None:
    """Raise ValueError unless the layers with active adapters can be merged into this storage."""
    if not active:
        raise ValueError(
            "the model has no active adapter to merge: inject, load_adapter or set_adapter first."
        )
    if storage is not None and storage not in STORAGES:
        raise ValueError(
            f"storage: expected None or one of {', '.join(STORAGES)}, got {storage!r}."
        )
    has_4_bit_base = any(isinstance(layer.base_layer, NF4Linear) for layer in active)
    if storage == "nf4" and not has_4_bit_base:
        raise ValueError(
            "storage='nf4': no layer with an active adapter is in 4 bits; "
            "merge without it, then quantise."
        )


def check_dense_weights(model: nn.Module) -> None:
    """Raise ValueError for a layer with an active adapter whose dense weight cannot be read.

    Args:
        model: A model with adapters.
    """
    for path, layer in lora_layers(model).items():
        problem = no_dense_weight(layer.base_layer) if layer.active else None
        if problem is not None:
            raise ValueError(f"{path}: merging needs the dense weight. {problem}")


def _dtype_of_the_rest(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter that belongs to no quantised layer."""
    inside = []
    for path, module in named_modules(model):
        if isinstance(module, LoRALayer) or is_quantized(module):
            inside.append(f"{path}.")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.startswith(tuple(inside)):
            return parameter.dtype
    return torch.float32


def _free_quantized_layers(model: nn.Module, layers: Iterable[LoRALayer]) -> list[nn.Module]:
    """Return the quantised layers of a model, in a LoRALayer or without one."""
    wrapped = {id(layer.base_layer) for layer in layers}
    return [
        module
        for module in model.modules()
        if is_quantized(unwrapped(module)) and id(module) not in wrapped
    ]


def _share_merged_weights(layers: Iterable[nn.Module], replaced: dict[int, Any]) -> None:
    """Give merged layers with the same weight and the same adapters one parameter."""
    weights: dict[tuple[int, ...], Any] = {}
    for layer in layers:
        parameters = replaced[id(layer)]._parameters
        if "weight" in parameters:
            shared = weights.setdefault(merged_from(layer), parameters["weight"])
            parameters["weight"] = shared


def _trained_modules(registry: AdapterRegistry) -> dict[int, nn.Module]:
    """Return plain modules with the values of the trained copies, by id of the copy.

    They have the dtype of the originals, and not the hooks of training.
    """
    plain_modules: dict[int, nn.Module] = {}
    parts = registry.parts
    for name in parts.active:
        memo: dict[int, Any] = {}  # of deepcopy: with one memo, shared weights stay shared
        token_memo: dict[int, nn.Parameter] = {}  # the same for trained tokens
        for path, copied in parts.trained.get(name, {}).items():
            if not isinstance(copied, nn.Module):
                continue
            shared = registry[name].tie == "shared"
            original = cast(nn.Module, parts.originals[path])
            if not shared:
                memo = {}
            plain = copy.deepcopy(original, memo)
            if isinstance(copied, TrainedTokens):
                plain = copied.merged(copy.deepcopy(original), token_memo)
            else:
                plain.load_state_dict(copied.state_dict())
            plain_modules[id(copied)] = plain
    return plain_modules


def _declare_untied(model: Any) -> None:
    """Set tie_word_embeddings to False where the config claims a tie that no longer exists."""
    config: Any = getattr(model, "config", None)
    head = output_layer(model)
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return
    if getattr(head, "weight", None) is model.get_input_embeddings().weight:
        return
    if hasattr(model, "declare_untied"):
        model.declare_untied()
    else:
        config.tie_word_embeddings = False


def _declare_dense(model: Any) -> None:
    """Remove transformers' notes about bitsandbytes from a merged model, as it is dense now."""
    config: Any = getattr(model, "config", None)
    quantization: Any = getattr(config, "quantization_config", None)
    method = getattr(getattr(model, "quantization_method", None), "value", None)
    if quantization is None or method != "bitsandbytes":
        return
    del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    model.is_quantized = False


def _warn_of_new_biases(model: nn.Module) -> None:
    """Warn of layers that get a bias by merging a lora_bias."""
    added = []
    for path, layer in lora_layers(model).items():
        if merged_bias(layer) is not None and layer.base_layer.bias is None:
            added.append(path)
    if added:
        warnings.warn(
            f"{len(added)} layers have a bias now (lora_bias), first {added[0]}: "
            "save_pretrained writes it, but from_pretrained ignores it. "
            "Keep the adapter unmerged (save_adapter) to use it elsewhere.",
            stacklevel=3,
        )
