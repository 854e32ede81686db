"""Selection of the layers that get an adapter: target_modules, exclude_modules, layer numbers.

Every entry of the config must match something. An entry that matches nothing is an error that names
the nearest names in the model.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from minilora.common import (
    LeftOut,
    ends_with,
    ends_with_any,
    left_out,
    named_modules,
    output_layer,
    unknown_name,
)
from minilora.common.wrappers import peft_layers
from minilora.lora.config import LoRAConfig, fits_pattern
from minilora.lora.embedding_conv import forward_problem, is_adaptable, is_linear
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import lora_configs, lora_layers

# The layers that PEFT adapts when target_modules is None, by the model's type.
DEFAULT_TARGETS = {
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
}


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return the layers that a config targets, by name. The model is not changed.

    Args:
        model: The model.
        config: The config of the adapter.

    Raises:
        ValueError: An entry of the config matches nothing, or no layer is left to adapt.
    """
    if isinstance(model, LoRALayer) or not dict(model.named_children()):
        remedy = "use LoRALayer(it)." if is_linear(model) else "put it into one."
        raise ValueError(
            f"model: expected a module with layers inside, got {type(model).__name__}: {remedy}"
        )
    _check_no_peft(model)
    candidates = adaptable_layers(model)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no layers to adapt.")
    chosen = _targeted(model, config, candidates)
    if config.tie == "shared":
        tied = lora_configs(model).parts.tied(model)
        chosen = [
            path
            for path in candidates
            if path in chosen or any(other in chosen for other in tied.get(path, ()))
        ]
    if config.exclude_modules:
        excluded = _match("exclude_modules", config.exclude_modules, candidates, model)
        chosen = [path for path in chosen if path not in excluded]
    chosen = _in_numbered_layers(chosen, config)
    _check_patterns(config, chosen)
    if not chosen:
        raise ValueError("no layer is left to adapt after exclude_modules and layers_to_transform.")
    return {path: candidates[path] for path in chosen}


def _check_no_peft(model: nn.Module) -> None:
    """Raise ValueError for a model with PEFT's adapters, whose factors look like layers to adapt."""
    paths = peft_layers(model)
    if paths:
        raise ValueError(
            f"the model has adapters of PEFT already, in {len(paths)} layers, first {paths[0]}. "
            "Take them off with PEFT (peft_model.unload(), or merge_and_unload() to keep their "
            "effect), or load their folder into a fresh base with ml.load_adapter."
        )


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return all layers that can have an adapter, by name.

    A LoRALayer is listed, but nothing inside it: an adapter is never put into an adapter.

    Args:
        model: The model.
    """
    inside_lora = tuple(f"{path}." for path in lora_layers(model, remove_duplicate=False))
    layers = {}
    for path, module in named_modules(model, remove_duplicate=False):
        if is_adaptable(module) and not path.startswith(inside_lora):
            layers[path] = module
    return layers


def names_to_save(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the config's modules_to_save, with the head of a classifier added as in PEFT.

    PEFT's files name both kinds of heads, `classifier` and `score`, for either of them.

    Args:
        model: The model.
        config: The config of the adapter.
    """
    names = list(config.modules_to_save or ())
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return names
    possible_heads = ("classifier", "score")
    paths = [path for path, _ in named_modules(model)]
    heads = []
    for head in possible_heads:
        if any(ends_with(path, head) for path in paths):
            heads.append(head)
    if not heads:
        return names
    others = [name for name in names if name not in possible_heads]
    return others + heads


def left_out_by_all_linear(
    model: nn.Module, config: LoRAConfig, adapted: Iterable[str]
) -> LeftOut | None:
    """Return the matrices that "all-linear" leaves out; None for other targets or nothing notable.

    The output layer, modules_to_save, exclude_modules and layers_to_transform are not counted.

    Args:
        model: The model.
        config: The config of the adapter.
        adapted: Names of the adapted layers.
    """
    if config.target_modules != "all-linear":
        return None
    output = output_layer(model)
    saved = names_to_save(model, config)
    chosen = []
    for path, module in named_modules(model, remove_duplicate=False):
        if module is output or ends_with_any(path, saved):
            chosen.append(path)
    if config.exclude_modules:
        candidates = adaptable_layers(model)
        chosen += _match("exclude_modules", config.exclude_modules, candidates, model)
    return left_out(model, adapted, chosen)


def _targeted(model: nn.Module, config: LoRAConfig, candidates: dict[str, nn.Module]) -> list[str]:
    """Return the candidates that target_modules, or its default, selects."""
    target_modules = config.target_modules
    if target_modules is None:
        target_modules = _default_targets(model)
    if target_modules != "all-linear":
        return _match("target_modules", target_modules, candidates, model)
    output = output_layer(model)
    saved = names_to_save(model, config)
    chosen = []
    for path, layer in candidates.items():
        if not is_linear(layer) or layer is output or ends_with_any(path, saved):
            continue
        if forward_problem(layer) is None:
            chosen.append(path)
    return chosen


def _default_targets(model: nn.Module) -> list[str]:
    """Return the default target_modules of the model's type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f"target_modules is None, and minilora has no default for model type {model_type!r} "
            f"(known: {sorted(DEFAULT_TARGETS)}). "
            'Give a list of names or "all-linear".'
        )
    return DEFAULT_TARGETS[model_type]


def _match(
    option: str, entries: Sequence[str] | str, candidates: dict[str, nn.Module], model: nn.Module
) -> list[str]:
    """Return the candidates that match: a string is a regular expression for whole names."""
    if isinstance(entries, str):
        matching = [path for path in candidates if re.fullmatch(entries, path)]
        if not matching:
            kind = f"{option} (a regular expression for the whole name)"
            raise unknown_name(kind, entries, candidates)
        return matching
    if not entries:
        raise ValueError(
            f'{option}: expected names, a regular expression or "all-linear", got {entries!r}.'
        )
    for entry in entries:
        if not any(ends_with(path, entry) for path in candidates):
            raise _no_match(option, entry, candidates, model)
    return [path for path in candidates if ends_with_any(path, entries)]


def _no_match(
    option: str, entry: str, candidates: dict[str, nn.Module], model: nn.Module
) -> ValueError:
    """Return the error for an entry that matches no candidate."""
    for path, module in named_modules(model, remove_duplicate=False):
        if ends_with(path, entry):
            prefix = f"{path}."
            inside = [name.removeprefix(prefix) for name in candidates if name.startswith(prefix)]
            return ValueError(
                f"{option}: {entry!r} is {type(module).__name__}, which has no adapter. "
                f"Layers in it that have: {inside or 'none'}."
            )
    for name, parameter in model.named_parameters():
        if ends_with(name, entry):
            return ValueError(
                f"{option}: {entry!r} is a parameter {tuple(parameter.shape)} and not a layer, so "
                "it has no adapter: experts in one parameter, for example. Leave it out."
            )
    return unknown_name(option, entry, candidates)


def _in_numbered_layers(paths: list[str], config: LoRAConfig) -> list[str]:
    """Return the paths whose layer number is in layers_to_transform."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return paths
    if isinstance(config.target_modules, str):
        raise ValueError(
            "layers_to_transform needs target_modules as a list of names. "
            "Put the numbers into the regular expression instead."
        )
    if isinstance(wanted, int):
        wanted = [wanted]
    _check_layers_pattern(paths, config.layers_pattern)
    numbers = layer_numbers(paths, config.layers_pattern)
    present = sorted(set(numbers.values()))
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise ValueError(
            f"layers_to_transform: no targeted layer has the numbers {missing}; "
            f"there are {present}."
        )
    return [path for path in paths if numbers.get(path) in wanted]


def layer_numbers(paths: list[str], layers_pattern: list[str] | str | None) -> dict[str, int]:
    """Return the layer number of each path that has one: model.layers.3.mlp.up_proj → 3.

    It is the first number after a name that the pattern matches. With several patterns, the first
    one that matches a path counts, as in PEFT.

    Args:
        paths: Paths of layers.
        layers_pattern: Regular expressions for the name before the number; None is any name.
    """
    patterns = layers_pattern or r"[^.]*"
    if isinstance(patterns, str):
        patterns = [patterns]
    numbers: dict[str, int] = {}
    for pattern in patterns:
        expression = re.compile(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.")
        for path in paths:
            match = expression.match(path)
            if match:
                numbers.setdefault(path, int(match[1]))
    return numbers


def _check_layers_pattern(paths: list[str], layers_pattern: list[str] | str | None) -> None:
    """Raise ValueError for an entry of layers_pattern that matches no path."""
    patterns = layers_pattern or []
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns:
        if not layer_numbers(paths, pattern):
            raise unknown_name("layers_pattern", pattern, paths)


def _check_patterns(config: LoRAConfig, chosen: list[str]) -> None:
    """Raise ValueError for a key of rank_pattern or alpha_pattern that matches no chosen layer."""
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for name, pattern in patterns.items():
        for key in pattern:
            if not any(fits_pattern(key, path) for path in chosen):
                raise unknown_name(name, key, chosen)
