"""Find modules in a model: by the end of their name, the output layer, the ones that share a weight. And put copies
that train in the place of some of them."""

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import ends_with, tied_modules, unknown, within
from minilora.lora.layer import LoRALayer

Part = nn.Module | nn.Parameter


class TrainedParts:
    """What trains with an adapter beside A and B: whole modules and biases, which take the places of the originals.

    A part is known by its plain name, without `base_layer`: "lm_head" is a module, "model.norm.bias" a parameter. Its
    copy trains in fp32; a module of a 16-bit model then computes in fp32 and hands its output back in 16 bits. Only
    who stands in which place changes, so a model without the adapter is the base, bit for bit.
    """

    def __init__(self):
        self.originals: dict[str, Part] = {}
        self.trained: dict[str, dict[str, Part]] = {}  # adapter → name of the part → its copy
        self.active: tuple[str, ...] = ()
        self.in_shards = False  # FSDP2 puts tensors of its own in the places of biases

    def of(self, names: Iterable[str]) -> dict[str, Part]:
        """The copies of these adapters by name; ValueError if two of them train one part, as copies do not add up."""
        found: dict[str, Part] = {}
        for name in names:
            if both := found.keys() & self.trained.get(name, {}).keys():
                raise ValueError(f"adapter {name!r} and another one both train {min(both)!r}: use one at a time.")
            found |= self.trained.get(name, {})
        return found

    def place(self, model: nn.Module, names: Iterable[str]) -> None:
        """Put the copies of these adapters in place, trainable, and the originals everywhere else, frozen."""
        names = tuple(names)
        if self.in_shards and any(isinstance(part, nn.Parameter) for part in self.originals.values()):
            raise ValueError(
                "biases that train cannot be switched off while the model is in shards, as DPO and KLToBase do to "
                'compare with the base: leave fsdp False, or inject with bias="none".'
            )
        wanted = self.of(names)
        for path, original in self.originals.items():
            holder, leaf = part_holder(model, path)
            now, then = getattr(holder, leaf), wanted.get(path, original)
            now.requires_grad_(False)
            device = now.device if isinstance(now, nn.Parameter) else next(now.parameters()).device
            if isinstance(then, nn.Parameter):
                then.data = then.data.to(device)  # the same object: an optimiser may hold it
            else:
                then.to(device).train(getattr(now, "training", False))
            setattr(holder, leaf, then.requires_grad_(path in wanted))
        self.active = names

    def add(self, model: nn.Module, name: str, parts: dict[str, Part]) -> None:
        """Put the copies of a new adapter in place, and only them."""
        self.place(model, [])
        for path in parts:
            holder, leaf = part_holder(model, path)
            self.originals.setdefault(path, getattr(holder, leaf))
        self.trained[name] = parts
        self.place(model, [name])

    def remove(self, model: nn.Module, name: str) -> None:
        """Take an adapter's copies out for good."""
        self.place(model, [active for active in self.active if active != name])
        self.trained.pop(name, None)
        used = {path for parts in self.trained.values() for path in parts}
        self.originals = {path: part for path, part in self.originals.items() if path in used}

    def tied(self, model: nn.Module) -> dict[str, list[str]]:
        """Modules whose weight stands under another plain name too → those names; adapters and copies aside."""
        return tied_modules(model, self.originals)

    def new(self, model: nn.Module, wanted: Iterable[str], bias: str, adapters: set[str],
            shared: bool = False) -> dict[str, Part]:  # fmt: skip
        """Frozen copies of the modules `wanted` (ends of names) and of the biases of all layers or of `adapters`.

        shared: what shares a weight with one of them gets a copy as well, and the copies share theirs.
        """
        modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
        layers = {path for path, module in modules.items() if isinstance(module, LoRALayer)}
        parts: list[str] = []
        for entry in wanted:
            parts += (fitting := [path for path in modules if ends_with(path, entry)])
            if not fitting:
                raise unknown("modules_to_save", entry, modules)
        for path, others in self.tied(model).items() if shared else ():
            if any(within(path, part) for part in parts):
                parts += [name for name in others if not any(within(name, part) for part in parts)]
        for path in parts:
            if clash := [name for name in (*adapters, *layers, *parts) if name != path and within(name, path)]:
                raise ValueError(
                    f"modules_to_save: {path!r} holds {clash[0]!r}, which trains too: name one of the two."
                )
            if path in adapters | layers:
                raise ValueError(f"modules_to_save: {path!r} has an adapter: leave it out of one of the two.")
        whole = tuple(parts)
        inside = tuple(f"{path}.adapters." for path in layers)
        for name, _ in model.named_parameters() if bias != "none" else ():
            if name.startswith(inside):
                continue  # a lora_bias
            parent, _, leaf = name.rpartition(".")
            parent = plain if (plain := parent.removesuffix(".base_layer")) in layers else parent
            chosen = "bias" in leaf and (bias == "all" or parent in adapters)
            if chosen and not any(within(parent, path) for path in whole):
                parts.append(f"{parent}.{leaf}" if parent else leaf)
        for path in (*parts, *adapters):
            inside = [name for name in self.originals if within(path, name) and (name != path or path in adapters)]
            around = [name for name in self.originals if path in whole and name != path and within(name, path)]
            if inside or around:
                clash = (inside + around)[0]
                raise ValueError(f"{path!r}: another adapter trains {clash!r} with it: delete_adapter that one first.")
        memo: dict[int, Any] = {}  # what deepcopy has copied: with one for all, copies share what originals share
        return {path: self._copy(model, path, memo if shared else {}) for path in parts}

    def _copy(self, model: nn.Module, path: str, memo: dict[int, Any]) -> Part:
        """A frozen fp32 copy of the part `path`. ValueError for a part that cannot train."""
        holder, leaf = part_holder(model, path)
        part = self.originals[path] if path in self.originals else getattr(holder, leaf)
        if isinstance(part, nn.Parameter):
            others = [p.dtype for p in holder.parameters(recurse=False) if p is not part]
            if part.dtype.itemsize < 4 and any(dtype.is_floating_point for dtype in others):
                raise ValueError(
                    f'bias: {path} is {part.dtype} and trains in fp32: load the model with dtype="float32".'
                )
            return nn.Parameter((part.float() if part.dtype.itemsize < 4 else part).detach().clone(), False)
        dtypes = {parameter.dtype for parameter in part.parameters()}
        if not dtypes or any(not dtype.is_floating_point for dtype in dtypes):
            what = "has no parameters" if not dtypes else "is in 4 bits and cannot train: leave it out of quantising"
            raise ValueError(f"modules_to_save: {path!r} {what}.")
        copied = copy.deepcopy(part, memo).requires_grad_(False)
        if low := next((dtype for dtype in dtypes if dtype.itemsize < 4), None):
            copied.float().register_forward_pre_hook(_to_fp32)
            copied.register_forward_hook(partial(_from_fp32, low))
        return copied


def part_holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a part under its plain name, and the part's name in it."""
    parent, _, leaf = path.rpartition(".")
    holder = model.get_submodule(parent)
    return (holder.base_layer if isinstance(holder, LoRALayer) else holder), leaf


def _to_fp32(module: nn.Module, args: tuple) -> tuple:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _from_fp32(dtype: torch.dtype, module: nn.Module, args: tuple, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output
