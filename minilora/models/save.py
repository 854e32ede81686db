"""Save a model as a folder that transformers and vLLM load (config.json and safetensors), or as llama.cpp's GGUF.

With merge=True each layer is made dense as it is written, W' = W + Σ s · B A in fp32, rounded once, so that no second
model is ever in memory: beyond the model it takes a layer's W and B A. A safetensors file is therefore written here:

    u64 length of the header · header, JSON: name -> dtype, shape, [begin, end) in the data · data, tensor by tensor

In the format "bnb-4bit" the 4-bit layers stay as they are, under bitsandbytes' keys. Weight files appear when all are
written; those of an earlier save are removed. models/gguf/write.py writes GGUF.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import together, whole, write_text
from minilora.lora.embedding_conv import active_adapters, unwrapped
from minilora.lora.files.save_load import CONFIG_FILE
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.merge import merged_bias, merged_from, merged_weight
from minilora.lora.registry import lora_configs
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.gguf.tokenizer_export import to_fields
from minilora.models.gguf.write import write_gguf
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import quantize_nf4

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_CODES = _DTYPES | {torch.uint8: "U8"}
_FORMATS = ("safetensors", "bnb-4bit", "gguf")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file to be; `make` computes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "safetensors",
    merge: bool = False,
    requantize: bool = False,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` to `folder`; transformers loads it with equal logits. A folder that holds an adapter is refused.

    format: "safetensors", all layers dense; "bnb-4bit", 4-bit layers as bitsandbytes keeps them; or "gguf", one file
        for llama.cpp: `folder` itself if it ends in .gguf, else model.gguf in it.
    merge: fold the active adapters in and, unless "bnb-4bit", make 4-bit layers dense; without it, a model that has
        any is refused.
    requantize: with merge, let "bnb-4bit" round merged layers to 4 bits again, a second copy of them in memory.
    dtype: of all dense tensors; default each tensor's own before it was trained, and for a 4-bit layer the dtype it
        was made from. For "gguf", of the matrices: a dtype or "q8_0", default the embedding's (vectors are fp32 there).
    tokenizer: saved beside the model (its `save_pretrained` is called), or within the GGUF file.
    shard_bytes: size above which the weights go to several files; GGUF is always one.
    Raises ValueError for what cannot be saved so, and when a value leaves the range of `dtype`.
    """
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"save_model writes models of load_model, got {type(model).__name__}. A transformers model: "
            "ml.merge(model).save_pretrained(folder); an adapter alone: ml.save_adapter(model, folder)."
        )
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {format!r}.")
    _check_layers(model, format, merge, requantize)
    config = _config(model)
    if format == "gguf":
        return _write_gguf(model, config, Path(folder), dtype, tokenizer)
    by_name = {str(known).removeprefix("torch."): known for known in _DTYPES}
    if dtype is not None and str(dtype).removeprefix("torch.") not in by_name:
        raise ValueError(f"dtype must be one of {', '.join(by_name)}, got {dtype}.")
    dtype = by_name.get(str(dtype).removeprefix("torch."))  # None stays None
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds an adapter, which transformers would load too: give another folder.")
    entries = _all_entries(model, config, dtype, format)
    if dtype is None:
        before = _before_training(model)
        entries = [replace(entry, dtype=before.get(entry.name, entry.dtype)) for entry in entries]
    names = _write_weights(folder, entries, shard_bytes)
    embedding = next(entry for entry in entries if entry.name == "model.embed_tokens.weight")
    dtype_name = str(embedding.dtype).removeprefix("torch.")
    fields = replace(config, dtype=dtype_name).to_hf()
    if format == "bnb-4bit":
        fields["quantization_config"] = _quantization_config(model, dtype_name)
    write_text(folder / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")
    for stale in [*folder.glob("model-*.safetensors"), folder / "model.safetensors", folder / _INDEX]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _before_training(model: CausalLM) -> dict[str, torch.dtype]:
    """Of the modules and biases that train with an adapter, as fp32 copies: the dtypes of the originals."""
    found = {}
    for path, part in lora_configs(model).parts.originals.items():
        tensors = {path: part} if isinstance(part, nn.Parameter) else dict(part.named_parameters(path))
        found |= {name: tensor.dtype for name, tensor in tensors.items()}
    return found


def _write_weights(folder: Path, entries: list[_Entry], shard_bytes: int) -> set[str]:
    """The weight files and, for several, their index; returns their names."""
    shards = _shards(entries, shard_bytes)
    with together(folder, folder / _INDEX) as temporary:
        for file, shard in shards.items():
            _write(temporary / file, shard)
    if len(shards) == 1:
        return set(shards)
    places = {entry.name: file for file, shard in shards.items() for entry in shard}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": places}
    write_text(folder / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {*shards, _INDEX}


def _check_layers(model: CausalLM, format: str, merge: bool, requantize: bool) -> None:
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    in_4_bits = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    four_bit = format == "bnb-4bit"
    if four_bit and (not in_4_bits or any(name.startswith("lm_head") for name in in_4_bits)):
        found = "lm_head is in 4 bits, which stays dense" if in_4_bits else "no layer is in 4 bits"
        raise ValueError(f"bnb-4bit: {found}. Quantise with ml.quantize_model or load_model(quantize='nf4').")
    if (adapted or in_4_bits and not four_bit) and not merge:
        what = f"{len(adapted)} layers with adapters" if adapted else f"{len(in_4_bits)} layers in 4 bits"
        raise ValueError(
            f"the model has {what} (first {[*adapted, *in_4_bits][0]}), which a plain checkpoint cannot hold. "
            "Pass merge=True to write dense weights, or ml.save_adapter(model, folder) for the adapter alone."
        )
    active = [name for name, module in adapted.items() if module.active]
    if adapted and not active:
        raise ValueError("no adapter is active, so none would be merged: ml.set_adapter or ml.eject first.")
    rounded = [name for name in active if isinstance(adapted[name].base_layer, NF4Linear)]
    if four_bit and rounded and not requantize:
        raise ValueError(
            f"merging into {len(rounded)} 4-bit layers (first {rounded[0]}) rounds them to 4 bits again, which loses "
            "most of a small adapter. Pass requantize=True if that is wanted; format='safetensors' keeps it, in dense "
            "weights, and ml.save_adapter beside the 4-bit model loses nothing."
        )
    if requantize and not (four_bit and rounded):
        raise ValueError("requantize=True is for merging adapters into 4-bit layers with format='bnb-4bit'.")


def _config(model: CausalLM) -> DecoderConfig:
    """The config of what is written: tied only if the two weights will be one, with biases where a layer has one.

    Raises ValueError for a bias (of a lora_bias that is merged) which the family's config cannot tell of.
    """
    tied = merged_from(model.lm_head) == merged_from(model.model.embed_tokens)
    config = replace(model.config, tie_word_embeddings=tied)
    expected = _biases(config)
    for path in (path for path, m in model.named_modules() if isinstance(unwrapped(m), nn.Linear | NF4Linear)):
        path = path.removesuffix(".base_layer")
        if merged_bias(model.get_submodule(path)) is None or path in expected:
            continue
        field = {"self_attn": "attention_bias", "mlp": "mlp_bias"}.get(path.split(".")[-2:][0], "")
        if field not in config.family.own:
            raise ValueError(
                f"{path} has a bias (lora_bias), for which the config of a {config.model_type} model has no field: "
                "nothing was written. Keep the adapter unmerged with ml.save_adapter, or train it without lora_bias."
            )
        config = replace(config, **{field: True})
        expected = _biases(config)
    return config


def _biases(config: DecoderConfig) -> set[str]:
    """The linear layers to which the config gives a bias."""
    with torch.device("meta"):
        return {name.removesuffix(".bias") for name, _ in CausalLM(config).named_parameters() if name.endswith(".bias")}


def _quantization_config(model: CausalLM, dtype: str) -> dict[str, Any]:
    """What transformers reads as a BitsAndBytesConfig. A list of exceptions replaces its own, which is the head."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | NF4Linear)}
    dense = [name.removesuffix(".base_layer") for name, m in linear.items() if isinstance(m, nn.Linear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(isinstance(m, NF4Linear) and m.weight.double_quant for m in linear.values()),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted({*dense, "lm_head"}) if set(dense) - {"lm_head"} else None,
    }


def _four_bit_state(module: nn.Module, base: NF4Linear, name: str) -> dict[str, Tensor]:
    weight = base.weight
    if isinstance(module, LoRALayer) and module.active:
        merged = quantize_nf4(merged_weight(module), weight.blocksize, weight.double_quant)
        weight = replace(merged, dtype=weight.dtype)
    return weight.state_dict(name)


def _all_entries(model: CausalLM, config: DecoderConfig, dtype: Any, format: str) -> list[_Entry]:
    """The tensors that a model of `config` has: those of `model`, without a tied head, and zeros for missing biases."""
    entries = {entry.name: entry for entry in _entries(model, "", dtype, format)}
    if config.tie_word_embeddings:
        del entries["lm_head.weight"]
    for name in sorted(f"{path}.bias" for path in _biases(config)):
        if name not in entries:
            base: Any = unwrapped(model.get_submodule(name.removesuffix(".bias")))
            shape, own = (base.out_features,), base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
            entries[name] = _Entry(name, shape, dtype or own, partial(torch.zeros, shape))
    return list(entries.values())


def _entries(module: nn.Module, prefix: str, dtype: Any, format: str) -> Iterator[_Entry]:
    """Every tensor under its plain name, adapters merged; 4-bit layers dense, or in parts for bnb-4bit."""
    if isinstance(module, LoRALayer | NF4Linear):
        base: Any = unwrapped(module)
        own = base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
        shape = tuple(base.weight.shape)
        if format == "bnb-4bit" and isinstance(base, NF4Linear):
            for name, part in _four_bit_state(module, base, f"{prefix}weight").items():
                yield _Entry(name, tuple(part.shape), part.dtype, part.detach)
        else:
            yield _Entry(f"{prefix}weight", shape, dtype or own, lambda: merged_weight(module))
        bias = merged_bias(module)
        parameters = {} if bias is None else {"bias": bias}
        if bias is not None and any(adapter.lora_bias is not None for adapter in active_adapters(module)):
            dtype = dtype or own  # the sum is in fp32
    else:
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, child in module.named_children():
            yield from _entries(child, f"{prefix}{name}.", dtype, format)
    for name, value in parameters.items():
        yield _Entry(f"{prefix}{name}", tuple(value.shape), dtype or value.dtype, value.detach)


def _shards(entries: list[_Entry], limit: int) -> dict[str, list[_Entry]]:
    """File name -> its tensors, in the model's order; a tensor larger than `limit` gets a file of its own."""
    groups: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": entries}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


@torch.no_grad()
def _write_gguf(model: CausalLM, config: DecoderConfig, path: Path, dtype: Any, tokenizer: Any) -> None:
    dtype = dtype or model.model.embed_tokens.weight.dtype
    sources = [(entry.name, entry.shape, entry.make) for entry in _all_entries(model, config, None, "gguf")]
    fields = None if tokenizer is None else to_fields(tokenizer, config.vocab_size)
    path = path if path.suffix == ".gguf" else path / "model.gguf"
    write_gguf(path, config, sources, str(dtype).removeprefix("torch."), fields)


@torch.no_grad()
def _write(path: Path, entries: list[_Entry]) -> None:
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned to its item size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.make().to(entry.dtype)
            if not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"{entry.name} holds NaN or infinity in {entry.dtype}: nothing was written.")
            file.write(tensor.contiguous().flatten().cpu().view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
