"""Modules and biases that train together with an adapter: PEFT's `modules_to_save` and `bias`.

Such a part trains as a copy in fp32, which takes the place of the original while the adapter is
active. The copy of a module in a 16-bit model computes in fp32 and returns its output in 16 bits.
Where the model is cast later (`.to(torch.bfloat16)`), the copy stays in fp32 and the original is
cast. Otherwise the originals never change: without the adapter the model is the base, bit for bit.

A part is known by its name in the model without `base_layer`: "lm_head" is a module,
"model.norm.bias" a parameter.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import (
    ends_with,
    get_submodule,
    is_within,
    named_modules,
    named_parameters,
    tied_modules,
    unknown_name,
    unwrap_model,
)
from minilora.lora.layer import LoRALayer
from minilora.lora.trained_state import register_hooks
from minilora.lora.trained_tokens import TrainedTokens
from minilora.lora.vocabulary import resize_rows

Part = nn.Module | nn.Parameter


class TrainedParts:
    """The parts of a model that train with an adapter, and their originals.

    Attributes:
        originals: The original of each part by name.
        trained: The copies by name of the adapter, then by name of the part.
        active: Names of the adapters whose copies are in place.
        frozen: Names of parts by adapter that belong to it but do not train: rows of new tokens.
        in_shards: True while FSDP2 shards the model and has replaced its biases.
    """

    def __init__(self):
        self.originals: dict[str, Part] = {}
        self.trained: dict[str, dict[str, Part]] = {}
        self.active: tuple[str, ...] = ()
        self.frozen: dict[str, set[str]] = {}
        self.in_shards = False

    def copies_of(self, names: Iterable[str]) -> dict[str, Part]:
        """Return the copies of several adapters by name of the part.

        Args:
            names: Names of adapters.

        Raises:
            ValueError: Two of the adapters train the same part. Copies cannot be added.
        """
        copies: dict[str, Part] = {}
        for name in names:
            added = self.trained.get(name, {})
            common = copies.keys() & added.keys()
            if common:
                raise ValueError(
                    f"adapter {name!r} and another one both train {min(common)!r}: "
                    "use one at a time."
                )
            copies |= added
        return copies

    def activate(self, model: nn.Module, names: Iterable[str]) -> None:
        """Put the copies of these adapters in place, trainable, and all other originals, frozen.

        Args:
            model: The model.
            names: Names of adapters.

        Raises:
            ValueError: Two of the adapters train the same part, or the biases of a sharded model
                cannot be exchanged.
        """
        names = tuple(names)
        has_biases = any(isinstance(part, nn.Parameter) for part in self.originals.values())
        if self.in_shards and has_biases:
            raise ValueError(
                "biases that train cannot be switched off while the model is sharded, as DPO and "
                "KLToBase do to compare with the base: leave fsdp False, or inject with "
                'bias="none".'
            )
        self.adopt_replaced(model)
        copies = self.copies_of(names)
        frozen: set[str] = set()
        for name in names:
            frozen |= self.frozen.get(name, set())
        for path, original in self.originals.items():
            holder, leaf = part_holder(model, path)
            previous = getattr(holder, leaf)
            previous.requires_grad_(False)
            part = copies.get(path, original)
            _move_like(part, previous, holder)
            part.requires_grad_(path in copies and path not in frozen)
            setattr(holder, leaf, part)
        self.active = names

    def add(self, model: nn.Module, name: str, copies: dict[str, Part]) -> None:
        """Register the copies of a new adapter and put them, and no others, in place.

        Args:
            model: The model.
            name: Name of the adapter.
            copies: Copies by name of the part, from `new_copies`.
        """
        self.activate(model, [])
        for path in copies:
            holder, leaf = part_holder(model, path)
            self.originals.setdefault(path, getattr(holder, leaf))
        self.trained[name] = copies
        if copies:
            register_hooks(unwrap_model(model))
        self.activate(model, [name])

    def adopt_replaced(self, model: nn.Module) -> None:
        """Take over the layers that replaced a copy while it was in place, as a resize does.

        The original, and the copies of other adapters, get the same number of rows.

        Args:
            model: The model.
        """
        if self.in_shards:
            return
        memo: dict[int, nn.Parameter] = {}  # with one memo, shared weights stay shared
        for name in self.active:
            for path, copied in self.trained.get(name, {}).items():
                holder, leaf = part_holder(model, path)
                in_place = getattr(holder, leaf, None)
                original = self.originals[path]
                if in_place is not copied and _replaces(in_place, copied):
                    self.trained[name][path] = _trains_in_fp32(in_place, original)
                if not isinstance(original, nn.Module):
                    continue
                for other in [original, *self._copies_by_others(path, name)]:
                    resize_rows(other, self.trained[name][path], memo)

    def _copies_by_others(self, path: str, name: str) -> list[nn.Module]:
        """Return the copies of a module that train with other adapters."""
        copies = [
            parts[path] for other, parts in self.trained.items() if other != name and path in parts
        ]
        return [part for part in copies if isinstance(part, nn.Module)]

    def remove(self, model: nn.Module, name: str) -> None:
        """Remove the copies of an adapter.

        Args:
            model: The model.
            name: Name of the adapter.
        """
        self.activate(model, [active for active in self.active if active != name])
        self.trained.pop(name, None)
        self.frozen.pop(name, None)
        still_trained: set[str] = set()
        for copies in self.trained.values():
            still_trained |= copies.keys()
        self.originals = {
            path: part for path, part in self.originals.items() if path in still_trained
        }

    def tied(self, model: nn.Module) -> dict[str, list[str]]:
        """Return the modules of the base that share their weight, with the names of the others.

        Args:
            model: The model. Its adapters and copies are ignored.
        """
        return tied_modules(model, self.originals)

    def new_copies(
        self,
        model: nn.Module,
        entries: Iterable[str],
        bias: str,
        adapted: set[str],
        shared: bool = False,
    ) -> dict[str, Part]:
        """Return frozen fp32 copies of modules and biases, by name. The model is not changed.

        Args:
            model: The model.
            entries: Names, or ends of names, of modules to copy (`modules_to_save`).
            bias: Biases to copy: "none", "all", or "lora_only" for those of `adapted`.
            adapted: Names of the layers that the new adapter adapts.
            shared: Also copy all modules that share a weight with a copied one. Their copies share
                it too.

        Raises:
            ValueError: An entry matches nothing, cannot train, or conflicts with an adapter.
        """
        modules = _matching_modules(model, entries)
        if shared:
            modules += self._sharing_modules(model, modules)
        lora_paths = _lora_paths(model)
        _check_modules(modules, adapted, lora_paths)
        biases: list[str] = []
        if bias == "all":
            biases = _bias_names(model, modules, lora_paths, None)
        elif bias == "lora_only":
            biases = _bias_names(model, modules, lora_paths, adapted)
        self._check_other_adapters(modules, biases, adapted)
        copies: dict[str, Part] = {}
        memo: dict[int, Any] = {}  # of deepcopy: with one memo, shared weights stay shared
        for path in [*modules, *biases]:
            if not shared:
                memo = {}
            copies[path] = self._copy(model, path, memo)
        return copies

    def _sharing_modules(self, model: nn.Module, modules: list[str]) -> list[str]:
        """Return further modules that share a weight with one of `modules`."""
        added: list[str] = []
        for path, others in self.tied(model).items():
            present = [*modules, *added]
            if _within_any(path, present):
                added += [other for other in others if not _within_any(other, present)]
        return added

    def _check_other_adapters(
        self, modules: list[str], biases: list[str], adapted: set[str]
    ) -> None:
        """Raise ValueError for a part that overlaps with a part of another adapter."""
        for path in [*modules, *biases, *adapted]:
            for name in self.originals:
                inside = is_within(path, name) and (name != path or path in adapted)
                around = path in modules and name != path and is_within(name, path)
                if inside or around:
                    raise ValueError(
                        f"{path!r}: another adapter trains {name!r} with it: "
                        "delete_adapter that one first."
                    )

    def _copy(self, model: nn.Module, path: str, memo: dict[int, Any]) -> Part:
        """Return a frozen fp32 copy of one part, or raise ValueError if the part cannot train."""
        holder, leaf = part_holder(model, path)
        part = self.originals.get(path)
        if part is None:
            part = getattr(holder, leaf)
        if isinstance(part, nn.Parameter):
            return _copy_bias(holder, part, path)
        return _copy_module(part, path, memo)


def part_holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that contains a part, and the name of the part in it.

    Args:
        model: The model.
        path: Name of the part, without `base_layer`.
    """
    parent, _, leaf = path.rpartition(".")
    holder = get_submodule(model, parent)
    if isinstance(holder, (LoRALayer, TrainedTokens)):
        holder = holder.base_layer
    return holder, leaf


def _replaces(in_place: Any, copied: Part) -> bool:
    """Return True if a layer or parameter has taken the place of a copy, and is not its wrapper."""
    if isinstance(copied, nn.Parameter):
        return isinstance(in_place, nn.Parameter)
    return isinstance(in_place, nn.Module) and all(
        part is not copied for part in in_place.modules()
    )


def _trains_in_fp32(part: Any, original: Part) -> Part:
    """Return a layer that replaced a copy, with the casts of a copy if the original has 16 bits."""
    if isinstance(part, nn.Module) and isinstance(original, nn.Module):
        return _as_copy(part, original)
    return part


def _move_like(part: Part, previous: Part, holder: nn.Module) -> None:
    """Move a part to the device of the part that it replaces, in the same training mode.

    A bias also takes the dtype of the weight next to it, which may have been cast in between.
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


def _within_any(path: str, modules: Iterable[str]) -> bool:
    """Return True if a path is inside one of several modules, or is one of them."""
    return any(is_within(path, module) for module in modules)


def _lora_paths(model: nn.Module) -> set[str]:
    """Return the names of all LoRALayers."""
    modules = named_modules(model, remove_duplicate=False)
    return {path for path, module in modules if path and isinstance(module, LoRALayer)}


def _matching_modules(model: nn.Module, entries: Iterable[str]) -> list[str]:
    """Return the modules that match an entry, or raise ValueError for an entry without any."""
    paths = [path for path, _ in named_modules(model, remove_duplicate=False) if path]
    matching: list[str] = []
    for entry in entries:
        matches = [path for path in paths if ends_with(path, entry)]
        if not matches:
            raise unknown_name("modules_to_save", entry, paths)
        matching += matches
    return matching


def _check_modules(modules: list[str], adapted: set[str], lora_paths: set[str]) -> None:
    """Raise ValueError for a module that contains, or is, something else that trains."""
    for path in modules:
        for other in (*adapted, *lora_paths, *modules):
            if other != path and is_within(other, path):
                raise ValueError(
                    f"modules_to_save: {path!r} holds {other!r}, which trains too: "
                    "name one of the two."
                )
        if path in adapted or path in lora_paths:
            raise ValueError(
                f"modules_to_save: {path!r} has an adapter: leave it out of one of the two."
            )


def _bias_names(
    model: nn.Module, modules: list[str], lora_paths: set[str], adapted: set[str] | None
) -> list[str]:
    """Return the biases of the layers `adapted` (None: of all), but those inside `modules`."""
    adapter_prefixes = tuple(f"{path}.adapters." for path in lora_paths)
    names: list[str] = []
    for name, _ in named_parameters(model):
        if name.startswith(adapter_prefixes):
            continue  # a lora_bias
        parent, _, leaf = name.rpartition(".")
        if parent.removesuffix(".base_layer") in lora_paths:
            parent = parent.removesuffix(".base_layer")
        if "bias" not in leaf or (adapted is not None and parent not in adapted):
            continue
        if not _within_any(parent, modules):
            names.append(f"{parent}.{leaf}" if parent else leaf)
    return names


def _copy_bias(holder: nn.Module, bias: nn.Parameter, path: str) -> nn.Parameter:
    """Return a frozen copy of a bias, in fp32 if it has 16 bits."""
    if bias.dtype.itemsize >= 4:
        return nn.Parameter(bias.detach().clone(), requires_grad=False)
    for parameter in holder.parameters(recurse=False):
        if parameter is not bias and parameter.dtype.is_floating_point:
            raise ValueError(
                f"bias: {path} is {bias.dtype} and trains in fp32: "
                'load the model with dtype="float32".'
            )
    return nn.Parameter(bias.float().detach().clone(), requires_grad=False)


def _copy_module(module: nn.Module, path: str, memo: dict[int, Any]) -> nn.Module:
    """Return a frozen copy of a module, which computes in fp32 if the module has 16 bits."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if not dtypes:
        raise ValueError(f"modules_to_save: {path!r} has no parameters. Leave it out.")
    if any(not dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"modules_to_save: {path!r} is in 4 bits and cannot train: leave it out of quantising."
        )
    copied = copy.deepcopy(module, memo).requires_grad_(False)
    return _as_copy(copied, module)


def _as_copy(copied: nn.Module, original: nn.Module) -> nn.Module:
    """Make a copy of a module compute in fp32 if the original has 16 bits, and return it."""
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

    `.to()`, `.half()` and `.bfloat16()` of a model reach only what stands in it. The copy is the
    fp32 master that the optimiser updates. The original takes its place later.
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
