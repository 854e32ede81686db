"""Which base an adapter was trained on, told by fingerprints in the metadata of its safetensors file.

    "minilora": {"version": …, "seed": …, "tokenizer": …, "layers": {layer: [kind, shape, sha256 of 64 of its rows]}}

An adapter is a correction to one weight: on another of equal shape it is noise, and PEFT adds it without a word. So
each adapted layer is told by 64 rows spread evenly over its weight, as it is when the adapter is saved:

    kind     what is hashed                     the same base elsewhere
    fp32, …  the rows, as bytes                 fp32 and bf16 agree where one was cast exactly to the other
    nf4/64   the packed codes, not the scales   double quantisation on or off, or bitsandbytes' file, agree
    gguf-…   as above, from a GGUF file         agrees where the file was not quantised

A weight that was loaded into 4 bits no longer has its source rows, so NF4 says nothing about a 16-bit base: between
kinds a difference is a notice, within one it is an error. PEFT ignores the metadata, and its own files have none.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora import LoRALayer
from minilora.quant import NF4Linear
from minilora.storage import whole, write_tensors

KEY, ROWS = "minilora", 64
_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def fingerprint(layer: nn.Module, source: str | None = None, like: str = "") -> list[Any]:
    """[kind, shape, hash] of a linear layer's weight, adapters aside; `source` is where the model came from.

    like: a kind. Dense rows are cast to its dtype before they are hashed, so that casts of one weight compare equal.
    """
    base = layer.base_layer if isinstance(layer, LoRALayer) else layer
    if isinstance(base, NF4Linear):
        packed, width = base.weight.packed, max(1, base.in_features // 2)  # bytes of a row, or nearly where in is odd
        kind, shape = f"nf4/{base.blocksize}", [base.out_features, base.in_features]
        rows = packed[: len(packed) // width * width].view(-1, width)
    else:
        rows = base.get_parameter("weight").detach()
        kind, shape = _KINDS.get(rows.dtype, str(rows.dtype)), list(rows.shape)
    count = min(ROWS, len(rows))
    rows = rows[torch.arange(count, device=rows.device) * len(rows) // max(count, 1)]  # the first, and evenly on
    dtype = {name: dtype for dtype, name in _KINDS.items()}.get(like.removeprefix("gguf-"))
    if dtype is not None and rows.is_floating_point():
        rows = rows.to(dtype)
    content = rows.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    prefix = "gguf-" if str(source).endswith(".gguf") else ""
    return [prefix + kind, shape, _digest(content)]


def binding(
    layers: Mapping[str, nn.Module], source: str | None = None, seed: int | None = None, tokenizer: Any = None
) -> dict[str, Any]:
    """What is written: the fingerprint of each layer, the adapter's seed, the tokenizer's, and minilora's version."""
    return {
        "version": sys.modules["minilora"].__version__,  # not imported: the door is on a higher floor
        "seed": seed,
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "layers": {path: fingerprint(layer, source) for path, layer in layers.items()},
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of the chat template and of what every token id stands for."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return _digest(json.dumps([tokenizer.chat_template, tokens]).encode())


def check_binding(
    then: dict[str, Any], layers: Mapping[str, nn.Module], source: str | None, where: Path, tokenizer: Any = None
) -> None:
    """Compare what was written with the model. ValueError for another base of the same kind, or another tokenizer.

    A base of another kind that cannot be compared is a one-line warning.
    """
    other, written = [], then.get("layers", {})
    for path in (path for path in layers if path in written):
        kind, _, digest = before = written[path]
        now = fingerprint(layers[path], source, like=kind)
        if now[2] == digest:
            continue
        if now[0] == kind:
            raise ValueError(
                f"{where}: the adapter was trained on another base: {path} holds other weights here (expected "
                f"{before}, got {now}). Load the base that it was trained on, or pass check_base=False to force it."
            )
        other.append(f"{path} was {kind}, is {now[0]}")
    if other:
        warnings.warn(f"{where}: {len(other)} layers cannot be compared with the base: {other[0]}.", stacklevel=3)
    if tokenizer is not None and then.get("tokenizer") not in (None, tokenizer_digest(tokenizer)):
        raise ValueError(
            f"{where}: the adapter was trained with another tokenizer or chat template. Load the tokenizer of its "
            "base, or pass check_base=False to force it."
        )


def write_bound(path: Path, tensors: Mapping[str, Tensor], bound: dict[str, Any]) -> None:
    """Write a safetensors file with `bound` in its metadata; equal contents give equal bytes."""
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"))
    with whole(path) as temporary:
        write_tensors(temporary, tensors, {KEY: text})
        with temporary.open("r+b") as file:  # safetensors writes metadata in a random order: sort it, in equal length
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(sorted_header) <= length
            file.write(sorted_header.ljust(length))


def read_binding(path: Path) -> dict[str, Any]:
    """What was written, {} in a file of PEFT's. ValueError if it is damaged."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY, "{}")
    try:
        values = json.loads(text)
        well_formed = all(len(entry) == 3 for entry in values.get("layers", {}).values())
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: the metadata {KEY!r} is damaged ({error}): {text[:80]!r}.") from error
    if not well_formed:
        raise ValueError(f"{path}: the metadata {KEY!r} is damaged: expected [kind, shape, hash] of each layer.")
    return values


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
