"""The check that an adapter is loaded into the base that it was trained on.

An adapter is a correction of one weight. On another weight of equal shape it is noise, and PEFT
adds it without a warning. Therefore the metadata of the safetensors file stores fingerprints of the
base:

    "minilora": {
      "version": …, "seed": …, "tokenizer": {"chat_template": …, "vocabulary": …},
      "storage": {"quantize": "nf4", "blocksize": 64, "double_quant": true},
      "labels": ["negative", "positive"],         (of a classifier only)
      "layers": {
        "model.layers.0.self_attn.q_proj":
          ["nf4/64", [576, 576], "nf4/64:<hash>,bf16:<hash>,fp16:<hash>"], …}}

For each adapted layer these are the kind of storage, the shape, and hashes of 64 rows of its weight
(quant/fingerprint.py): of the rows as they are stored, and of the rows before they were quantised.

    stored as          hashes of                               compared with
    fp32, bf16, fp16   the rows, and their roundings           the rows in any dtype, or in NF4
    nf4/64             the codes, and the rows before NF4      the same; without rows: the codes
    q4_1, q4_k, …      the bytes of a GGUF file, and its rows  the same
    gguf-…             the same, of a base from a GGUF file    the same, if it is not quantised

Equal rows (in the dtype of either side) or equal codes mean the same base. Scales are not hashed,
so double quantisation on or off is the same base, and so is a 4-bit base that was made dense.
The storage of the base may differ then, and a warning reports that (quant/storage.py).
Different rows, or different codes where the rows are unknown, are an error. If nothing can be
compared, a warning reports it. A file from bitsandbytes has codes without rows. PEFT ignores the
metadata, and its own files have none.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import __version__, atomic_write, write_tensors
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.registry import lora_configs, lora_layers
from minilora.quant.fingerprint import digest, hash_rows
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantized_linear import QuantizedLinear
from minilora.quant.storage import (
    Storage,
    base_storage,
    describe,
    remedy,
    same_storage,
    stored_storage,
)
from minilora_kernels import quantize_nf4

KEY = "minilora"
FORCE = "pass check_base=False (--no_check_base on the command line) to force it"
_GGUF = "gguf-"
_NF4 = "nf4/"
_CODES = (_NF4, "q")  # the kinds of codes begin so: NF4, and the types of GGUF, such as "q4_1"


# ---- fingerprints of layers


def fingerprint(layer: nn.Module, source: str | None = None) -> list[Any]:
    """Return [kind, shape, hashes] of the weight of a layer, without its adapters.

    Args:
        layer: A LoRALayer, or any layer with a weight.
        source: The file or name from which the model was loaded.
    """
    base = unwrapped(layer)
    if isinstance(base, QuantizedLinear):
        shape = [base.out_features, base.in_features]
        hashes = base.fingerprint()
    else:
        weight: Any = base.weight  # a parameter, or a buffer of codes
        shape = list(weight.shape)
        hashes = hash_rows(weight)
    kind = hashes.partition(":")[0]
    if str(source).endswith(".gguf"):
        kind = _GGUF + kind
    return [kind, shape, hashes]


def same_base(then: list[Any], now: list[Any]) -> bool | None:
    """Compare two fingerprints of a layer.

    Args:
        then: The fingerprint in the file.
        now: The fingerprint of the model.

    Returns:
        True for the same base, False for another one, None if the two cannot be compared.
    """
    hashes_then, dtype_then = _parse_hashes(then)
    hashes_now, dtype_now = _parse_hashes(now)
    common = hashes_then.keys() & hashes_now.keys()
    codes = {kind for kind in common if kind.startswith(_CODES)}
    rows = common & {dtype_then, dtype_now}
    for kind in rows | codes:
        if hashes_then[kind] == hashes_now[kind]:
            return True
    if then[0].startswith(_GGUF) != now[0].startswith(_GGUF):
        return None  # one may be a rounding of the other
    if codes:
        return False
    both_may_be_rounded = {dtype_then, dtype_now} == {"bf16", "fp16"}  # from one fp32 weight
    if rows and not both_may_be_rounded:
        return False
    return None


def _parse_hashes(entry: list[Any]) -> tuple[dict[str, str], str | None]:
    """Return the hashes of a fingerprint by kind, and the dtype of the original if it is known."""
    kind, _, text = entry
    if ":" in text:
        hashes = dict(part.split(":") for part in text.split(","))
    else:  # a file of an older version has one hash, of the stored weight
        hashes = {kind.removeprefix(_GGUF): text}
    dtypes = [name for name in hashes if not name.startswith(_CODES)]
    return hashes, dtypes[0] if dtypes else None


def _converted_hashes(layer: nn.Module, kind: str) -> str:
    """Return the hashes of a layer after conversion to another storage: dense or NF4.

    "" means that the layer has this storage already or cannot be converted. A 4-bit weight that was
    made dense quantises to the same codes again.
    """
    base: Any = unwrapped(layer)
    to_nf4 = kind.removeprefix(_GGUF).startswith(_NF4)
    if isinstance(base, QuantizedLinear):
        if not to_nf4:
            return hash_rows(base.dequantize(torch.float32))
        if isinstance(base, NF4Linear):
            return ""
        W = base.dequantize(torch.float32)  # (out, in)
    elif to_nf4 and base.weight.is_floating_point():
        W = base.weight.detach()  # (out, in)
    else:
        return ""
    blocksize = int(kind.rpartition("/")[2])
    return NF4Linear(quantize_nf4(W, blocksize)).fingerprint()


# ---- the tokenizer


def hash_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return hashes of the chat template and, if it can be listed, of the vocabulary.

    Further variables of the template are stored as they are, as "chat_template_kwargs".

    Args:
        tokenizer: A tokenizer of minilora or transformers.
    """
    template = getattr(tokenizer, "chat_template", None)  # a text, several texts by name, or None
    hashes: dict[str, Any] = {
        "chat_template": digest(json.dumps(template, sort_keys=True).encode())
    }
    kwargs = getattr(tokenizer, "chat_template_kwargs", None)
    if kwargs:
        hashes["chat_template_kwargs"] = kwargs
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if convert is not None:
        tokens = []
        ids = list(range(len(tokenizer)))
        for token_id, token in enumerate(convert(ids)):
            unused = f"[PAD{token_id}]"  # GGUF's name of an id without a token
            if token is not None and token != unused:
                tokens.append(token)
        hashes["vocabulary"] = digest(json.dumps(tokens).encode())
    return hashes


def note_training(model: nn.Module, tokenizer: Any) -> None:
    """Store the tokenizer and the base's storage of the active adapters, for `save_adapter`.

    Args:
        model: The model that is trained.
        tokenizer: Its tokenizer, or None if it is unknown.
    """
    hashes = None
    if tokenizer is not None:
        hashes = hash_tokenizer(tokenizer)
    storage = base_storage(model)
    for layer in lora_layers(model).values():
        for name in layer.active:
            lora_configs(model).tokenizers[name] = hashes
            lora_configs(model).storages[name] = storage


# ---- the metadata of a file


def binding(
    layers: Mapping[str, nn.Module],
    source: str | None,
    seed: int | None,
    tokenizer: dict[str, Any] | None,
    storage: Storage,
    labels: list[Any] | None = None,
) -> dict[str, Any]:
    """Return the metadata of an adapter file.

    Args:
        layers: The adapted layers by name.
        source: The file or name from which the model was loaded.
        seed: Seed of the adapter's initial values.
        tokenizer: Hashes of the tokenizer, from `hash_tokenizer`.
        storage: Storage of the base while it was trained (quant/storage.py).
        labels: Label names of a classifier, in the order of its outputs; None for other models.
    """
    bound = {
        "version": __version__,
        "seed": seed,
        "tokenizer": tokenizer,
        "storage": storage,
        "layers": {path: fingerprint(layer, source) for path, layer in layers.items()},
    }
    if labels is not None:
        bound["labels"] = labels
    return bound


def source_of(model: nn.Module) -> str | None:
    """Return the Hub id or folder of the base, as load_model and transformers note it.

    Args:
        model: The model.
    """
    name = getattr(model, "name_or_path", None)
    config_name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name or config_name or None


def write_bound(path: Path, tensors: Mapping[str, Tensor], bound: dict[str, Any]) -> None:
    """Write a safetensors file with metadata. Equal contents give equal bytes.

    Args:
        path: The file to create or replace.
        tensors: Tensors by name.
        bound: The metadata, from `binding`.
    """
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"))
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, {KEY: text})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place; the library writes it in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.write(text.ljust(length))


def read_binding(path: Path) -> dict[str, Any]:
    """Return the metadata of an adapter file; an empty dict for a file of PEFT.

    Args:
        path: The safetensors file.

    Raises:
        ValueError: The metadata is damaged.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY, "{}")
    try:
        values = json.loads(text)
        for entry in values.get("layers", {}).values():
            _parse_hashes(entry)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: the metadata {KEY!r} is damaged ({error}): {text[:80]!r}. "
            "Copy or download the file again."
        ) from error
    return values


def check_binding(
    then: dict[str, Any],
    layers: Mapping[str, nn.Module],
    source: str | None,
    where: Path,
    tokenizer: Any = None,
) -> None:
    """Compare the metadata of an adapter file with a model and a tokenizer.

    One warning reports all layers that cannot be compared.

    Args:
        then: The metadata of the file.
        layers: The layers that the adapter is for, by name.
        source: The file or name from which the model was loaded.
        where: The adapter's folder, for messages.
        tokenizer: The tokenizer to compare; None compares only the layers.

    Raises:
        ValueError: The base or the tokenizer is another one.
    """
    stored = then.get("layers", {})
    not_comparable = []
    for path, layer in layers.items():
        if path not in stored:
            continue
        before = stored[path]
        now = fingerprint(layer, source)
        same = _is_same_layer(layer, before, now)
        if same is False:
            raise ValueError(
                f"{where}: the adapter was trained on another base: {path} holds other weights "
                f"here (expected {before}, got {now}). "
                f"Load the base that it was trained on, or {FORCE}."
            )
        if same is None:
            not_comparable.append(f"{path} was {before[0]}, is {now[0]}")
    if not_comparable:
        warnings.warn(
            f"{where}: {len(not_comparable)} layers cannot be compared with the base: "
            f"{not_comparable[0]}.",
            stacklevel=4,  # the caller of load_adapter
        )
    if tokenizer is not None:
        _check_tokenizer(then.get("tokenizer"), tokenizer, where)


def check_storage(then: dict[str, Any], model: nn.Module, where: Path) -> None:
    """Warn if the base of an adapter was stored in another way while it was trained.

    Args:
        then: The metadata of the file.
        model: The model that the adapter is put into.
        where: The adapter's folder, for the message.
    """
    trained = stored_storage(then)
    now = base_storage(model)
    if trained is not None and not same_storage(trained, now):
        warnings.warn(
            f"{where}: the adapter was trained on a base that was {describe(trained)}, and this "
            f"base is {describe(now)}, so it may correct other weights. {remedy(trained)}",
            stacklevel=4,  # the caller of load_adapter
        )


def _is_same_layer(layer: nn.Module, before: list[Any], now: list[Any]) -> bool | None:
    """Return `same_base`, also after converting the layer to the storage in the file."""
    same = same_base(before, now)
    if same:
        return True
    converted = _converted_hashes(layer, before[0])
    if converted:
        return same_base(before, [now[0], now[1], converted]) or same
    return same


def _check_tokenizer(stored: Any, tokenizer: Any, where: Path) -> None:
    """Raise ValueError if the hashes of the tokenizer differ from the stored ones."""
    if not isinstance(stored, dict):
        return
    hashes = hash_tokenizer(tokenizer)
    different = [name for name in stored if hashes.get(name, stored[name]) != stored[name]]
    if different:
        names = " and ".join(f"another {name}" for name in different)
        raise ValueError(
            f"{where}: the adapter was trained with {names}. "
            "Use the tokenizer and template that it was trained with, "
            f"or, where the difference is meant, {FORCE}."
        )
