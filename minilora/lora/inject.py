"""Put adapters into a model: find the layers, replace each by a LoRALayer around it, freeze the rest; and undo it.

    model.layers.0.self_attn.q_proj: Linear   →   LoRALayer(base_layer=Linear, adapters={"default": LoRAAdapter})

Works on any nn.Module. Class, forward and parameters stay; entries of `_modules` change, and what requires grad. All is
found before anything is replaced: what matches nothing raises first. `tie` may wait for a second reading.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import ends_with, output_layer, unknown, within
from minilora.lora.config import LoRAConfig, fits_pattern
from minilora.lora.embedding_conv import Adapter, EmbeddingAdapter, is_adaptable, is_linear, new_adapter, unwrapped
from minilora.lora.fused_linear import lora_linear
from minilora.lora.layer import LoRALayer
from minilora.lora.modules_to_save import Part
from minilora.lora.registry import lora_configs, lora_layers
from minilora.lora.variants.choose import vary

# What PEFT adapts when target_modules is None, by the model's type.
_Q_AND_V = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "opt")
DEFAULT_TARGETS = {"gpt2": ["c_attn"], "t5": ["q", "v"]} | dict.fromkeys(_Q_AND_V, ["q_proj", "v_proj"])


def inject(model: nn.Module, config: LoRAConfig | None = None, name: str = "default", seed: int = 0) -> list[str]:
    """Give every targeted layer of `model` an adapter, make it the active one and freeze everything else.

    Args:
        config: what to adapt; None is `LoRAConfig()`.
        name: the adapter's name. One that the model already has raises ValueError.
        seed: initial values depend on this, the layer's name and `config` (PiSSA, LoftQ: on W), and on nothing else.

    Returns the names of the adapted layers, in model order. Raises ValueError, with the model untouched, for a
    target, exclusion, pattern or layer number that matches nothing, for a rank larger than its layer, and for one that
    shares its weight unless `config.tie` says what that is to mean.
    """
    config = config or LoRAConfig()
    adapters = new_adapters(model, config, seed)
    parts = new_parts(model, config, adapters)
    _check_tie(model, config, adapters, parts)
    if config.lora_dropout and all(isinstance(unwrapped(model.get_submodule(path)), nn.Embedding) for path in adapters):
        raise ValueError("lora_dropout would do nothing: ids cannot be dropped, and only embeddings are targeted.")
    if config.bias != "none" and not any(isinstance(part, nn.Parameter) for part in parts.values()):
        raise ValueError(f'bias: {config.bias!r} would do nothing: there is no bias to train. Leave it "none".')
    attach(model, adapters, config, name, parts)
    lora_configs(model).seeds[name] = seed
    return [path for path, layer in lora_layers(model, remove_duplicate=False).items() if name in layer.adapters]


def new_adapters(model: nn.Module, config: LoRAConfig, seed: int = 0) -> dict[str, Adapter]:
    """The adapters that `config` asks for, initialised, by the name of their layer. Changes nothing.

    tie="shared": layers that share a weight share one adapter, the embedding's. Otherwise, as in PEFT, what is named
    is adapted and nothing else.
    """
    adapters = {path: _new_adapter(path, layer, config, seed) for path, layer in find_targets(model, config).items()}
    for path, others in lora_configs(model).parts.tied(model).items() if config.tie == "shared" else ():
        if path not in adapters:
            continue
        group = [name for name in adapters if name == path or name in others]  # in model order
        first = next((name for name in group if isinstance(adapters[name], EmbeddingAdapter)), group[0])
        if not isinstance(adapters[first], EmbeddingAdapter) or not adapters.keys() >= {*others}:
            raise ValueError(
                f'tie="shared" is for an embedding and linear layers that share its weight, all of them: {path!r} '
                f'shares it with {others}, of which {sorted({*others} - {*adapters})} are left out. tie="untie" may do.'
            )
        if len({(adapters[name].r, adapters[name].scaling) for name in group}) > 1:
            raise ValueError(f'tie="shared": rank_pattern and alpha_pattern must give {group} one rank and strength.')
        adapters |= dict.fromkeys(group, adapters[first])
    return adapters


def new_parts(model: nn.Module, config: LoRAConfig, adapters: Iterable[str]) -> dict[str, Part]:
    """Copies of the modules and biases that `config` trains beside the layers named `adapters`. Changes nothing."""
    wanted, shared = _saved(model, config), config.tie == "shared"
    return lora_configs(model).parts.new(model, wanted, config.bias, set(adapters), shared)


def attach(model: nn.Module, adapters: dict[str, Adapter], config: LoRAConfig, name: str,
           parts: dict[str, Part]) -> None:  # fmt: skip
    """Put `adapters` (by layer name) into `model` as the adapter `name`, the only active one; freeze the rest.

    `parts` are what trains with it, by plain name.
    """
    if any(name in layer.adapters for layer in lora_layers(model).values()):
        raise ValueError(f"adapter {name!r} exists already. Choose another name, or delete_adapter(model, {name!r}).")
    LoRALayer(nn.Identity(), r=None).add_adapter(name, nn.Identity())  # a name that none can have raises here
    if not lora_configs(model):
        trainable = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
        model.__dict__["_trainable_before_lora"] = trainable
    model.requires_grad_(False)
    wrapped: dict[int, LoRALayer] = {}  # a module that stands under two names stays one module
    for path, adapter in adapters.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALayer):
            layer = wrapped.get(id(layer)) or wrapped.setdefault(id(layer), _without_adapters(layer))
            model.set_submodule(path, layer)
        layer.base_layer = adapter.__dict__.pop("new_base", layer.base_layer)  # LoftQ's own 4-bit layer
        if name not in layer.adapters:
            layer.add_adapter(name, adapter)
    lora_configs(model)[name] = config
    for layer in lora_layers(model).values():
        layer.use([name] if name in layer.adapters else [])
    lora_configs(model).parts.add(model, name, parts)


def eject(model: nn.Module) -> list[str]:
    """Undo every inject: the layers that were replaced are back in place and trainable as before.

    Returns the names of the restored layers. Adapters that were not saved are gone; W is as it was (LoftQ: in 4 bits).
    """
    lora_configs(model).parts.place(model, [])
    layers = lora_layers(model, remove_duplicate=False)
    for path, layer in layers.items():
        model.set_submodule(path, layer.base_layer)
    if (trainable := model.__dict__.pop("_trainable_before_lora", None)) is not None:  # else nothing was frozen
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in trainable)
    model.__dict__.pop("_lora_configs", None)
    return list(layers)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The layers that `config` targets, by name: what inject would adapt. Changes nothing."""
    if isinstance(model, LoRALayer) or not dict(model.named_children()):
        remedy = "use LoRALayer(it)." if is_linear(model) else "put it into one."
        raise ValueError(f"model: expected a module with layers inside, got {type(model).__name__}: {remedy}")
    candidates = adaptable_layers(model)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no layers to adapt.")
    modules = dict(model.named_modules(remove_duplicate=False))
    target_modules = _default_targets(model) if config.target_modules is None else config.target_modules
    if target_modules == "all-linear":
        output, saved = output_layer(model), _saved(model, config)
        chosen = [path for path, layer in candidates.items() if is_linear(layer) and layer is not output]
        chosen = [path for path in chosen if not any(ends_with(path, entry) for entry in saved)]
    else:
        chosen = _match("target_modules", target_modules, candidates, modules)
    if config.tie == "shared":
        tied = lora_configs(model).parts.tied(model)
        chosen = [path for path in candidates if path in chosen or {*tied.get(path, ())} & {*chosen}]
    if config.exclude_modules:
        excluded = _match("exclude_modules", config.exclude_modules, candidates, modules)
        chosen = [path for path in chosen if path not in set(excluded)]
    chosen = _in_layers(chosen, config)
    for kind in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, kind):
            if not any(fits_pattern(key, path) for path in chosen):
                raise unknown(kind, key, chosen)
    if not chosen:
        raise ValueError("no layer is left to adapt after exclude_modules and layers_to_transform.")
    return {path: candidates[path] for path in chosen}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What an adapter can be put on, by name: every layer of a kind that has one, a LoRALayer but nothing inside it."""
    inside = tuple(f"{path}." for path in lora_layers(model, remove_duplicate=False))  # never LoRA inside LoRA
    modules = model.named_modules(remove_duplicate=False)
    return {path: m for path, m in modules if is_adaptable(m) and not path.startswith(inside or ("\0",))}


def _check_tie(model: nn.Module, config: LoRAConfig, adapters: Iterable[str], parts: dict[str, Part]) -> None:
    """ValueError for what shares its weight without a word on it in `config`, and for a word that means nothing."""
    roots = (*adapters, *(path for path, part in parts.items() if isinstance(part, nn.Module)))
    tied = lora_configs(model).parts.tied(model)
    for root in roots:
        for path in (path for path in tied if within(path, root)):
            module = model.get_submodule(path)
            others = [name for name in tied[path] if not within(name, root)]
            if all(name in roots and model.get_submodule(name) is module for name in others):
                continue  # one module under several names, all of them meant
            if config.tie is None:
                raise ValueError(
                    f"{root!r} shares its weight with {others[0]!r} (tied). Say what is meant: LoRAConfig(tie="
                    f'"shared") gives all of them one update, and they stay tied; tie="untie" changes {root!r} alone, '
                    "and a merged or saved model is no longer tied."
                )
            return
    if config.tie is not None:
        raise ValueError(f"tie: {config.tie!r} would do nothing: nothing that trains shares its weight. Leave it out.")


def _default_targets(model: nn.Module) -> list[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f"target_modules is None and there is no default for model type {model_type!r} "
            f'(known: {sorted(DEFAULT_TARGETS)}). Give a list of names or "all-linear".'
        )
    return DEFAULT_TARGETS[model_type]


def _match(kind: str, wanted: Sequence[str] | str, candidates: dict, modules: dict) -> list[str]:
    """Names in `candidates` that match; a regular expression matches whole names, a list entry their ends."""
    if isinstance(wanted, str):
        found = [path for path in candidates if re.fullmatch(wanted, path)]
        if not found:
            raise unknown(f"{kind} (a regular expression for the whole name)", wanted, candidates)
        return found
    if not wanted:
        raise ValueError(f'{kind}: expected names, a regular expression or "all-linear", got {wanted!r}.')
    for entry in wanted:
        if not any(ends_with(path, entry) for path in candidates):
            if hits := [path for path in modules if ends_with(path, entry)]:
                inside = [path for path in candidates if path.startswith(f"{hits[0]}.")]
                raise ValueError(
                    f"{kind}: {entry!r} is {type(modules[hits[0]]).__name__}, which has no adapter. "
                    f"Layers in it that have: {[path.removeprefix(hits[0] + '.') for path in inside] or 'none'}."
                )
            raise unknown(kind, entry, candidates)
    return [path for path in candidates if any(ends_with(path, entry) for entry in wanted)]


def _in_layers(paths: list[str], config: LoRAConfig) -> list[str]:
    """Those of `paths` whose layer number is in layers_to_transform; every number must be found."""
    if config.layers_to_transform in (None, []):
        return paths
    if isinstance(config.target_modules, str):
        raise ValueError("layers_to_transform needs target_modules as a list of names; put the numbers in the regex.")
    wanted = [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    patterns = config.layers_pattern or r"[^.]*"
    number: dict[str, int] = {}  # the first number that follows a name: model.layers.3.mlp.up_proj → 3
    for pattern in [patterns] if isinstance(patterns, str) else patterns:  # and the first pattern, as in PEFT
        matches = {path: re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", path) for path in paths}
        if not any(matches.values()) and config.layers_pattern:
            raise unknown("layers_pattern", pattern, paths)
        number = {path: int(match[1]) for path, match in matches.items() if match} | number
    if missing := sorted(set(wanted) - set(number.values())):
        there = sorted(set(number.values()))
        raise ValueError(f"layers_to_transform: no targeted layer has the numbers {missing}; there are {there}.")
    return [path for path in paths if number.get(path) in wanted]


def _saved(model: nn.Module, config: LoRAConfig) -> list[str]:
    """modules_to_save. Of a classifier its head too, as in PEFT, whose files name both kinds of head for either."""
    names = list(config.modules_to_save or ())
    heads = ("classifier", "score") if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    there = [head for head in heads if any(ends_with(path, head) for path, _ in model.named_modules())]
    return [name for name in names if name not in heads] + there if there else names


def _new_adapter(path: str, layer: nn.Module, config: LoRAConfig, seed: int) -> Adapter:
    r, alpha = config.strength(path)
    layer_seed = int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little") >> 1
    options = (alpha, config.lora_dropout, config.use_rslora, config.lora_bias)
    try:
        adapter = new_adapter(layer, r, *options, seed=layer_seed)
        if config.use_dora or config.begins_from_weight:
            return vary(adapter, layer, config, layer_seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config.init_lora_weights == "gaussian" and not isinstance(adapter, EmbeddingAdapter):  # whose B is
        generator = torch.Generator("cpu").manual_seed(layer_seed)
        adapter.lora_A.data.normal_(0, 1 / r, generator=generator)
    return adapter


def _without_adapters(base: nn.Module) -> LoRALayer:
    layer = LoRALayer(base, r=None)
    layer.fused = lora_linear  # pyright: ignore[reportAttributeAccessIssue] layer.py stands alone and knows no type of it
    layer.register_load_state_dict_pre_hook(_take_bare_state)
    return layer


def _take_bare_state(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """load_state_dict of a model without adapters goes to the base; the adapters stay as they are."""
    if f"{prefix}weight" not in state:
        return
    for key in [key for key in state if key.startswith(prefix)]:
        if not key.startswith((f"{prefix}adapters.", f"{prefix}base_layer.")):
            state[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state.pop(key)
    for key, value in layer.state_dict(prefix=prefix).items():
        if key.startswith(f"{prefix}adapters."):
            state.setdefault(key, value)
