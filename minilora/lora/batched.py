"""A batch in which every row has an adapter of its own, or none: h_b = W x_b + s_b B_b A_b x_b for each row b.

W x is one product for all rows, as ever. The adapters' factors are gathered, a pair for each row, ranks padded with
zeros to the largest, and two batched products do the rest:

    A (rows, r, in), s B (rows, out, r)  ->  z = x Aᵀ (rows, T, r),   h = W x + z (s B)ᵀ (rows, T, out)

So sixteen adapters take as many products as one. Gathered factors are kept until the rows, or an adapter, change (in
place, as load_adapter and optimisers do; writing through `.data` goes unseen), and then in the same memory: a page that
is new to a process costs more than filling it. With gradients they are gathered anew in each forward pass, and reach
every adapter. Factors wait wherever they are, on the CPU too, and are brought to the rows' device. Simplified: without
a kernel that reads factors in place a row's lie in memory twice, for a 16-bit model on a CPU three times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.active import check_adapters
from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.lora.registry import lora_configs, lora_layers

Factors = tuple[Tensor, Tensor, Tensor | None]  # A (rows, r, in), s B (rows, out, r), s b (rows, 1, out)


class Rows:
    """Whose row is whose; the layers ask it in every forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str | None]):
        self.names = tuple(names)
        self.kept: dict[Any, Any] = {}  # id of a layer, place, dtype -> for whom, parameters and versions; factors
        self.rooms: dict[Any, Tensor] = {}  # the same and which factor -> memory for as many rows as there ever were
        given, layers = dict.fromkeys(name for name in names if name is not None), lora_layers(model)
        check_adapters(model, given)
        for name in given:
            if lora_configs(model).parts.trained.get(name):
                raise ValueError(f"adapter {name!r} trains whole modules or biases, which all rows share: set_adapter.")
            for path, layer in layers.items():
                if name in layer.adapters and not isinstance(_plain(layer.adapters[name]), LoRAAdapter):
                    kind = type(layer.adapters[name]).__name__
                    raise ValueError(f"{path}: {kind} cannot be chosen row by row, linear LoRA can: set_adapter.")

    def choose(self, names: Sequence[str | None]) -> None:
        """Other rows from here on, of adapters that were named at the start."""
        if tuple(names) != self.names:  # equal ones stay the same object, by which `kept` is known
            self.names = tuple(names)

    def forward(self, layer: LoRALayer, x: Tensor) -> Tensor:
        """x (rows, …, in) -> (rows, …, out); in the place of the layer's own forward."""
        if len(x) != len(self.names):
            raise ValueError(
                f"per_row_adapters: {len(self.names)} adapters were named for {len(x)} rows: one for each."
            )
        h = layer.base_layer(x)  # (rows, …, out)
        if not any(self.names):
            return h
        x_BTI = x.reshape(len(x), -1, x.shape[-1])
        dtype = h.dtype
        if (
            h.is_cpu and x_BTI.shape[1] == 1
        ):  # so small a product takes twice as long in bf16 (benchmarks/training/choices.py)
            dtype = torch.promote_types(dtype, torch.float32)
        if (factors := self._factors(layer, h.device, dtype)) is None:
            return h
        A, B, b = factors  # (rows, r, in), (rows, out, r), (rows, 1, out)
        z = torch.bmm(x_BTI.to(dtype), A.mT)  # (rows, T, r)
        y = torch.baddbmm(h.reshape(len(x), -1, h.shape[-1]).to(dtype), z, B.mT)  # (rows, T, out)
        return (y if b is None else y + b).to(h.dtype).view(h.shape)

    def _factors(self, layer: LoRALayer, device: torch.device, dtype: torch.dtype) -> Factors | None:
        """The factors of all rows on this layer; None where no row has an adapter here."""
        key, grad = (id(layer), device, dtype), torch.is_grad_enabled()
        names, found, versions, factors = self.kept.get(key, (None, (), (), None))
        if not grad and names is self.names and versions == tuple(p._version for p in found):
            return factors
        chosen = [layer.adapters[name] if name and name in layer.adapters else None for name in self.names]
        made = [adapter for adapter in dict.fromkeys(chosen) if adapter is not None]
        factors = _gathered(chosen, made, device, partial(self._stacked, key)) if made else None
        if not grad:
            found = tuple(p for adapter in made for p in adapter._parameters.values() if p is not None)
            self.kept[key] = self.names, found, tuple(p._version for p in found), factors
        return factors

    def _stacked(self, key: tuple[Any, ...], which: int, factors: list[Tensor]) -> Tensor:
        """(rows, …) in the key's dtype, in its room unless gradients follow."""
        if torch.is_grad_enabled():
            return torch.stack(factors).to(key[-1])
        room, first = self.rooms.get((key, which)), factors[0]
        if room is None or room.shape[1:] != first.shape or len(room) < len(factors):
            with torch.inference_mode(False):  # what is made there may not be written elsewhere
                room = self.rooms[key, which] = first.new_empty(len(factors), *first.shape, dtype=key[-1])
        room = room[: len(factors)]
        return torch.stack(factors, out=room) if first.dtype == key[-1] else room.copy_(torch.stack(factors))


def _plain(adapter: Any) -> Any:
    """A PiSSA as the LoRA that it is; any other as it is."""
    return adapter.plain() if hasattr(adapter, "plain") else adapter


def _gathered(chosen: list[Any], made: list[Any], device: torch.device, stacked: Callable[..., Tensor]) -> Factors:
    """The factors of each row; `made` are the adapters chosen, once each."""
    if any(adapter.training and not isinstance(adapter.dropout, nn.Identity) for adapter in made):
        raise ValueError("per_row_adapters: lora_dropout is not drawn row by row. model.eval(), or train without it.")
    plain = {adapter: _plain(adapter) for adapter in made}
    pairs = {adapter: [M.to(device) for M in (own.lora_A, own.lora_B)] for adapter, own in plain.items()}
    rank = max(len(A) for A, _ in pairs.values())
    for adapter, (A, B) in pairs.items():
        if len(A) < rank:
            pairs[adapter] = [F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A)))]
    if None in chosen:
        pairs[None] = [torch.zeros_like(M) for M in pairs[made[0]]]
    s = torch.tensor([0.0 if adapter is None else adapter.scaling for adapter in chosen], device=device)[:, None, None]
    A, B = (stacked(i, [pairs[adapter][i] for adapter in chosen]) for i in (0, 1))
    biases = {adapter: own.lora_bias.to(B) for adapter, own in plain.items() if own.lora_bias is not None}
    none = B.new_zeros(B.shape[1])  # (out,)
    b = torch.stack([biases.get(adapter, none) for adapter in chosen])[:, None].mul_(s) if biases else None
    return A, B.mul_(s), b


@contextmanager
def per_row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[Rows]:
    """Inside, row b of every batch goes through the adapter `names[b]`, None for the base alone; none else is active.

    Ranks and layers may differ. The batch is the first dimension of what the layers get, and as long as `names`.
    ValueError: a name that is unknown; an adapter that is more than linear LoRA (DoRA, embeddings, convolutions, whole
    modules or biases that train with it); dropout; another number of rows.
    """
    rows = Rows(model, names)
    before = [(layer, layer.fused) for layer in lora_layers(model).values()]
    for layer, _ in before:
        layer.fused = partial(Rows.forward, rows)  # pyright: ignore[reportAttributeAccessIssue] layer.py knows no type of it
    try:
        yield rows
    finally:
        for layer, fused in before:
            layer.fused = fused


def for_prompts(model: nn.Module, names: Sequence[str | None], count: int, rule: Any) -> Any:
    """`per_row_adapters`, of `count` prompts. ValueError for another number of names, and with CUDA graphs."""
    if len(names) != count:
        raise ValueError(f"adapters: expected one name, or None, for each of {count} prompts, got {names}.")
    if rule.cuda_graph is True:
        raise ValueError("cuda_graph=True with adapters: a graph reads the same factors in each row. Leave one out.")
    return per_row_adapters(model, names)
