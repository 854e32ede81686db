"""Which of a model's adapters are at work. Switching changes no weight: it sets a tuple of names on each layer, and
puts the modules and biases that train with an adapter, or their originals, in place."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minilora.common import unknown
from minilora.lora.inject import eject
from minilora.lora.registry import lora_configs, lora_layers


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came."""
    names = (name for layer in lora_layers(model).values() for name in layer.adapters)
    return list(dict.fromkeys([*lora_configs(model), *names]))


def set_adapter(model: nn.Module, name: str | Sequence[str], offload: bool = False) -> None:
    """Make one adapter, or several that add up, the active ones; only they are trainable. They come to their layers'
    device; with `offload` the others go to the CPU. An unknown name, one given twice, and DoRA beside others raise."""
    names = [name] if isinstance(name, str) else list(name)
    check_adapters(model, names)
    if len(set(names)) < len(names):
        raise ValueError(f"adapters {names}: one is named twice and would count twice. Name each once.")
    configs = lora_configs(model)
    if len(names) > 1 and (dora := [wanted for wanted in names if wanted in configs and configs[wanted].use_dora]):
        raise ValueError(f"adapters {names}: {dora[0]!r} (DoRA) rescales W and does not add up: use one at a time.")
    lora_configs(model).parts.place(model, names)
    for layer in lora_layers(model).values():
        layer.use([wanted for wanted in names if wanted in layer.adapters])
        here = next(layer.base_layer.parameters()).device
        for known, adapter in layer.adapters.items():
            there = here if known in names else torch.device("cpu")
            if (offload or known in names) and next(adapter.parameters()).device != there:
                adapter.to(there)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block no adapter is active: outputs are the base model's own, bit for bit."""
    before = [(layer, layer.active) for layer in lora_layers(model).values()]
    parts = lora_configs(model).parts
    trained = parts.active
    parts.place(model, [])
    for layer, _ in before:
        layer.use([])
    try:
        yield
    finally:
        parts.place(model, trained)
        for layer, active in before:
            layer.use(active)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter for good; layers left without any are the base's own again. An unknown name raises."""
    check_adapters(model, [name])
    if list_adapters(model) == [name]:
        eject(model)
        return
    lora_configs(model).parts.remove(model, name)
    for path, layer in lora_layers(model, remove_duplicate=False).items():
        if name in layer.adapters:
            layer.use([active for active in layer.active if active != name])
            del layer.adapters[name]
        if not layer.adapters:
            model.set_submodule(path, layer.base_layer)
    lora_configs(model).pop(name, None)
    lora_configs(model).seeds.pop(name, None)
    lora_configs(model).tokenizers.pop(name, None)


def check_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """ValueError unless the model has adapters of these names."""
    known = list_adapters(model)
    for name in names:
        if name not in known:
            raise unknown("adapter", name, known)
