"""A batch in which every row has its own adapter, or none.

    h_b = W x_b + s_b B_b A_b x_b        for each row b of the batch

W x is one product for all rows. The factors of the adapters are gathered, one pair for each row,
with smaller ranks padded by zeros to the largest one. Two batched products compute the rest:

    z = x Aᵀ             A (rows, r, in)       z (rows, T, r)
    h = W x + z (s B)ᵀ   s B (rows, out, r)    h (rows, T, out)

Sixteen adapters therefore take as many products as one.

Gathered factors are cached until the rows change or an adapter is changed in place, as load_adapter
and optimisers do (a change through `.data` is not noticed). New factors are written to the same
memory, because memory pages that are new to a process cost more time than filling them. With
gradients the factors are gathered in each forward pass, and gradients reach every adapter. Adapters
may be on any device; their factors are copied to the device of the rows.

Simplified: no kernel reads the factors in place. The factors of a row are in memory
twice, and three times for a 16-bit model on a CPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import unwrap_model
from minilora.lora.active import check_adapters
from minilora.lora.layer import LoRAAdapter, LoRALayer
from minilora.lora.registry import lora_configs, lora_layers

# A (rows, r, in), s B (rows, out, r) and s b (rows, 1, out)
Factors = tuple[Tensor, Tensor, Tensor | None]
_CacheKey = tuple[int, torch.device, torch.dtype]  # id of a layer, device and dtype of its factors


class _CachedFactors(NamedTuple):
    """The gathered factors of one layer, and the state of the adapters at that time."""

    names: tuple[str | None, ...]
    parameters: tuple[nn.Parameter, ...]
    versions: tuple[int, ...]
    factors: Factors | None

    def is_valid(self, names: tuple[str | None, ...]) -> bool:
        """Return True if the rows and the adapters have not changed."""
        return self.names is names and self.versions == _versions(self.parameters)


class PerRowAdapters:
    """The adapter of each row. While it is active, every LoRALayer calls its `forward`.

    Args:
        model: A model with adapters.
        names: Names of the adapters that the rows may have, one for each row; None is the base.

    Attributes:
        names: Name of the adapter of each row.
        cache: Gathered factors by layer, device and dtype.
        buffers: Memory for the factors; it has space for the largest number of rows so far.

    Raises:
        ValueError: A name is unknown, or an adapter is more than linear LoRA.
    """

    def __init__(self, model: nn.Module, names: Sequence[str | None]):
        self.names = tuple(names)
        self.cache: dict[_CacheKey, _CachedFactors] = {}
        self.buffers: dict[tuple[_CacheKey, str], Tensor] = {}
        used = [name for name in dict.fromkeys(names) if name is not None]
        check_adapters(model, used)
        for name in used:
            reason = per_row_obstacle(model, name)
            if reason is not None:
                raise ValueError(f"{reason}: use set_adapter.")

    def choose(self, names: Sequence[str | None]) -> None:
        """Change the rows.

        Args:
            names: Names of adapters that were given at the start, one for each row.
        """
        # Equal names remain the same object, which the cache compares.
        if tuple(names) != self.names:
            self.names = tuple(names)

    def forward(self, layer: LoRALayer, x: Tensor) -> Tensor:
        """Return the output of a layer with the adapter of each row.

        Args:
            layer: The layer.
            x: Input, (rows, …, in).

        Returns:
            Output, (rows, …, out).

        Raises:
            ValueError: The number of rows differs from the number of names.
        """
        rows = len(x)
        if rows != len(self.names):
            raise ValueError(
                f"per_row_adapters: {len(self.names)} adapters were named for {rows} rows: "
                "give one for each."
            )
        h = layer.base_layer(x)  # (rows, …, out)
        if not any(self.names):
            return h
        x_BTI = x.reshape(rows, -1, x.shape[-1])  # (rows, T, in)
        dtype = h.dtype
        if h.is_cpu and x_BTI.shape[1] == 1:
            # So small a product takes twice as long in bf16 (benchmarks/training/choices.py).
            dtype = torch.promote_types(dtype, torch.float32)
        factors = self._factors(layer, h.device, dtype)
        if factors is None:
            return h
        A, B, b = factors  # (rows, r, in), (rows, out, r), (rows, 1, out)
        z = torch.bmm(x_BTI.to(dtype), A.mT)  # (rows, T, r)
        h_BTO = h.reshape(rows, -1, h.shape[-1]).to(dtype)  # (rows, T, out)
        y = torch.baddbmm(h_BTO, z, B.mT)  # (rows, T, out)
        if b is not None:
            y = y + b  # (rows, T, out)
        return y.to(h.dtype).view(h.shape)  # (rows, …, out)

    def _factors(
        self, layer: LoRALayer, device: torch.device, dtype: torch.dtype
    ) -> Factors | None:
        """Return the factors of all rows on a layer; None if no row has an adapter there."""
        key = (id(layer), device, dtype)
        use_cache = not torch.is_grad_enabled()
        cached = self.cache.get(key)
        if use_cache and cached is not None and cached.is_valid(self.names):
            return cached.factors
        adapters: list[Any] = []  # one for each row
        for name in self.names:
            if name is not None and name in layer.adapters:
                adapters.append(layer.adapters[name])
            else:
                adapters.append(None)
        distinct = [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]
        factors = None
        if distinct:
            factors = self._gather(key, adapters, distinct)
        if use_cache:
            parameters: list[nn.Parameter] = []
            for adapter in distinct:
                parameters += [p for p in adapter._parameters.values() if p is not None]
            self.cache[key] = _CachedFactors(
                self.names, tuple(parameters), _versions(parameters), factors
            )
        return factors

    def _gather(self, key: _CacheKey, adapters: list[Any], distinct: list[Any]) -> Factors:
        """Return the factors of each row. `distinct` lists each of the adapters once."""
        for adapter in distinct:
            if adapter.training and not isinstance(adapter.dropout, nn.Identity):
                raise ValueError(
                    "per_row_adapters: lora_dropout is not drawn row by row. "
                    "Call model.eval(), or train without dropout."
                )
        plain = {adapter: _as_lora(adapter) for adapter in distinct}
        pairs: dict[Any, tuple[Tensor, Tensor]] = _padded_pairs(plain, key[1])
        if None in adapters:
            A, B = pairs[distinct[0]]
            pairs[None] = (torch.zeros_like(A), torch.zeros_like(B))
        A = self._stack((key, "A"), [pairs[adapter][0] for adapter in adapters])  # (rows, r, in)
        B = self._stack((key, "B"), [pairs[adapter][1] for adapter in adapters])  # (rows, out, r)
        scalings = [0.0] * len(adapters)
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                scalings[row] = adapter.scaling
        s = torch.tensor(scalings, dtype=torch.float32, device=key[1])[
            :, None, None
        ]  # (rows, 1, 1)
        b = _stacked_biases(adapters, plain, B)  # (rows, 1, out)
        if b is not None:
            b = b.mul_(s)
        return A, B.mul_(s), b

    def _stack(self, buffer_key: tuple[_CacheKey, str], factors: list[Tensor]) -> Tensor:
        """Return (rows, …) in the dtype of the key; without gradients in a buffer."""
        dtype = buffer_key[0][2]
        if torch.is_grad_enabled():
            return torch.stack(factors).to(dtype)  # (rows, …)
        rows = len(factors)
        first = factors[0]
        buffer = self.buffers.get(buffer_key)
        if buffer is None or buffer.shape[1:] != first.shape or len(buffer) < rows:
            with torch.inference_mode(False):  # an inference tensor could not be written to later
                buffer = first.new_empty(rows, *first.shape, dtype=dtype)  # (rows, …)
            self.buffers[buffer_key] = buffer
        buffer = buffer[:rows]
        if first.dtype == dtype:
            return torch.stack(factors, out=buffer)
        return buffer.copy_(torch.stack(factors))


def per_row_obstacle(model: nn.Module, name: str) -> str | None:
    """Return the reason why an adapter cannot be chosen row by row; None for linear LoRA.

    Args:
        model: A model with this adapter.
        name: Name of the adapter.
    """
    if lora_configs(model).parts.trained.get(name):
        return f"adapter {name!r} trains whole modules or biases, which all rows share"
    for path, layer in lora_layers(model).items():
        if name not in layer.adapters:
            continue
        adapter = layer.adapters[name]
        if not isinstance(_as_lora(adapter), LoRAAdapter):
            kind = type(adapter).__name__
            return f"{path}: {kind} cannot be chosen row by row, linear LoRA can"
    return None


def _as_lora(adapter: Any) -> Any:
    """Return a PiSSA adapter as an equal LoRAAdapter, and any other adapter unchanged."""
    if hasattr(adapter, "plain"):
        return adapter.plain()
    return adapter


def _versions(parameters: Sequence[nn.Parameter]) -> tuple[int, ...]:
    """Return the version of each parameter, which every change in place increments."""
    return tuple(parameter._version for parameter in parameters)


def _padded_pairs(
    plain: dict[Any, LoRAAdapter], device: torch.device
) -> dict[Any, tuple[Tensor, Tensor]]:
    """Return A (r, in) and B (out, r) of each adapter, with zeros up to the largest rank."""
    rank = max(len(lora.lora_A) for lora in plain.values())
    pairs = {}
    for adapter, lora in plain.items():
        A = lora.lora_A.to(device)
        B = lora.lora_B.to(device)
        missing = rank - len(A)
        if missing:
            A = F.pad(A, (0, 0, 0, missing))  # (rank, in)
            B = F.pad(B, (0, missing))  # (out, rank)
        pairs[adapter] = (A, B)
    return pairs


def _stacked_biases(adapters: list[Any], plain: dict[Any, LoRAAdapter], B: Tensor) -> Tensor | None:
    """Return the lora_bias of each row (rows, 1, out), like B; None if no adapter has one."""
    biases = {}
    for adapter, lora in plain.items():
        if lora.lora_bias is not None:
            biases[adapter] = lora.lora_bias.to(B)  # (out,)
    if not biases:
        return None
    zero = B.new_zeros(B.shape[1])  # (out,)
    return torch.stack([biases.get(adapter, zero) for adapter in adapters])[:, None]


@contextmanager
def per_row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[PerRowAdapters]:
    """Give each row of a batch its own adapter in a `with` block.

    Ranks and adapted layers may differ. The rows are the first dimension of the layers' inputs. The
    active adapters of `set_adapter` are ignored.

    Args:
        model: A model with adapters.
        names: Name of the adapter of each row; None is the base alone.

    Yields:
        The object that holds the rows; its `choose` changes them.

    Raises:
        ValueError: A name is unknown; an adapter is more than linear LoRA (DoRA, embeddings,
            convolutions, whole modules or biases that train with it); dropout is active; or the
            batch has another number of rows.
    """
    model = unwrap_model(model)
    rows = PerRowAdapters(model, names)
    before = [(layer, layer.fused, layer.merged) for layer in lora_layers(model).values()]
    for layer, _, _ in before:
        layer.fused = rows.forward
        layer.merged = None  # no weight holds a different adapter for each row
    try:
        yield rows
    finally:
        for layer, fused, merged in before:
            layer.fused = fused
            layer.merged = merged


def for_prompts(model: nn.Module, names: Sequence[str | None], count: int, rule: Any) -> Any:
    """Return `per_row_adapters` for the prompts of `generate`.

    Args:
        model: A model with adapters.
        names: Name of the adapter of each prompt; None is the base alone.
        count: Number of prompts.
        rule: Settings of the generation (`generation.generate.Decoding`).

    Raises:
        ValueError: The number of names differs from `count`, or CUDA graphs are requested.
    """
    check_count(names, count)
    if rule.cuda_graph is True:
        raise ValueError(
            "cuda_graph=True with adapters: a graph reads the same factors in each row. "
            "Leave one of the two out."
        )
    return per_row_adapters(model, names)


def check_count(names: Sequence[str | None], count: int) -> None:
    """Raise ValueError unless each prompt has one name.

    Args:
        names: Name of the adapter of each prompt; None is the base alone.
        count: Number of prompts.
    """
    if len(names) != count:
        raise ValueError(
            f"adapters: expected one name, or None, for each of {count} prompts, got {names}."
        )
