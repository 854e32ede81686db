"""Modules of a model, and their paths."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from minilora.common.wrappers import named_modules, unwrap_model


def ends_with(path: str, entry: str) -> bool:
    """Return True if `entry` is a module path or its end: "q_proj" in "layers.0.q_proj".

    Args:
        path: Path of a module.
        entry: Complete path or last parts.
    """
    return path == entry or path.endswith(f".{entry}")


def ends_with_any(path: str, entries: Iterable[str]) -> bool:
    """Return True if `ends_with` is true for one of several entries.

    Args:
        path: Path of a module.
        entries: Complete paths or last parts.
    """
    return any(ends_with(path, entry) for entry in entries)


def is_within(path: str, module: str) -> bool:
    """Return True if `path` is the path of a module or of something inside it.

    Args:
        path: Path of a module or parameter.
        module: Path of the module.
    """
    return f"{path}.".startswith(f"{module}.")


def is_conv1d(module: nn.Module) -> bool:
    """Return True for Conv1D of transformers, a linear layer with a weight of shape (in, out).

    Args:
        module: Any module.
    """
    return hasattr(module, "nx") and hasattr(module, "nf")


def output_layer(model: Any) -> nn.Module | None:
    """Return the layer that computes logits; None if the model cannot name it.

    Args:
        model: A model, with `get_output_embeddings` as in transformers or without it.
    """
    get = getattr(unwrap_model(model), "get_output_embeddings", None)
    return None if get is None else get()


def tied_modules(
    model: nn.Module, originals: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """Return the modules that share their weight, each with the paths of the others.

    Args:
        model: The model. `base_layer` at the end of a path is left out of the result.
        originals: Modules by path that are compared in place of the model's own.
    """
    paths_of_weight: dict[int, list[str]] = {}
    for path, module in named_modules(model, remove_duplicate=False):
        module = (originals or {}).get(path, module)
        parameters = module._parameters
        weight = parameters.get("weight", parameters.get("blocks"))  # blocks: of a GGUF file
        if weight is not None:
            path = path.removesuffix(".base_layer")
            paths = paths_of_weight.setdefault(id(weight), [])
            if path not in paths:  # a layer with trained tokens holds its original
                paths.append(path)
    tied: dict[str, list[str]] = {}
    for group in paths_of_weight.values():
        if len(group) > 1:
            for path in group:
                tied[path] = [other for other in group if other != path]
    return tied
