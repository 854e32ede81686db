"""Selection of the active adapters of a model.

Switching changes no weight. It sets a tuple of names on each LoRALayer, and it puts the modules and
biases that train with an adapter, or their originals, in place.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minilora.common import set_submodule, unknown_name, unwrap_model
from minilora.lora.inject import eject
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import lora_configs, lora_layers


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, in the order in which they were added.

    Args:
        model: Any model.
    """
    model = unwrap_model(model)
    names = list(lora_configs(model))
    for layer in lora_layers(model).values():
        names += layer.adapters
    return list(dict.fromkeys(names))


def set_adapter(model: nn.Module, name: str | Sequence[str], offload: bool = False) -> None:
    """Make one adapter, or several whose corrections are added, the active ones.

    Only active adapters are trainable. They are moved to the device of their layers.

    Args:
        model: A model with adapters.
        name: Name of an adapter, or several names. An empty list activates none.
        offload: Move all other adapters to the CPU.

    Raises:
        ValueError: A name is unknown or given twice, or a DoRA adapter is combined with others.
    """
    model = unwrap_model(model)
    names = [name] if isinstance(name, str) else list(name)
    _check_combination(model, names)
    lora_configs(model).parts.activate(model, names)
    for layer in lora_layers(model).values():
        layer.use([wanted for wanted in names if wanted in layer.adapters])
        _move_adapters(layer, names, offload)


def _check_combination(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError unless these adapters exist and can be active together."""
    check_adapters(model, names)
    if len(set(names)) < len(names):
        raise ValueError(
            f"adapters {names}: one is named twice and would count twice. Name each once."
        )
    if len(names) < 2:
        return
    configs = lora_configs(model)
    for name in names:
        if name in configs and configs[name].use_dora:
            raise ValueError(
                f"adapters {names}: {name!r} (DoRA) rescales W and does not add up: "
                "use one at a time."
            )


def _move_adapters(layer: LoRALayer, names: list[str], offload: bool) -> None:
    """Move the active adapters to the layer's device and, if `offload`, the others to the CPU."""
    layer_device = next(layer.base_layer.parameters()).device
    for name, adapter in layer.adapters.items():
        if name in names:
            target = layer_device
        elif offload:
            target = torch.device("cpu")
        else:
            continue
        if next(adapter.parameters()).device != target:
            adapter.to(target)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off in a `with` block. Outputs then equal the base model's bit for bit.

    Args:
        model: Any model.
    """
    model = unwrap_model(model)
    active_before = [(layer, layer.active) for layer in lora_layers(model).values()]
    parts = lora_configs(model).parts
    parts_before = parts.active
    parts.activate(model, [])
    for layer, _ in active_before:
        layer.use([])
    try:
        yield
    finally:
        parts.activate(model, parts_before)
        for layer, names in active_before:
            layer.use(names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter. A layer without any other adapter is replaced by its base.

    Args:
        model: A model with adapters.
        name: Name of the adapter.

    Raises:
        ValueError: The model has no adapter of this name.
    """
    model = unwrap_model(model)
    check_adapters(model, [name])
    if list_adapters(model) == [name]:
        eject(model)
        return
    registry = lora_configs(model)
    registry.parts.remove(model, name)
    for path, layer in lora_layers(model, remove_duplicate=False).items():
        if name in layer.adapters:
            layer.use([active for active in layer.active if active != name])
            del layer.adapters[name]
        if not layer.adapters:
            set_submodule(model, path, layer.base_layer)
    registry.pop(name, None)
    registry.seeds.pop(name, None)
    registry.tokenizers.pop(name, None)
    registry.storages.pop(name, None)
    registry.with_vocabulary.discard(name)
    registry.labels.pop(name, None)


def check_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Check that a model has adapters of these names.

    Args:
        model: A model with adapters.
        names: Names of adapters.

    Raises:
        ValueError: A name is unknown.
    """
    known = list_adapters(model)
    for name in names:
        if name not in known:
            raise unknown_name("adapter", name, known)
