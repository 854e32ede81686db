"""A batch in which every row has an adapter of its own, or none: h_b = W x_b + s_b B_b A_b x_b for each row b.

W x is one product for all rows, as ever. The adapters' factors are gathered, a pair for each row, ranks padded with
zeros to the largest, and two batched products do the rest:

    A (rows, r, in), B (rows, out, r)  ->  z = x Aᵀ (rows, T, r),   h = W x + (s z) Bᵀ (rows, T, out)

So sixteen adapters take as many products as one. Gathered factors are kept until the rows, or an adapter, change (in
place, as load_adapter and optimisers do; writing through `.data` goes unseen); with gradients they are gathered anew in
each forward pass, and gradients reach every adapter. Factors wait wherever they are, on the CPU too, and are brought to
the rows' device. Simplified: no kernel that reads factors in place, so a row's factors lie in memory twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.switch import check_adapter
from minilora.inject import lora_configs, lora_layers
from minilora.lora import LoRAAdapter, LoRALayer


class Rows:
    """Whose row is whose; the layers ask it in every forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str | None]):
        self.model, self.names = model, tuple(names)
        self.kept: dict[int, tuple[Any, ...]] = {}  # id of a layer -> what was gathered, its versions, where; factors
        for name in dict.fromkeys(name for name in names if name is not None):
            check_adapter(model, name)
            if lora_configs(model).parts.trained.get(name):
                raise ValueError(f"adapter {name!r} trains whole modules or biases, which all rows share: use_adapter.")
            for path, layer in lora_layers(model).items():
                if name in layer.adapters and not isinstance(_plain(layer.adapters[name]), LoRAAdapter):
                    kind = type(layer.adapters[name]).__name__
                    raise ValueError(f"{path}: {kind} cannot be chosen row by row, linear LoRA can: use_adapter.")

    def choose(self, names: Sequence[str | None]) -> None:
        """Other rows from here on, of adapters that were named at the start."""
        if tuple(names) != self.names:
            self.names = tuple(names)
            self.kept.clear()

    def forward(self, layer: LoRALayer, x: Tensor) -> Tensor:
        """x (rows, …, in) -> (rows, …, out); in the place of the layer's own forward."""
        if len(x) != len(self.names):
            raise ValueError(f"adapter_per_row: {len(self.names)} adapters were named for {len(x)} rows: one for each.")
        h = layer.base_layer(x)  # (rows, …, out)
        if (factors := self._factors(layer, h)) is None:
            return h
        A, B, s, b = factors  # (rows, r, in), (rows, out, r), (rows, 1, 1), (rows, 1, out)
        x_BTI = x.reshape(len(x), -1, x.shape[-1]).to(h.dtype)
        z = s * torch.bmm(x_BTI, A.mT)  # (rows, T, r)
        y = torch.baddbmm(h.reshape(len(x), -1, h.shape[-1]), z, B.mT)  # (rows, T, out)
        return (y if b is None else y + b).view(h.shape)

    def _factors(self, layer: LoRALayer, like: Tensor) -> Any:
        """The factors of all rows on this layer; None where no row has an adapter here."""
        place, grad = (like.dtype, like.device), torch.is_grad_enabled()
        found, versions, there, factors = self.kept.get(id(layer), ((), (), None, None))
        if there == place and not grad and versions == tuple(p._version for p in found):
            return factors
        chosen = [layer.adapters[name] if name and name in layer.adapters else None for name in self.names]
        made = [adapter for adapter in dict.fromkeys(chosen) if adapter is not None]
        factors = _gathered(chosen, like) if made else None
        if not grad:
            found = tuple(p for adapter in made for p in adapter.parameters())
            self.kept[id(layer)] = found, tuple(p._version for p in found), place, factors
        return factors


def _plain(adapter: Any) -> Any:
    """A PiSSA as the LoRA that it is; any other as it is."""
    return adapter.plain() if hasattr(adapter, "plain") else adapter


def _gathered(chosen: list[Any], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    made = {adapter: _brought(adapter, like) for adapter in dict.fromkeys(chosen) if adapter is not None}
    rank = max(len(A) for A, *_ in made.values())
    padded: dict[Any, Any] = {}
    for adapter, (A, B, b) in made.items():
        padded[adapter] = F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A))), b
    padded[None] = tuple(torch.zeros_like(M) for M in next(iter(padded.values())))
    A, B, b = (torch.stack([padded[adapter][i] for adapter in chosen]) for i in range(3))
    s = torch.tensor([0.0 if a is None else a.scaling for a in chosen], dtype=like.dtype, device=like.device)
    biased = any(adapter.lora_bias is not None for adapter in made)
    return A, B, s[:, None, None], b[:, None] if biased else None


def _brought(adapter: Any, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and s · b (zeros without b) of an adapter, in the rows' dtype, on their device."""
    if adapter.training and not isinstance(adapter.dropout, nn.Identity):
        raise ValueError("adapter_per_row: lora_dropout is not drawn row by row. model.eval(), or train without it.")
    plain = _plain(adapter)
    b = plain.lora_B.new_zeros(len(plain.lora_B)) if plain.lora_bias is None else adapter.scaling * plain.lora_bias
    A, B, b = (M.to(like.device, like.dtype) for M in (plain.lora_A, plain.lora_B, b))
    return A, B, b


@contextmanager
def adapter_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[Rows]:
    """Inside, row b of every batch goes through the adapter `names[b]`, None for the base alone; none else is active.

    Ranks and layers may differ. The batch is the first dimension of what the layers get, and as long as `names`.
    ValueError: a name that is unknown; an adapter that is more than linear LoRA (DoRA, embeddings, convolutions, whole
    modules or biases that train with it); dropout; another number of rows.
    """
    rows = Rows(model, names)
    before = [(layer, layer.fused) for layer in lora_layers(model).values()]
    for layer, _ in before:
        layer.fused = partial(Rows.forward, rows)  # pyright: ignore[reportAttributeAccessIssue] lora.py knows no type of it
    try:
        yield rows
    finally:
        for layer, fused in before:
            layer.fused = fused


def for_prompts(model: nn.Module, names: Sequence[str | None], count: int, rule: Any) -> Any:
    """`adapter_per_row`, of `count` prompts. ValueError for another number of names, and with CUDA graphs."""
    if len(names) != count:
        raise ValueError(f"adapters: expected one name, or None, for each of {count} prompts, got {names}.")
    if rule.cuda_graph is True:
        raise ValueError("cuda_graph=True with adapters: a graph reads the same factors in each row. Leave one out.")
    return adapter_per_row(model, names)
