"""Find modules in a model: by the end of their name, the output layer, the ones that share a weight."""

from collections.abc import Callable

from torch import nn


def ends_with(path: str, entry: str) -> bool:
    """Whether `entry` is the module path or its last parts: "q_proj" fits "layers.0.q_proj", not "layers.0.xq_proj"."""
    return path == entry or path.endswith(f".{entry}")


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with its weight stored as (in, out)."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits, where the model says which it is."""
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def tied_modules(model: nn.Module) -> dict[str, list[str]]:
    """Modules that hold a parameter which another module holds too: their path → the other parameters' names."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((path, f"{path}.{name}"))
    tied = {}
    for group in holders.values():
        for path, own in group:
            if others := [name for _, name in group if name != own]:
                tied[path] = others
    return tied
