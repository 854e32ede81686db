"""Injection of adapters into a model, and its reversal.

    model.layers.0.self_attn.q_proj: Linear
        → LoRALayer(base_layer=Linear, adapters={"default": LoRAAdapter})

`inject` finds the targeted layers, puts a LoRALayer around each of them, and freezes everything
else (except the copies of `modules_to_save` and the biases that the config trains). It works on any
nn.Module: the model keeps its class, its forward and its parameters. Only entries of `_modules` and
the flags `requires_grad` change. All errors are raised before the first change.

A first reading can skip everything about `tie`, which is for layers that share one weight.
"""

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import (
    get_submodule,
    is_within,
    named_parameters,
    set_submodule,
    unwrap_model,
)
from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import Adapter, EmbeddingAdapter, new_adapter, unwrapped
from minilora.lora.fused_linear import lora_linear
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.changes import read_merged
from minilora.lora.registry import lora_configs, lora_layers
from minilora.lora.targets import find_targets, left_out_by_all_linear, names_to_save
from minilora.lora.trained_parts.modules_to_save import Part
from minilora.lora.trained_parts.trained_state import remove_hooks
from minilora.lora.trained_parts.trained_tokens import TrainedTokens, trained_tokens
from minilora.lora.trained_parts.vocabulary import vocabulary_size
from minilora.lora.variants.choose import as_variant


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    name: str = "default",
    seed: int = 0,
) -> list[str]:
    """Give every targeted layer an adapter, make it the active one, and freeze everything else.

    With "all-linear", a warning names the matrices that get no adapter, with their share of the
    bytes: experts that a model holds in one parameter, and layers that compute something else than
    W x + b, such as routers.

    Args:
        model: The model to change.
        config: The layers to adapt and the hyperparameters; None is `LoRAConfig()`.
        name: Name of the adapter. The model must not have one of this name.
        seed: Seed of the initial values. They depend on the seed, the layer's name and the config
            (PiSSA and LoftQ: also on W), and on nothing else.

    Returns:
        Names of the adapted layers, in model order.

    Raises:
        ValueError: An entry of the config matches nothing or would do nothing, a named layer
            computes something else than W x + b, or a layer shares its weight and `config.tie` is
            not set. The model is then unchanged.
    """
    model = unwrap_model(model)
    config = config or LoRAConfig()
    adapters = new_adapters(model, config, seed)
    parts = new_parts(model, config, adapters)
    _check_tie(model, config, adapters, parts)
    _check_effect(model, config, adapters, parts)
    left_out = left_out_by_all_linear(model, config, adapters)
    _warn_of_large_ranks(adapters)
    attach(model, adapters, config, name, parts)
    lora_configs(model).seeds[name] = seed
    if left_out is not None:
        warnings.warn(
            f'target_modules="all-linear" adapts {len(adapters)} layers. {left_out}. '
            "Only a layer that computes W x + b gets an adapter.",
            stacklevel=2,
        )
    layers = lora_layers(model, remove_duplicate=False)
    return [path for path, layer in layers.items() if name in layer.adapters]


def new_adapters(model: nn.Module, config: LoRAConfig, seed: int = 0) -> dict[str, Adapter]:
    """Return new adapters for the targeted layers, by layer name. The model is not changed.

    With tie="shared", layers that share a weight share one adapter. Otherwise only the named layers
    are adapted, as in PEFT.

    Args:
        model: The model.
        config: The layers to adapt and the hyperparameters.
        seed: Seed of the initial values.

    Raises:
        ValueError: An entry of the config matches nothing or does not fit its layer.
    """
    adapters: dict[str, Adapter] = {}
    for path, layer in find_targets(model, config).items():
        adapters[path] = _new_adapter(path, layer, config, seed)
    if config.tie == "shared":
        _share_adapters(model, adapters)
    return adapters


def new_parts(model: nn.Module, config: LoRAConfig, adapters: Iterable[str]) -> dict[str, Part]:
    """Return copies of the modules and biases that train with an adapter. The model is not changed.

    Args:
        model: The model.
        config: The config of the adapter (`modules_to_save`, `bias`, `trainable_token_indices`,
            `tie`).
        adapters: Names of the adapted layers.

    Raises:
        ValueError: An entry matches nothing, cannot train, or conflicts with an adapter.
    """
    parts = lora_configs(model).parts
    tokens = trained_tokens(
        model, config.trainable_token_indices, parts.originals, parts.tied(model)
    )
    copies = parts.new_copies(
        model,
        names_to_save(model, config),
        config.bias,
        set(adapters),
        shared=config.tie == "shared",
    )
    for path in tokens:
        if path in adapters or any(is_within(path, other) for other in copies):
            raise ValueError(
                f"trainable_token_indices: {path!r} has an adapter or is one of modules_to_save: "
                "leave it out of one of the two."
            )
    return copies | tokens


def attach(
    model: nn.Module,
    adapters: dict[str, Adapter],
    config: LoRAConfig,
    name: str,
    parts: dict[str, Part],
) -> None:
    """Put new adapters into a model as the only active ones, and freeze everything else.

    Args:
        model: The model to change.
        adapters: Adapters by layer name, from `new_adapters`.
        config: Their config.
        name: Their common name.
        parts: Copies of modules and biases that train with them, from `new_parts`.

    Raises:
        ValueError: The name exists already or cannot be a name.
    """
    _check_new_name(model, name)
    registry = lora_configs(model)
    if not registry:  # the first adapter: `eject` restores this state
        trainable = [path for path, p in named_parameters(model) if p.requires_grad]
        model.__dict__["_trainable_before_lora"] = trainable
        registry.vocabulary = vocabulary_size(model)
    model.requires_grad_(False)
    new_layers: dict[int, LoRALayer] = {}  # by id of the base: a module with two names stays one
    for path, adapter in adapters.items():
        layer = get_submodule(model, path)
        if not isinstance(layer, LoRALayer):
            base = layer
            if id(base) not in new_layers:
                new_layers[id(base)] = _new_lora_layer(base)
            layer = new_layers[id(base)]
            set_submodule(model, path, layer)
        new_base = adapter.__dict__.pop("new_base", None)  # the 4-bit layer of LoftQ
        if new_base is not None:
            layer.base_layer = new_base
        if name not in layer.adapters:
            layer.add_adapter(name, adapter)
    registry[name] = config
    for layer in lora_layers(model).values():
        layer.use([name] if name in layer.adapters else [])
    registry.parts.add(model, name, parts)


def eject(model: nn.Module) -> list[str]:
    """Undo every `inject`: put the original layers back, trainable as before.

    Adapters that were not saved are lost. No method changes W, except LoftQ: it replaced W by a
    4-bit form, which stays.

    Args:
        model: The model to change.

    Returns:
        Names of the restored layers.
    """
    model = unwrap_model(model)
    lora_configs(model).parts.activate(model, [])
    layers = lora_layers(model, remove_duplicate=False)
    for path, layer in layers.items():
        set_submodule(model, path, layer.base_layer)
    trainable = model.__dict__.pop("_trainable_before_lora", None)
    if trainable is not None:
        for path, parameter in named_parameters(model):
            parameter.requires_grad_(path in trainable)
    model.__dict__.pop("_lora_configs", None)
    remove_hooks(model)
    return list(layers)


def _new_adapter(path: str, layer: nn.Module, config: LoRAConfig, seed: int) -> Adapter:
    """Return the adapter of one layer with its initial values."""
    r, lora_alpha = config.strength(path)
    layer_seed = _layer_seed(seed, path)
    try:
        adapter = new_adapter(
            layer,
            r,
            lora_alpha,
            config.lora_dropout,
            config.use_rslora,
            config.lora_bias,
            seed=layer_seed,
        )
        gaussian = config.init_lora_weights == "gaussian"
        if gaussian and not isinstance(adapter, EmbeddingAdapter):  # there B is the random factor
            generator = torch.Generator("cpu").manual_seed(layer_seed)
            adapter.lora_A.data.normal_(0, 1 / r, generator=generator)
        if config.use_dora or config.begins_from_weight:
            return as_variant(adapter, layer, config, layer_seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return adapter


def _layer_seed(seed: int, path: str) -> int:
    """Return a 63-bit seed that depends on the adapter's seed and the layer's name."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _share_adapters(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Give layers that share a weight one adapter, that of the embedding (tie="shared")."""
    for path, others in lora_configs(model).parts.tied(model).items():
        if path not in adapters:
            continue
        group = [name for name in adapters if name == path or name in others]  # in model order
        if any(hasattr(adapters[name], "lora_magnitude_vector") for name in group):
            raise ValueError(
                f'use_dora with tie="shared": {group} share a weight, and DoRA has a length for '
                "each column of an embedding but for each row of an output layer, so one adapter "
                'cannot serve both. tie="untie" adapts each alone; or leave use_dora out.'
            )
        embeddings = [name for name in group if isinstance(adapters[name], EmbeddingAdapter)]
        left_out = sorted(set(others) - set(adapters))
        if not embeddings or left_out:
            raise ValueError(
                'tie="shared" is for an embedding and linear layers that share its weight, '
                f"all of them: {path!r} shares it with {others}, "
                f'of which {left_out} are left out. tie="untie" may do.'
            )
        strengths = {(adapters[name].r, adapters[name].scaling) for name in group}
        if len(strengths) > 1:
            raise ValueError(
                'tie="shared": rank_pattern and alpha_pattern must give '
                f"{group} one rank and strength."
            )
        for name in group:
            adapters[name] = adapters[embeddings[0]]


def _check_new_name(model: nn.Module, name: str) -> None:
    """Raise ValueError for a name that exists already or cannot be the name of an adapter."""
    if any(name in layer.adapters for layer in lora_layers(model).values()):
        raise ValueError(
            f"adapter {name!r} exists already. "
            f"Choose another name, or delete_adapter(model, {name!r})."
        )
    LoRALayer(nn.Identity(), r=None).add_adapter(name, nn.Identity())  # raises for a bad name


def _check_tie(
    model: nn.Module, config: LoRAConfig, adapters: Iterable[str], parts: dict[str, Part]
) -> None:
    """Raise ValueError for a shared weight without `tie`, and for `tie` without a shared weight."""
    changed = list(adapters)
    for path, part in parts.items():
        if isinstance(part, nn.Module) and not isinstance(part, TrainedTokens):
            changed.append(path)  # trained tokens are shared by all layers of one weight
    tied = lora_configs(model).parts.tied(model)
    for root in changed:
        for path in tied:
            if not is_within(path, root):
                continue
            others = [name for name in tied[path] if not is_within(name, root)]
            if _is_one_module(model, path, others, changed):
                continue
            if config.tie is None:
                raise ValueError(
                    f"{root!r} shares its weight with {others[0]!r} (tied). Choose one: "
                    'LoRAConfig(tie="shared") gives all of them one update, and they stay tied; '
                    f'tie="untie" changes {root!r} alone, and a merged or saved model is not tied.'
                )
            return
    if config.tie is not None:
        raise ValueError(
            f"tie: {config.tie!r} would do nothing: nothing that trains shares its weight. "
            "Leave it out."
        )


def _is_one_module(model: nn.Module, path: str, others: list[str], changed: list[str]) -> bool:
    """Return True if the other paths are names of the same module, and all of them are changed."""
    module = get_submodule(model, path)
    for name in others:
        if name not in changed or get_submodule(model, name) is not module:
            return False
    return True


def _check_effect(
    model: nn.Module, config: LoRAConfig, adapters: Iterable[str], parts: dict[str, Part]
) -> None:
    """Raise ValueError for a dropout or bias setting that would do nothing."""
    bases = [unwrapped(get_submodule(model, path)) for path in adapters]
    if config.lora_dropout and all(isinstance(base, nn.Embedding) for base in bases):
        raise ValueError(
            "lora_dropout would do nothing: token ids cannot be dropped, "
            "and only embeddings are targeted. Set it to 0."
        )
    has_biases = any(isinstance(part, nn.Parameter) for part in parts.values())
    if config.bias != "none" and not has_biases:
        raise ValueError(
            f'bias: {config.bias!r} would do nothing: there is no bias to train. Leave it "none".'
        )


def _warn_of_large_ranks(adapters: dict[str, Adapter]) -> None:
    """Warn of ranks above the smaller side of a layer. The additional rank cannot be used."""
    large = [path for path, adapter in adapters.items() if adapter.r > adapter.max_rank]
    if not large:
        return
    first = adapters[large[0]]
    warnings.warn(
        f"r: {len(large)} of {len(adapters)} layers have a rank above their smaller side, first "
        f"{large[0]} with r={first.r}, of which {first.max_rank} can be used. The rest costs memory "
        "only: lower r, or give these layers another rank with rank_pattern.",
        stacklevel=3,  # the caller of inject
    )


def _new_lora_layer(base: nn.Module) -> LoRALayer:
    """Return a LoRALayer without adapters that takes the fused path and loads bare states."""
    layer = LoRALayer(base, r=None)
    layer.fused = lora_linear
    layer.merged = read_merged
    layer.register_load_state_dict_pre_hook(_accept_bare_state)
    return layer


def _accept_bare_state(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let `load_state_dict` read the state of a model without adapters; a pre-hook.

    The tensors go to the base, and the adapters keep their values.
    """
    if f"{prefix}weight" not in state:
        return
    adapter_prefix = f"{prefix}adapters."
    base_prefix = f"{prefix}base_layer."
    for key in list(state):
        if key.startswith(prefix) and not key.startswith((adapter_prefix, base_prefix)):
            state[base_prefix + key.removeprefix(prefix)] = state.pop(key)
    for key, value in layer.state_dict(prefix=prefix).items():
        if key.startswith(adapter_prefix):
            state.setdefault(key, value)
