"""The config of an adapter file: the written one, and the one that is read for a given model.

`inject` refuses an entry that matches nothing, because it is probably misspelt. The config of a
file may name more than one model has: one list of targets serves several kinds of models. There the
tensors show the trained layers, so such entries are left out, and one warning lists them.
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from minilora.common import ends_with, ends_with_any, named_modules
from minilora.lora.config import LoRAConfig, TaskType, fits_pattern
from minilora.lora.files.key_names import core_name
from minilora.lora.targets import adaptable_layers, find_targets, layer_numbers, names_to_save


def reduced_config(model: nn.Module, config: LoRAConfig, folder: Path) -> LoRAConfig:
    """Return the config of a file without the entries that match nothing in the model.

    An option of which nothing would be left stays as it is, where nothing could be adapted then.

    Args:
        model: The model.
        config: The config of the file.
        folder: The adapter's folder, for messages.

    Raises:
        ValueError: No layer is left to adapt.
    """
    layers = list(adaptable_layers(model))
    modules = [path for path, _ in named_modules(model, remove_duplicate=False) if path]
    unmatched: list[str] = []
    reduced: dict[str, Any] = {}
    if isinstance(config.target_modules, list):
        targets = _matching_entries(model, config.target_modules, layers)
        if _entries(targets):  # otherwise `find_targets` raises
            unmatched += _left_out("target_modules", config.target_modules, targets)
            reduced["target_modules"] = _entries(targets)
    if isinstance(config.exclude_modules, list):
        excluded = _matching_entries(model, config.exclude_modules, layers)
        unmatched += _left_out("exclude_modules", config.exclude_modules, excluded)
        reduced["exclude_modules"] = _entries(excluded) or None
    if config.modules_to_save:
        needed = names_to_save(model, config)
        saved = _matching_entries(model, needed, modules)
        left_out = _left_out("modules_to_save", needed, saved)
        if left_out or _entries(saved) != needed:
            reduced["modules_to_save"] = _entries(saved) or None
        unmatched += left_out
    config = replace(config, **reduced)
    config = _with_present_layers(config, layers, unmatched)
    config = _with_matching_patterns(model, config, unmatched)
    if unmatched:
        warnings.warn(
            f"{folder}: {len(unmatched)} entries of adapter_config.json match nothing in this model "
            f"and are left out: {', '.join(unmatched)}.",
            stacklevel=4,  # the caller of load_adapter
        )
    return config


def _matching_entries(
    model: nn.Module, entries: Iterable[str], paths: list[str]
) -> dict[str, list[str]]:
    """Return the new form of each entry: itself, full paths if it names a wrapper, or nothing."""
    matching: dict[str, list[str]] = {}
    for entry in entries:
        matching[entry] = []
        if any(ends_with(path, entry) for path in paths):
            matching[entry] = [entry]
            continue
        core = core_name(entry, model)
        if core != entry:
            matching[entry] = [path for path in paths if ends_with(core_name(path, model), core)]
    return matching


def _entries(matching: dict[str, list[str]]) -> list[str]:
    """Return the new entries of an option, each of them once."""
    entries: dict[str, None] = {}
    for new_entries in matching.values():
        entries |= dict.fromkeys(new_entries)
    return list(entries)


def _left_out(option: str, entries: Iterable[str], matching: dict[str, list[str]]) -> list[str]:
    """Return descriptions of the entries that match nothing."""
    return [f"{option} {entry!r}" for entry in entries if not matching[entry]]


def _with_present_layers(config: LoRAConfig, layers: list[str], unmatched: list[str]) -> LoRAConfig:
    """Return the config with the numbers of layers_to_transform that the model has."""
    wanted = config.layers_to_transform
    if not isinstance(wanted, list) or not isinstance(config.target_modules, list):
        return config
    targets = [
        path for path in layers if any(ends_with(path, entry) for entry in config.target_modules)
    ]
    patterns = config.layers_pattern or []
    if isinstance(patterns, str):
        patterns = [patterns]
    present_patterns = [pattern for pattern in patterns if layer_numbers(targets, pattern)]
    unmatched += [
        f"layers_pattern {pattern!r}" for pattern in patterns if pattern not in present_patterns
    ]
    numbers = set(layer_numbers(targets, present_patterns or None).values())
    present = [number for number in wanted if number in numbers]
    unmatched += [f"layers_to_transform {number}" for number in wanted if number not in numbers]
    if present_patterns and present_patterns != patterns:
        config = replace(config, layers_pattern=present_patterns)
    return replace(config, layers_to_transform=present or wanted)


def _with_matching_patterns(
    model: nn.Module, config: LoRAConfig, unmatched: list[str]
) -> LoRAConfig:
    """Return the config with the patterns that match a targeted layer."""
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    without = replace(config, rank_pattern={}, alpha_pattern={})
    targets = list(find_targets(model, without))
    reduced: dict[str, Any] = {}
    for option in ("rank_pattern", "alpha_pattern"):
        reduced[option] = {}
        for key, value in getattr(config, option).items():
            core = core_name(key, model)
            if any(fits_pattern(key, path) for path in targets):
                reduced[option][key] = value
            elif core != key and any(ends_with(core_name(path, model), core) for path in targets):
                for path in targets:
                    if ends_with(core_name(path, model), core):
                        reduced[option][path] = value
            else:
                unmatched.append(f"{option} {key!r}")
    return replace(config, **reduced)


def target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the shortest target_modules: ends of names if they match nothing else, else names.

    Args:
        model: The model.
        paths: Names of the adapted layers.
    """
    ends = sorted({path.rpartition(".")[2] for path in paths})
    matching = set()
    for path in adaptable_layers(model):
        if ends_with_any(path, ends):
            matching.add(path)
    return ends if matching == set(paths) else sorted(paths)


def task_type(model: nn.Module) -> str | None:
    """Return the task of a causal language model; None for every other model.

    PEFT gives an adapter with this task a model that generates text, and fails for any other model.

    Args:
        model: The model.
    """
    if hasattr(model, "task_type"):  # minilora's decoder
        return cast(str, model.task_type)
    generates = hasattr(model, "prepare_inputs_for_generation")
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not generates or encoder_decoder:
        return None
    return TaskType.CAUSAL_LM.value
