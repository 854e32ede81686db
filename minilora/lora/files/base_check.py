"""Which base an adapter was trained on, told by fingerprints in the metadata of its safetensors file.

    "minilora": {"version": …, "seed": …, "tokenizer": {"chat_template": …, "vocabulary": …}, "layers":
                {"model.layers.0.self_attn.q_proj": ["nf4/64", [576, 576], "nf4/64:<hash>,bf16:<hash>,fp16:<hash>"], …}}

An adapter is a correction to one weight: on another of equal shape it is noise, and PEFT adds it without a word. So
each adapted layer is told by its storage kind, its shape and hashes of 64 rows spread evenly over its weight
(quant.hash_rows): of what it is stored as, and of its source, the rows before they were quantised.

    stored             what is hashed                            compared with
    fp32, bf16, fp16   the rows, and their roundings to 16 bits  any dtype of the same rows, and NF4 made from them
    nf4/64             the packed codes; the rows quantised      the same; without rows (bitsandbytes' file): the codes
    gguf-…             as above, from a GGUF file                alike where it was not quantised, else not comparable

Equal rows (in the dtype of either side) or equal codes are the same base; scales are not hashed, so double quantisation
on or off is one base, and so is a 4-bit base that was made dense. Different rows, or different codes where a source is
not known, are an error. Nothing in common is a notice. PEFT ignores the metadata, and its own files have none.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import __version__, whole, write_tensors
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import lora_configs, lora_layers
from minilora.quant.nf4_linear import NF4Linear, digest, hash_rows
from minilora_kernels import quantize_nf4

KEY = "minilora"
FORCE = "pass check_base=False (--no_check_base on the command line) to force it"


def fingerprint(layer: nn.Module, source: str | None = None) -> list[Any]:
    """[kind, shape, hashes] of a layer's weight, adapters aside; `source` is where the model came from."""
    base = layer.base_layer if isinstance(layer, LoRALayer) else layer
    if isinstance(base, NF4Linear):
        shape, hashes = [base.out_features, base.in_features], base.fingerprint()
    else:
        weight = base.get_parameter("weight")
        shape, hashes = list(weight.shape), hash_rows(weight)
    prefix = "gguf-" if str(source).endswith(".gguf") else ""
    return [prefix + hashes.partition(":")[0], shape, hashes]


def same_base(then: list[Any], now: list[Any]) -> bool | None:
    """Whether two fingerprints are of one base; None where nothing that both have can tell."""
    (a, own_a), (b, own_b) = _hashes(then), _hashes(now)
    both = a.keys() & b.keys()
    rows, codes = both & {own_a, own_b}, {kind for kind in both if kind.startswith("nf4/")}
    comparable = then[0].startswith("gguf-") == now[0].startswith("gguf-")  # else one may be a rounding of the other
    siblings = {own_a, own_b} == {"bf16", "fp16"}  # both may be roundings of one fp32 weight
    if any(a[kind] == b[kind] for kind in rows | codes):
        return True
    return False if comparable and (codes or (rows and not siblings)) else None


def _converted(layer: nn.Module, kind: str) -> str:
    """The hashes that a layer would have, were it kept as `kind`: made dense, or in 4 bits; "" where that is no change.

    A 4-bit weight that was made dense quantises to the same codes again.
    """
    base: Any = layer.base_layer if isinstance(layer, LoRALayer) else layer
    four_bit = kind.removeprefix("gguf-").startswith("nf4/")
    if isinstance(base, NF4Linear):
        return "" if four_bit else hash_rows(base.dequantize(torch.float32))
    if not four_bit or not base.weight.is_floating_point():
        return ""
    return NF4Linear(quantize_nf4(base.weight.detach(), int(kind.rpartition("/")[2]))).fingerprint()


def _hashes(entry: list[Any]) -> tuple[dict[str, str], str | None]:
    """Hash by kind, and the source's own dtype if it is known. Older files have one hash, of what is stored."""
    kind, _, text = entry
    stored = kind.removeprefix("gguf-")
    hashes = dict(part.split(":") for part in text.split(",")) if ":" in text else {stored: text}
    return hashes, next((name for name in hashes if not name.startswith("nf4/")), None)


def binding(
    layers: Mapping[str, nn.Module], source: str | None, seed: int | None, tokenizer: dict[str, str] | None
) -> dict[str, Any]:
    """What is written: the layers' fingerprints, the adapter's seed, the tokenizer's hashes, minilora's version."""
    return {
        "version": __version__,
        "seed": seed,
        "tokenizer": tokenizer,
        "layers": {path: fingerprint(layer, source) for path, layer in layers.items()},
    }


def hash_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Hashes of the chat template and, if the tokenizer can list them, of what its ids stand for."""
    template = getattr(tokenizer, "chat_template", None)  # a text, several by name, or None
    hashes = {"chat_template": digest(json.dumps(template, sort_keys=True).encode())}
    if (spell := getattr(tokenizer, "convert_ids_to_tokens", None)) is not None:
        tokens = enumerate(spell(list(range(len(tokenizer)))))
        used = [token for i, token in tokens if token not in (None, f"[PAD{i}]")]  # GGUF's name for an id without token
        hashes["vocabulary"] = digest(json.dumps(used).encode())
    return hashes


def note_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Remember which tokenizer the active adapters are trained with, for when they are saved."""
    names = {name for layer in lora_layers(model).values() for name in layer.active}
    lora_configs(model).tokenizers |= dict.fromkeys(names, None if tokenizer is None else hash_tokenizer(tokenizer))


def check_binding(
    then: dict[str, Any], layers: Mapping[str, nn.Module], source: str | None, where: Path, tokenizer: Any = None
) -> None:
    """Compare what was written with the model. ValueError for another base or tokenizer; one warning, of one line, for
    layers that nothing can tell.
    """
    unknown, written = [], then.get("layers", {})
    for path in (path for path in layers if path in written):
        before, now = written[path], fingerprint(layers[path], source)
        same = same_base(before, now)
        if not same and (hashes := _converted(layers[path], before[0])):
            same = same_base(before, [*now[:2], hashes]) or same
        if same is False:
            raise ValueError(
                f"{where}: the adapter was trained on another base: {path} holds other weights here (expected "
                f"{before}, got {now}). Load the base that it was trained on, or {FORCE}."
            )
        if same is None:
            unknown.append(f"{path} was {before[0]}, is {now[0]}")
    if unknown:
        warnings.warn(f"{where}: {len(unknown)} layers cannot be compared with the base: {unknown[0]}.", stacklevel=4)
    told = then.get("tokenizer")
    if tokenizer is None or not isinstance(told, dict):
        return
    now = hash_tokenizer(tokenizer)
    if other := " and ".join(f"another {what}" for what in told if now.get(what, told[what]) != told[what]):
        raise ValueError(
            f"{where}: the adapter was trained with {other}. Use the tokenizer and template that it was trained with, "
            f"or, where the difference is meant, {FORCE}."
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
        for entry in values.get("layers", {}).values():
            _hashes(entry)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: the metadata {KEY!r} is damaged ({error}): {text[:80]!r}.") from error
    return values
