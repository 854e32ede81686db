"""One view of a model, with or without wrappers around it or inside it.

torch.compile, DDP, FSDP and others put a module around another one. The wrapper's own attributes
and the paths of its parameters are then those of the wrapper: `_orig_mod.model.norm.weight`. The
functions here see through wrappers, so that a module has one path, and an adapter file has the same
keys, whichever wrappers the model has:

    torch.compile(model)                     _orig_mod
    checkpoint_wrapper(layer)                _checkpoint_wrapped_module
    FullyShardedDataParallel(model)          _fsdp_wrapped_module
    DataParallel, DDP, AveragedModel         module
    DeepSpeed's engine                       module
    PeftModel(model)                         get_base_model(), unless it adds tokens to the input

`fully_shard` (FSDP2) and `model.compile()` change a module in place and need nothing.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

_OWN_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WITH_MODULE = ("DataParallel", "DistributedDataParallel", "AveragedModel", "DeepSpeedEngine")
_REPLICAS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def unwrap_model(model: Any) -> nn.Module:
    """Return the model inside any number of wrappers; a model without wrappers is returned itself.

    Args:
        model: A model or a wrapper of one.
    """
    while True:
        name = _wrapped_name(model)
        if name is not None:
            model = model._modules[name]
        elif _is_peft_model(model):
            model = model.get_base_model()
        else:
            return model


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of everything in a model, as torch does, without wrappers.

    Args:
        model: A model or a wrapper of one.
        remove_duplicate: Yield a module that has several paths only once.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap_model(module)
        if remove_duplicate:
            if module in seen:
                return
            seen.add(module)
        yield path, module
        for name, child in list(module._modules.items()):
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    yield from walk(model, "")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the path of every parameter without wrappers; a parameter with several paths once.

    Args:
        model: A model or a wrapper of one.
    """
    seen: set[int] = set()
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter


def get_submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of `named_modules`.

    Args:
        model: A model or a wrapper of one.
        path: Path of the module; "" is the model itself.

    Raises:
        AttributeError: The model has no module at this path.
    """
    module = unwrap_model(model)
    for name in path.split(".") if path else ():
        module = unwrap_model(module.get_submodule(name))
    return module


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of `named_modules`. A wrapper around the old one keeps its place.

    Args:
        model: A model or a wrapper of one.
        path: Path of a module that the model has, not "".
        module: The new module.
    """
    parent, _, name = path.rpartition(".")
    holder: Any = get_submodule(model, parent)
    inner = _wrapped_name(holder._modules[name])
    while inner is not None:
        holder = holder._modules[name]
        name = inner
        inner = _wrapped_name(holder._modules[name])
    setattr(holder, name, module)
    if name == "_orig_mod":  # torch.compile's wrapper has compiled the call of the old module
        holder._initialize()


def plain_key(key: str) -> str:
    """Return a key of a state dict, or a path, without the names of wrappers.

    Args:
        key: A key such as "layers.0._orig_mod.weight".
    """
    return ".".join(name for name in key.split(".") if name not in _OWN_NAMES)


def wrappers_inside(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return every wrapper inside a model with the module that it wraps, the innermost first.

    Args:
        model: A model without wrappers around it.
    """
    pairs = []
    for module in model.modules():
        if module is not model and _wrapped_name(module) is not None:
            pairs.append((module, unwrap_model(module)))
    return pairs[::-1]


def replicating_wrapper(model: nn.Module) -> str | None:
    """Return the class name of a wrapper that spreads a model over devices or processes, or None.

    Args:
        model: A model or a wrapper of one.
    """
    for module in model.modules():
        for name in _REPLICAS:
            if _wrapped_name(module) is not None and _is_a(module, (name,)):
                return name
    return None


def is_compiled(model: nn.Module) -> bool:
    """Return True if calling a model runs the code that torch.compile made of it.

    Args:
        model: A model or a wrapper of one.
    """
    while True:
        if model._compiled_call_impl is not None or "_orig_mod" in model._modules:
            return True
        name = _wrapped_name(model)
        if name is None:
            return False
        model = model.get_submodule(name)


def peft_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that PEFT put into a model, the outermost ones only.

    Args:
        model: A model or a wrapper of one.
    """
    paths: list[str] = []
    for path, module in named_modules(model):
        inside = tuple(f"{outer}." for outer in paths)
        if _is_from_peft(module) and not path.startswith(inside):
            paths.append(path)
    return paths


def _wrapped_name(module: nn.Module) -> str | None:
    """Return the name of the child that a wrapper wraps; None for other modules."""
    for name in _OWN_NAMES:
        if name in module._modules:
            return name
    if "module" in module._modules and _is_a(module, _WITH_MODULE):
        return "module"
    return None


def _is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Return True if a class of these names is among the classes of a module."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _is_peft_model(module: Any) -> bool:
    """Return True for a PeftModel whose layers do all of its work.

    Prompt learning adds trained tokens to the input, which only the PeftModel itself does.
    """
    if not _is_from_peft(module) or not hasattr(module, "get_base_model"):
        return False
    return not module.active_peft_config.is_prompt_learning


def _is_from_peft(module: nn.Module) -> bool:
    """Return True if PEFT defines the class of a module, or a class that it is derived from."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)
