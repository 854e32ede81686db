"""Modules and biases that train together with an adapter: PEFT's `modules_to_save` and `bias`.

Such a part trains as a copy in fp32, which takes the place of the original while the adapter is
active (fp32_copies.py). The originals change only where the model is cast: without the adapter the
model is the base, bit for bit.

A part is known by its name in the model without `base_layer`: "lm_head" is a module,
"model.norm.bias" a parameter.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

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
from minilora.lora.trained_parts.fp32_copies import (
    Part,
    as_copy,
    copy_bias,
    copy_module,
    move_like,
)
from minilora.lora.trained_parts.trained_state import register_hooks
from minilora.lora.trained_parts.trained_tokens import TrainedTokens
from minilora.lora.trained_parts.vocabulary import resize_rows


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
            move_like(part, previous, holder)
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
                trained = self.trained[name][path]
                if not isinstance(original, nn.Module) or not isinstance(trained, nn.Module):
                    continue
                for other in [original, *self._copies_by_others(path, name)]:
                    resize_rows(other, trained, memo)

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
            return copy_bias(holder, part, path)
        return copy_module(part, path, memo)


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
        return as_copy(part, original)
    return part


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
