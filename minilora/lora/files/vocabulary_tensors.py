"""The embedding and output layer in an adapter file, when the vocabulary of the base has grown.

New tokens have rows that the base of the file does not have. They start random, so another resize
gives other values. Therefore the file stores both layers completely, as PEFT does:

    base_model.model.model.embed_tokens.weight     (V, D)
    base_model.model.lm_head.weight                (V, D)

They do not train. On loading, rows that differ from the model's become a frozen part of the
adapter. PEFT overwrites the base instead. Rows of the old vocabulary must be equal.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.common import is_within, read_json
from minilora.hub import HUB_ID, cached_file
from minilora.lora.files.adapter_tensors import PREFIX, check_base_weight
from minilora.lora.registry import lora_configs
from minilora.lora.trained_parts.modules_to_save import Part
from minilora.lora.trained_parts.trained_tokens import KEY, TrainedTokens
from minilora.lora.trained_parts.vocabulary import vocabulary_layers, vocabulary_size

CONFIG = "config.json"
_OF_TOKENS = "token_adapter.base_layer."
_OF_ADAPTED = re.compile(r"(?<!token_adapter)\.base_layer\.")
_BEFORE_LEAF = ("", "base_layer.", _OF_TOKENS)  # depends on the layer's adapter


def vocabulary_names(model: nn.Module) -> list[str]:
    """Return the names that a file may have for the weights of the embedding and output layer.

    Args:
        model: The model.
    """
    names: list[str] = []
    for path, layer in vocabulary_layers(model).items():
        for leaf, _ in layer.named_parameters(recurse=False):
            names += [f"{PREFIX}{path}.{before}{leaf}" for before in _BEFORE_LEAF]
    return names


def repeated_row_names(model: nn.Module) -> list[str]:
    """Return the names under which PEFT may write trained rows again, for layers that share them.

    Args:
        model: The model.
    """
    return [f"{PREFIX}{path}.{KEY}" for path in vocabulary_layers(model)]


def stores_vocabulary(model: nn.Module, tensors: Iterable[str]) -> bool:
    """Return True if a file stores the embedding or output layer because the vocabulary has grown.

    PEFT also writes the base of an adapted embedding, whose vocabulary need not have grown.

    Args:
        model: The model.
        tensors: Names of the tensors that are not the adapter's.
    """
    grown = [name for name in vocabulary_names(model) if not _OF_ADAPTED.search(name)]
    return not set(grown).isdisjoint(tensors)


def vocabulary_tensors(
    model: nn.Module, name: str, adapters: dict[str, Any], source: str | None
) -> dict[str, Tensor]:
    """Return the embedding and output layer under PEFT's names, if the vocabulary has grown.

    Args:
        model: The model.
        name: Name of the adapter.
        adapters: Its adapters by layer name.
        source: The file or name from which the model was loaded.
    """
    registry = lora_configs(model)
    size = vocabulary_size(model)
    if size is None:
        return {}
    size_before = _size_before(model, source) or registry.vocabulary or size
    if size == size_before == registry.vocabulary and name not in registry.with_vocabulary:
        return {}
    tensors: dict[str, Tensor] = {}
    for path, layer in vocabulary_layers(model).items():
        part = registry.parts.trained.get(name, {}).get(path)
        before = "base_layer." if path in adapters else ""
        if isinstance(part, TrainedTokens):
            before = _OF_TOKENS
        elif part is not None:
            continue  # the copy of modules_to_save is in the file
        layer = cast(nn.Module, registry.parts.originals.get(path, layer))
        for leaf, parameter in layer.named_parameters(recurse=False):
            if parameter.is_floating_point():
                own = registry.parts.originals.get(f"{path}.{leaf}", parameter)
                tensors[f"{PREFIX}{path}.{before}{leaf}"] = cast(nn.Parameter, own).detach()
    return tensors


def vocabulary_parts(
    model: nn.Module,
    tensors: dict[str, Tensor],
    rows: dict[str, Tensor],
    source: str | None,
    folder: Path,
    check: bool,
) -> dict[str, Part]:
    """Take the embedding and output layer out of the tensors of a file.

    Args:
        model: The model.
        tensors: Tensors of the file that are not the adapter's. Those of the vocabulary are removed.
        rows: The tensors of the file that are the adapter's.
        source: The file or name from which the model was loaded.
        folder: The adapter's folder, for messages.
        check: Compare the rows of the old vocabulary with the model's.

    Returns:
        The layers' parameters that differ from the model's, frozen, by name in the model.

    Raises:
        ValueError: The file has another number of tokens, or other rows of the old vocabulary.
    """
    check_vocabulary_size(model, tensors, folder)
    replaced: dict[int, nn.Parameter] = {}  # by id of the model's own parameter: it may be shared
    own_parameters: dict[str, nn.Parameter] = {}
    originals = lora_configs(model).parts.originals
    layers = vocabulary_layers(model)
    _drop_repeated_rows(tensors, rows, layers)
    size_before = _size_before(model, source)
    for path, layer in layers.items():
        for leaf, parameter in layer.named_parameters(recurse=False):
            own = cast(nn.Parameter, originals.get(f"{path}.{leaf}", parameter))
            own_parameters[f"{path}.{leaf}"] = own
            for before in _BEFORE_LEAF:
                key = f"{PREFIX}{path}.{before}{leaf}"
                stored = tensors.pop(key, None)
                if stored is None:
                    continue
                if _only_new_rows_differ(stored, own, size_before):
                    values = stored.to(own.device, own.dtype, copy=True)  # (V, D)
                    replaced[id(own)] = nn.Parameter(values, requires_grad=False)
                elif check:
                    check_base_weight(key, stored, own, path, folder)
    parts: dict[str, Part] = {}
    for name, own in own_parameters.items():
        if id(own) in replaced:
            parts[name] = replaced[id(own)]
    _check_other_adapters(model, parts)
    return parts


def _check_other_adapters(model: nn.Module, parts: Iterable[str]) -> None:
    """Raise ValueError if another adapter trains a layer whose rows the file replaces."""
    for copies in lora_configs(model).parts.trained.values():
        for path, copied in copies.items():
            is_copy = isinstance(copied, nn.Module) and not isinstance(copied, TrainedTokens)
            if is_copy and any(is_within(name, path) for name in parts):
                raise ValueError(
                    f"{path!r}: another adapter trains it (modules_to_save), and the file has new "
                    "rows for it: delete_adapter that one first."
                )


def _drop_repeated_rows(
    tensors: dict[str, Tensor], rows: dict[str, Tensor], layers: dict[str, nn.Module]
) -> None:
    """Drop trained rows that PEFT wrote again for a layer that shares the embedding's weight."""
    for path in layers:
        key = f"{PREFIX}{path}.{KEY}"
        if any(torch.equal(tensors[key], other) for other in rows.values() if key in tensors):
            del tensors[key]


def check_vocabulary_size(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Check that a file has the number of tokens that the model has.

    Args:
        model: The model.
        tensors: Tensors of the file.
        folder: The adapter's folder, for messages.

    Raises:
        ValueError: The file has another number of tokens.
    """
    size = vocabulary_size(model)
    for key in vocabulary_names(model):
        if key not in tensors or len(tensors[key]) == size:
            continue
        stored = len(tensors[key])
        resize = f"ml.resize_embeddings(model, {stored})"
        if hasattr(model, "resize_token_embeddings"):
            resize = f"model.resize_token_embeddings({stored})"
        raise ValueError(
            f"{folder}: {key} has {stored} rows, and the model has {size} tokens: the adapter was "
            f"trained after the vocabulary had been resized. Call {resize} before loading it."
        )


def _only_new_rows_differ(stored: Tensor, own: Tensor, size_before: int | None) -> bool:
    """Return True if two weights differ, and only in rows of new tokens.

    If the number of old tokens is unknown, the new rows are the last ones, all of them different.
    """
    if stored.shape != own.shape or not stored.is_floating_point():
        return False
    coarser = max(stored.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    different = stored.to(coarser) != own.detach().cpu().to(coarser)  # (V, D)
    rows = different.view(len(stored), -1).any(1).nonzero().flatten()  # (count,)
    if len(rows) == 0:
        return False
    first = int(rows[0])
    if size_before is not None:
        return first >= size_before
    return 0 < first == len(stored) - len(rows)


def _size_before(model: nn.Module, source: str | None) -> int | None:
    """Return the number of tokens before the vocabulary was resized; None if it is unknown."""
    size = getattr(model, "vocabulary_before_resize", None)  # set by ml.resize_embeddings
    return size or _size_in_config(source)


def _size_in_config(source: str | None) -> int | None:
    """Return vocab_size of the config.json from which a model was loaded; None without one.

    The config is read from a folder or from the cache of the Hub, without the network.
    """
    if not source:
        return None
    path: Path | None = Path(source).expanduser() / CONFIG
    if not cast(Path, path).is_file():
        path = cached_file(source, CONFIG) if HUB_ID.fullmatch(source) else None
    if path is None:
        return None
    values = read_json(path)
    size = values.get("vocab_size") or (values.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None
