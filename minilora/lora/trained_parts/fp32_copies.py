"""Copies of modules and biases that train in fp32 in the place of their originals.

The copy of a module in a 16-bit model computes in fp32 and returns its output in 16 bits. If the
model is cast later, as by `.to(torch.bfloat16)`, the copy stays in fp32 and the original is cast.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Part = nn.Module | nn.Parameter


def move_like(part: Part, previous: Part, holder: nn.Module) -> None:
    """Move a part to the device of the part that it replaces, in the same training mode.

    A bias also takes the dtype of the weight next to it, which may have been cast in between.

    Args:
        part: The part that is put in place.
        previous: The part that it replaces.
        holder: The module that holds it.
    """
    if isinstance(previous, nn.Parameter):
        device = previous.device
    else:
        device = next(previous.parameters()).device
    if isinstance(part, nn.Parameter):
        dtype = part.dtype
        for other in holder.parameters(recurse=False):
            if other is not previous and other.is_floating_point():
                dtype = other.dtype
        # in place, because an optimiser may hold the parameter
        part.data = part.data.to(device, dtype)
    else:
        _note_dtypes(part)
        part.to(device)
        part.train(getattr(previous, "training", False))


def copy_bias(holder: nn.Module, bias: nn.Parameter, path: str) -> nn.Parameter:
    """Return a frozen copy of a bias, in fp32 if it has 16 bits.

    Args:
        holder: The layer of the bias.
        bias: The bias.
        path: Its name, for errors.

    Raises:
        ValueError: The bias and other parameters of its layer have 16 bits.
    """
    if bias.dtype.itemsize >= 4:
        return nn.Parameter(bias.detach().clone(), requires_grad=False)
    for parameter in holder.parameters(recurse=False):
        if parameter is not bias and parameter.dtype.is_floating_point:
            raise ValueError(
                f"bias: {path} is {bias.dtype} and trains in fp32: "
                'load the model with dtype="float32".'
            )
    return nn.Parameter(bias.float().detach().clone(), requires_grad=False)


def copy_module(module: nn.Module, path: str, memo: dict[int, Any]) -> nn.Module:
    """Return a frozen copy of a module, which computes in fp32 if the module has 16 bits.

    Args:
        module: The original.
        path: Its name, for errors.
        memo: The memo of `copy.deepcopy`; with one memo, shared weights stay shared.

    Raises:
        ValueError: The module has no parameters, or is quantised.
    """
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if not dtypes:
        raise ValueError(f"modules_to_save: {path!r} has no parameters. Leave it out.")
    if any(not dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"modules_to_save: {path!r} is quantised and cannot train: leave it out of quantising, "
            'or load a GGUF file without quantize="keep".'
        )
    copied = copy.deepcopy(module, memo).requires_grad_(False)
    return as_copy(copied, module)


def as_copy(copied: nn.Module, original: nn.Module) -> nn.Module:
    """Make a copy of a module compute in fp32 if the original has 16 bits, and return it.

    Args:
        copied: The copy.
        original: The original.
    """
    if any(parameter.dtype.itemsize < 4 for parameter in original.parameters()):
        copied.float()
    # Plain attributes: the original is not a submodule of its copy.
    copied.__dict__["original"] = original
    copied.__dict__["_apply"] = partial(_apply, copied)
    _note_dtypes(copied)
    copied.register_forward_pre_hook(_to_own_dtype, with_kwargs=True)
    copied.register_forward_hook(_to_model_dtype)
    return copied


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert a copy, but never to 16 bits, and its original; `_apply` of the copy.

    `.to()`, `.half()` and `.bfloat16()` of a model reach only the modules that stand in it. The copy
    is the fp32 master that the optimiser updates. The original takes its place later.
    """

    def apply_without_16_bits(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        if converted.dtype.itemsize >= 4 or not converted.is_floating_point():
            return converted
        return tensor.to(converted.device)

    original: Any = module.__dict__["original"]
    original._apply(fn, recurse)
    type(module)._apply(module, apply_without_16_bits, recurse)
    _note_dtypes(module)
    return module


def _note_dtypes(module: nn.Module) -> None:
    """Store the dtype of a copy and the lowest dtype of its original, for the hooks."""
    original = module.__dict__.get("original")
    if original is not None:
        dtypes = [p.dtype for p in original.parameters()]
        module.__dict__["model_dtype"] = min(dtypes, key=lambda dtype: dtype.itemsize)
        module.__dict__["own_dtype"] = next(module.parameters()).dtype


def _to_own_dtype(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Cast the inputs of the copy of a 16-bit module to its own dtype; a forward pre-hook."""
    if module.model_dtype.itemsize >= 4:
        return None
    return _cast(args, module.own_dtype), _cast(kwargs, module.own_dtype)


def _to_model_dtype(module: Any, args: tuple, output: Any) -> Any:
    """Cast the output of the copy of a 16-bit module to the model's dtype; a forward hook."""
    if module.model_dtype.itemsize >= 4:
        return None
    return _cast(output, module.model_dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with the floating-point tensors in it, also in tuples and dicts, cast."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)([_cast(item, dtype) for item in value])
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
