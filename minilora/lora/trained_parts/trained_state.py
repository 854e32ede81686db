"""State dicts of a model whose modules or biases train with an adapter.

While an adapter is active, its copy stands in the place of the original. A state dict by place
would store the copy under the name of the original, and a load while another adapter is active
would put it into the base. Therefore a name identifies a tensor, whichever adapter is active:

    lm_head.weight                              the original
    lm_head.modules_to_save.default.weight      the copy of the adapter "default"
    model.norm.bias.modules_to_save.default     the copy of a bias

The state of a model without adapters has only the first kind. It changes the originals, and the
copies keep their values. Two hooks on the model write and read these names.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import get_submodule, plain_key

COPIES = "modules_to_save"


def register_hooks(model: nn.Module) -> None:
    """Let `state_dict` and `load_state_dict` of a model name the copies; once for each model.

    Args:
        model: The model, without wrappers.
    """
    remove_hooks(model)
    model.register_state_dict_post_hook(_write)
    model.register_load_state_dict_pre_hook(_read)


def remove_hooks(model: nn.Module) -> None:
    """Remove the hooks of `register_hooks`.

    Args:
        model: The model, without wrappers.
    """
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_write, _read):
                del hooks[number]


def copy_keys(model: nn.Module) -> set[str]:
    """Return the keys of all copies in the state dict of a model.

    Args:
        model: The model, without wrappers.
    """
    keys: set[str] = set()
    for key, part in _copies(model):
        keys |= _tensors(part, key).keys()
    return keys


def _write(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Store the originals under their own names and every copy under its name; a hook."""
    actual_keys = {plain_key(key): key for key in state}  # with the names of wrappers inside
    for path, original in _originals(model):
        for key, tensor in _tensors(original, _place(model, path)).items():
            key = prefix + key
            state[actual_keys.get(plain_key(key), key)] = tensor
    for key, part in _copies(model):
        state.update(_tensors(part, prefix + key))


def _read(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load every copy and every original that is not in its place; a hook."""
    has_adapters = any(f".{COPIES}." in key or ".adapters." in key for key in state)
    for key, part in _copies(model):
        values = _take(state, prefix + key)
        if values or has_adapters:
            _load(part, values, prefix + key, missing_keys, error_msgs)
    for path, original in _originals(model):
        holder, _, leaf = _place(model, path).rpartition(".")
        part_in_place = getattr(get_submodule(model, holder), leaf)
        if part_in_place is original:
            continue  # torch loads it
        # The state of a model without adapters has no `base_layer` in its keys.
        for place in dict.fromkeys([_place(model, path), path]):
            values = _take(state, prefix + place)
            if values:
                _load(original, values, prefix + place, missing_keys, error_msgs)
                state.update(_tensors(part_in_place, prefix + place))  # torch loads the same


def _parts(model: nn.Module) -> Any:
    """Return the TrainedParts of a model, or None if it has no adapters."""
    return getattr(model.__dict__.get("_lora_configs"), "parts", None)


def _originals(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and the original of every part."""
    parts = _parts(model)
    if parts is not None:
        yield from parts.originals.items()


def _copies(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name in a state dict and the copy of every part of every adapter."""
    parts = _parts(model)
    if parts is None:
        return
    for name, copies in parts.trained.items():
        for path, part in copies.items():
            yield f"{path}.{COPIES}.{name}", part


def _place(model: nn.Module, path: str) -> str:
    """Return the path of a part with `base_layer`, where an adapter is around its layer."""
    parent, _, leaf = path.rpartition(".")
    if "base_layer" in get_submodule(model, parent)._modules:
        return f"{parent}.base_layer.{leaf}"
    return path


def _tensors(part: Any, key: str) -> dict[str, Tensor]:
    """Return the live tensors of a part, whose names begin with `key`."""
    if isinstance(part, nn.Module):
        return part.state_dict(prefix=f"{key}.")
    return {key: part.detach()}


def _take(state: dict[str, Any], key: str) -> dict[str, Any]:
    """Remove a key and everything below it from a state dict, and return it by plain names."""
    taken = {}
    for name in list(state):
        plain = plain_key(name)
        if plain == plain_key(key) or plain.startswith(f"{plain_key(key)}."):
            taken[plain] = state.pop(name)
    return taken


@torch.no_grad()
def _load(
    part: Any,
    values: dict[str, Any],
    key: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Copy values into a part, or report the reason why they do not fit."""
    for name, tensor in _tensors(part, plain_key(key)).items():
        value = values.get(name)
        if value is None:
            missing_keys.append(name)
        elif value.shape != tensor.shape:
            error_msgs.append(
                f"size mismatch for {name}: got {tuple(value.shape)}, the model has "
                f"{tuple(tensor.shape)}."
            )
        else:
            tensor.copy_(value)
