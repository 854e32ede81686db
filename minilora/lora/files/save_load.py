"""Saving and loading of an adapter: a folder in PEFT's format.

    adapter_config.json          the LoRAConfig, with PEFT's names
    adapter_model.safetensors    the tensors (adapter_tensors.py) and the base's fingerprints

vLLM and the converter of llama.cpp read this format too. Reading is strict. PEFT continues with a
warning, or without one, when tensors are missing, left over or not finite, and then computes
something else. For an adapted embedding or output layer PEFT also writes its base, 100 MB and more,
which loading does not need. It is compared with the model when a file has it, and never written.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from minilora.common import (
    get_submodule,
    is_conv1d,
    plain_key,
    read_tensors,
    unwrap_model,
    write_text,
)
from minilora.lora.active import check_adapters, disable_adapters, list_adapters, set_adapter
from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import Adapter
from minilora.lora.files.adapter_tensors import (
    base_weight_names,
    check_finite,
    check_names_and_shapes,
    check_not_sharded,
    check_trained,
    fill,
    named_tensors,
    without_base_weights,
)
from minilora.lora.files.base_check import (
    binding,
    check_binding,
    check_storage,
    hash_tokenizer,
    read_binding,
    source_of,
    write_bound,
)
from minilora.lora.files.file_config import reduced_config, target_names, task_type
from minilora.lora.files.find import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_config
from minilora.lora.files.key_names import with_model_names
from minilora.lora.files.label_names import check_labels
from minilora.lora.files.vocabulary_tensors import (
    check_vocabulary_size,
    repeated_row_names,
    stores_vocabulary,
    vocabulary_names,
    vocabulary_parts,
    vocabulary_tensors,
)
from minilora.lora.inject import attach, new_adapters, new_parts
from minilora.lora.registry import lora_configs, lora_layers
from minilora.lora.trained_parts.trained_state import copy_keys
from minilora.lora.variants.base import as_plain
from minilora.quant.storage import base_storage, stored_storage

_OF_BACKWARD = ".lora_velora_embed"  # VeLoRA's compression of activations; forward is plain LoRA


class AdapterContents(NamedTuple):
    """The contents of an adapter's folder.

    Attributes:
        values: Contents of adapter_config.json.
        tensors: Tensors by PEFT's names.
        bound: Metadata of the safetensors file: fingerprints of the base, seed, tokenizer, labels.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    bound: dict[str, Any]


# ---- state dicts


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of an adapter under PEFT's names, in fp32, without copying them.

    Args:
        model: A model with adapters.
        name: Name of the adapter.

    Raises:
        ValueError: The model has no adapter of this name.
    """
    model = unwrap_model(model)
    check_adapters(model, [name])
    return _live_tensors(model, name)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the model would have without adapters.

    It has plain names and live tensors; a 4-bit layer has the names of bitsandbytes.
    `load_state_dict` reads it with and without injected adapters.

    Args:
        model: Any model.
    """
    model = unwrap_model(model)
    with disable_adapters(model):
        state = {plain_key(key): value for key, value in model.state_dict().items()}
    for key in copy_keys(model):
        del state[key]
    for path, layer in lora_layers(model, remove_duplicate=False).items():
        adapter_state = layer.adapters.state_dict(prefix=f"{path}.adapters.")
        without_layer = {}
        for key, value in state.items():
            if key in adapter_state:
                continue
            if key.startswith(f"{path}."):
                key = key.replace(f"{path}.base_layer.", f"{path}.", 1)
            without_layer[key] = value
        state = without_layer
    return state


# ---- saving


def save_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, tokenizer: Any = None
) -> None:
    """Write an adapter to a folder in PEFT's format, with fingerprints of the base.

    Args:
        model: A model with adapters.
        folder: The folder to create or to write into.
        name: Name of the adapter.
        tokenizer: The tokenizer that the adapter was trained with, of which a hash is stored. None
            stores that of the tokenizer that `train` used.

    Raises:
        ValueError: The adapter is unknown, or contains NaN or infinity.
    """
    write_contents(Path(folder), contents(unwrap_model(model), name, tokenizer))


def contents(model: nn.Module, name: str, tokenizer: Any = None) -> AdapterContents:
    """Return the contents that `save_adapter` writes. Tensors are live where possible.

    Args:
        model: A model with adapters.
        name: Name of the adapter.
        tokenizer: The tokenizer that the adapter was trained with; None is that of `train`.

    Raises:
        ValueError: The adapter is unknown, or contains NaN or infinity.
    """
    model = unwrap_model(model)
    check_adapters(model, [name])
    registry = lora_configs(model)
    config = registry.get(name)
    if config is None:
        raise ValueError(
            f"adapter {name!r} was not made by inject or load_adapter: "
            "it has no config to save. Use inject to add adapters."
        )
    adapters = _adapters_by_layer(model, name)
    if config.begins_from_weight:  # stored as plain LoRA, or PEFT would change the base
        config, adapters = as_plain(config, adapters)
    registry.parts.adopt_replaced(model)
    source = source_of(model)
    tensors = vocabulary_tensors(model, name, adapters, source)
    tensors |= named_tensors(model, adapters, registry.parts.copies_of([name]))
    check_not_sharded(tensors, f"adapter {name!r}")
    check_finite(tensors, f"adapter {name!r}")
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    values = config.to_dict()
    if config.target_modules is None or config.target_modules == "all-linear":
        values["target_modules"] = target_names(model, list(layers))
    values["base_model_name_or_path"] = config.base_model_name_or_path or source
    values["task_type"] = config.task_type or task_type(model)
    values["fan_in_fan_out"] = any(is_conv1d(layer.base_layer) for layer in layers.values())
    if tokenizer is None:
        hashes = registry.tokenizers.get(name)
    else:
        hashes = hash_tokenizer(tokenizer)
    storage = registry.storages.get(name) or base_storage(model)
    labels = registry.labels.get(name)
    trains_head = config.task_type == "SEQ_CLS" or "score" in (config.modules_to_save or [])
    if labels is None and trains_head:
        labels = getattr(model, "label_names", None)  # a classifier in another training loop
    bound = binding(layers, source, registry.seeds.get(name), hashes, storage, labels)
    return AdapterContents(values, tensors, bound)


def write_contents(folder: Path, adapter: AdapterContents) -> None:
    """Write the two files of an adapter, each of them atomically.

    Args:
        folder: The folder to create or to write into.
        adapter: The contents.
    """
    write_bound(folder / WEIGHTS_FILE, adapter.tensors, adapter.bound)
    text = json.dumps(adapter.values, indent=2, sort_keys=True)
    write_text(folder / CONFIG_FILE, text + "\n")


# ---- loading


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    allow_untrained: bool = False,
    check_base: bool = True,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | None = None,
) -> list[str]:
    """Read an adapter in PEFT's format into a model and make it the active one.

    Files without fingerprints, such as those of PEFT, are not compared with the base. A warning
    reports a base in another storage than in training (4 bits or dense).

    Args:
        model: The model that the adapter was trained on.
        folder: A folder, or the id of a repository on the Hub.
        name: Name of the adapter in the model. If the model has one of this name, it must have the
            same layers and shapes, and takes the values of the file.
        allow_untrained: Accept an adapter whose every B is zero, which does nothing.
        check_base: Compare fingerprints. False accepts an adapter of another base or tokenizer.
        tokenizer: The tokenizer that is used with it, compared with the one of the file.
        revision: Branch, tag or commit of a repository on the Hub; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: The config requires something that is not supported or not in the model; tensors
            are missing, left over, of another shape or not finite; the adapter does nothing; or it
            was trained on another base or with another tokenizer. The model is then unchanged.
        FileNotFoundError: The folder or one of its files does not exist.
        OSError: The Hub does not provide it.
    """
    model = unwrap_model(model)
    adapter = read_contents(folder, revision, token)
    return put_contents(model, adapter, name, Path(folder), allow_untrained, check_base, tokenizer)


def read_contents(
    folder: str | Path, revision: str | None = None, token: str | None = None
) -> AdapterContents:
    """Read the contents of a folder, or of a repository on the Hub.

    Args:
        folder: A folder, or the id of a repository on the Hub.
        revision: Branch, tag or commit of a repository; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.

    Raises:
        ValueError: A file is damaged, or its config is not supported.
        FileNotFoundError: The folder or one of its files does not exist.
        OSError: The Hub does not provide it.
    """
    path, _ = find_adapter(folder, revision, token)
    tensors = read_tensors(path / WEIGHTS_FILE)
    return AdapterContents(
        read_config(path),
        {key: tensor for key, tensor in tensors.items() if not key.endswith(_OF_BACKWARD)},
        read_binding(path / WEIGHTS_FILE),
    )


def put_contents(
    model: nn.Module,
    adapter: AdapterContents,
    name: str,
    folder: Path,
    allow_untrained: bool = False,
    check_base: bool = True,
    tokenizer: Any = None,
) -> list[str]:
    """Put the contents of a folder into a model, as `load_adapter` does.

    Args:
        model: The model that the adapter was trained on.
        adapter: The contents.
        name: Name of the adapter in the model.
        folder: Name of the source in messages.
        allow_untrained: Accept an adapter whose every B is zero, which does nothing.
        check_base: Compare fingerprints.
        tokenizer: The tokenizer that is used with it; None is not compared.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: The adapter does not fit the model. The model is then unchanged.
    """
    model = unwrap_model(model)
    check_vocabulary_size(model, adapter.tensors, folder)
    config = reduced_config(model, LoRAConfig.from_dict(adapter.values), folder)
    adapters = new_adapters(model, config)
    parts = new_parts(model, config, adapters)
    live = named_tensors(model, adapters, parts)

    optional = base_weight_names(model, adapters) + vocabulary_names(model)
    optional += repeated_row_names(model)
    read = with_model_names(model, adapter.tensors, live, optional, folder)
    tensors = {key: tensor for key, tensor in read.items() if key in live}
    extra = {key: tensor for key, tensor in read.items() if key not in live}
    has_vocabulary = stores_vocabulary(model, extra)
    source = source_of(model)
    vocabulary = vocabulary_parts(model, extra, tensors, source, folder, check_base)
    tensors |= without_base_weights(model, extra, adapters, folder, check_base)
    check_names_and_shapes(model, tensors, live, folder)
    check_finite(read, str(folder))
    check_trained(tensors, folder, allow_untrained)
    check_labels(adapter.bound, model, folder)
    if check_base:
        layers = {path: get_submodule(model, path) for path in adapters}
        check_binding(adapter.bound, layers, source, folder, tokenizer)
    check_storage(adapter.bound, model, folder)

    fill(live, tensors, folder)
    if name in list_adapters(model):
        tensors |= named_tensors(model, adapters, vocabulary)
        _overwrite(model, name, adapters, tensors, folder)
    else:
        lora_configs(model).parts.frozen[name] = set(vocabulary)
        attach(model, adapters, config, name, parts | vocabulary)
    if has_vocabulary or vocabulary:
        lora_configs(model).with_vocabulary.add(name)
    lora_configs(model).seeds[name] = adapter.bound.get("seed")
    lora_configs(model).tokenizers[name] = adapter.bound.get("tokenizer")
    lora_configs(model).storages[name] = stored_storage(adapter.bound)
    if "labels" in adapter.bound:
        lora_configs(model).labels[name] = adapter.bound["labels"]
    return list(adapters)


def _overwrite(
    model: nn.Module,
    name: str,
    adapters: dict[str, Adapter],
    tensors: dict[str, Tensor],
    folder: Path,
) -> None:
    """Copy the values of a file into an adapter of the model, and make it the active one."""
    existing = _adapters_by_layer(model, name)
    same_scaling = _scalings(existing) == _scalings(adapters)
    same_sharing = _distinct(existing) == _distinct(adapters)
    if not same_scaling or not same_sharing:
        raise ValueError(
            f"adapter {name!r} exists with other layers or scaling: "
            "delete it, or load by another name."
        )
    live = _live_tensors(model, name)
    for key in vocabulary_names(model):  # rows of new tokens that equal those of the file
        if key not in tensors:
            live.pop(key, None)
    check_names_and_shapes(model, tensors, live, folder)
    fill(live, tensors, folder)
    set_adapter(model, name)


def _scalings(adapters: dict[str, Adapter]) -> dict[str, float]:
    """Return the factor s of each layer's adapter."""
    return {path: adapter.scaling for path, adapter in adapters.items()}


def _distinct(adapters: dict[str, Adapter]) -> int:
    """Return the number of distinct adapters: layers with tied weights may share one."""
    return len({id(adapter) for adapter in adapters.values()})


# ---- the adapter in the model


def _adapters_by_layer(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Return the adapters of one name by layer name."""
    adapters = {}
    for path, layer in lora_layers(model).items():
        if name in layer.adapters:
            adapters[path] = cast(Adapter, layer.adapters[name])
    return adapters


def _live_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter in the model under PEFT's names."""
    lora_configs(model).parts.adopt_replaced(model)
    copies = lora_configs(model).parts.copies_of([name])
    return named_tensors(model, _adapters_by_layer(model, name), copies)
