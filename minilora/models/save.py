"""A model as a folder that transformers and vLLM load, or as one GGUF file for llama.cpp.

With merge=True each layer is made dense when it is written:

    W' = W + Σ s · B A      in fp32, rounded once to the stored dtype

A second model is never in memory: beyond the model, saving needs the memory of one layer's W and
B A: models/safetensors_writer.py makes, writes and frees one tensor after the other. In the format
"bnb-4bit" the 4-bit layers stay as they are, under bitsandbytes' keys, or are rounded again with an
adapter (lora/merging/four_bits.py). models/gguf/write.py writes GGUF files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import get_submodule, named_modules, unwrap_model, write_text
from minilora.lora.embedding_conv import active_adapters, unwrapped
from minilora.lora.files.save_load import CONFIG_FILE
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.four_bits import check_rounding, four_bit_weight
from minilora.lora.merging.merge import merged_bias, merged_from, merged_weight
from minilora.lora.registry import lora_configs
from minilora.lora.trained_parts.trained_tokens import merged_tokens
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.gguf.tokenizer_export import to_fields
from minilora.models.gguf.write import check_options, write_gguf
from minilora.models.safetensors_writer import Entry, remove_stale_weights, write_weights
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantized_linear import QuantizedEmbedding, QuantizedLinear
from minilora.quant.storage import bitsandbytes_config

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_FORMATS = ("safetensors", "bnb-4bit", "gguf")
_BIAS_FIELDS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}  # of the config, by parent module


@dataclass(frozen=True)
class _Storage:
    """The format of a file, and how merged layers are rounded to 4 bits in it."""

    format: str
    rounding: str = "stochastic"
    seed: int = 0


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "safetensors",
    merge: bool = False,
    requantize: bool | str = False,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model to a folder from which transformers loads it with equal logits.

    Args:
        model: A model of `load_model`, with or without adapters.
        folder: The folder to write; it must not hold an adapter. For "gguf" a path that ends in
            .gguf is the file itself, and otherwise the file is model.gguf in the folder.
        format: "safetensors" makes all layers dense; "bnb-4bit" stores 4-bit layers as
            bitsandbytes does; "gguf" writes one file for llama.cpp.
        merge: Fold the active adapters into the weights and, unless the format is "bnb-4bit", make
            4-bit layers dense. Without it, a model that has either is an error.
        requantize: With merge, let "bnb-4bit" round merged layers to 4 bits again. "stochastic" (or
            True) keeps the adapter on average, and "nearest" loses a small adapter: see `merge`.
            "nearest" computes new scales, and holds a second copy of the 4-bit layers in memory.
        seed: Seed of the draws of `requantize`; each layer's draws depend on its name too.
        dtype: Dtype of all dense tensors. The default is the dtype that each tensor had before it
            was trained, and for a 4-bit layer the dtype that it was made from. For "gguf", the
            type of the matrices: a dtype, "q8_0" or "q4_0" (8 or 4 bits and a scale for 32
            values); the default is the embedding's, and vectors are always fp32.
        tokenizer: Tokenizer to save with the model (by its `save_pretrained`), or to store in the
            GGUF file. The default writes none.
        shard_bytes: Size in bytes above which the weights are split into several files. GGUF is
            always one file.

    Raises:
        ValueError: If the format cannot represent the model, an option does not fit the model, a
            value is not finite in `dtype`, or the scales of a 4-bit base cannot hold an update.
    """
    model = unwrap_model(model)
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"save_model writes models of load_model, got {type(model).__name__}. A transformers "
            "model: ml.merge(model).save_pretrained(folder); an adapter alone: "
            "ml.save_adapter(model, folder)."
        )
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {format!r}.")
    rounding = "stochastic" if requantize is True else requantize
    if isinstance(rounding, str):
        check_rounding(rounding)
    _check_layers(model, format, merge, bool(rounding))
    storage = _Storage(format, rounding or "stochastic", seed)
    with merged_tokens(model):
        config = _saved_config(model)
        if format == "gguf":
            _save_gguf(model, config, Path(folder), dtype, tokenizer)
        else:
            _save_folder(model, config, Path(folder), storage, dtype, tokenizer, shard_bytes)


def _save_folder(
    model: CausalLM,
    config: DecoderConfig,
    folder: Path,
    storage: "_Storage",
    dtype: torch.dtype | str | None,
    tokenizer: Any,
    shard_bytes: int,
) -> None:
    """Write the weights, the config and the tokenizer to a folder, as `save_model` does."""
    dtype = _parse_dtype(dtype)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} holds an adapter, which transformers would load too: give another folder."
        )
    entries = _all_entries(model, config, dtype, storage)
    if dtype is None:
        original_dtypes = _dtypes_before_training(model)
        entries = [
            replace(entry, dtype=original_dtypes.get(entry.name, entry.dtype)) for entry in entries
        ]
    file_names = write_weights(folder, entries, shard_bytes)
    _write_config(model, config, folder, entries, storage.format)
    remove_stale_weights(folder, file_names)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype for its name, such as "float16" or "torch.float16"; None stays None."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}.")
    return _DTYPES[name]


def _dtypes_before_training(model: CausalLM) -> dict[str, torch.dtype]:
    """Return the original dtypes of the modules and biases that train as fp32 copies."""
    dtypes = {}
    for path, original in lora_configs(model).parts.originals.items():
        if isinstance(original, nn.Parameter):
            dtypes[path] = original.dtype
            continue
        for name, parameter in original.named_parameters(path):
            dtypes[name] = parameter.dtype
    return dtypes


# Checks


def _check_layers(model: CausalLM, format: str, merge: bool, requantize: bool) -> None:
    """Check that the format and the options fit the model's adapters and 4-bit layers."""
    adapted: dict[str, LoRALayer] = {}
    quantised: list[str] = []
    in_nf4: list[str] = []
    for name, module in named_modules(model):
        if isinstance(module, LoRALayer):
            adapted[name] = module
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            quantised.append(name)
        if isinstance(module, NF4Linear):
            in_nf4.append(name)
    keeps_4_bits = format == "bnb-4bit"
    if keeps_4_bits:
        _check_quantised_layers(in_nf4)
    if not merge:
        _check_nothing_to_merge(list(adapted), [] if keeps_4_bits else quantised)
    active = [name for name, module in adapted.items() if module.active]
    if adapted and not active:
        raise ValueError(
            "no adapter is active, so none would be merged: ml.set_adapter or ml.eject first."
        )
    rounded: list[str] = []
    if keeps_4_bits:
        rounded = [name for name in active if isinstance(adapted[name].base_layer, NF4Linear)]
    if rounded and not requantize:
        raise ValueError(
            f"merging into {len(rounded)} 4-bit layers (first {rounded[0]}) rounds them to 4 bits "
            "again, which adds noise to the adapter. Pass requantize=True if that is wanted, after "
            "ml.merge_report with held-out rows. format='safetensors' keeps the adapter in dense "
            "weights, and ml.save_adapter next to the 4-bit model loses nothing."
        )
    if requantize and not rounded:
        raise ValueError(
            "requantize=True is for merging adapters into 4-bit layers with format='bnb-4bit'."
        )


def _check_quantised_layers(quantised: list[str]) -> None:
    """Check that "bnb-4bit" has 4-bit layers to store, and that the head is not one."""
    problem = None
    if not quantised:
        problem = "no layer is in 4 bits"
    elif any(name.startswith("lm_head") for name in quantised):
        problem = "lm_head is in 4 bits, but must be dense"
    if problem:
        raise ValueError(
            f"bnb-4bit: {problem}. Quantise with ml.quantize_model or load_model(quantize='nf4')."
        )


def _check_nothing_to_merge(adapted: list[str], quantised: list[str]) -> None:
    """Check that a save without merge has neither adapters nor 4-bit layers to make dense."""
    if not adapted and not quantised:
        return
    description = f"{len(quantised)} quantised layers"
    if adapted:
        description = f"{len(adapted)} layers with adapters"
    first = [*adapted, *quantised][0]
    raise ValueError(
        f"the model has {description} (first {first}), which a plain checkpoint cannot hold. "
        "Pass merge=True to write dense weights, or ml.save_adapter(model, folder) for the "
        "adapter alone."
    )


# The config


def _saved_config(model: CausalLM) -> DecoderConfig:
    """Return the config of the saved model: tied only if the two weights will be equal.

    A merged lora_bias gives a layer a bias, which the family's config must have a field for.
    """
    tied = merged_from(model.lm_head) == merged_from(model.model.embed_tokens)
    config = replace(model.config, tie_word_embeddings=tied)
    expected = _biased_layers(config)
    for name, module in named_modules(model):
        if not isinstance(unwrapped(module), nn.Linear | QuantizedLinear):
            continue
        path = name.removesuffix(".base_layer")
        if merged_bias(get_submodule(model, path)) is None or path in expected:
            continue
        parent = path.split(".")[-2:][0]
        field = _BIAS_FIELDS.get(parent, "")
        if field not in config.family.own:
            raise ValueError(
                f"{path} has a bias (lora_bias), for which the config of a {config.model_type} "
                "model has no field: nothing was written. Keep the adapter unmerged with "
                "ml.save_adapter, or train it without lora_bias."
            )
        config = replace(config, **{field: True})
        expected = _biased_layers(config)
    return config


def _biased_layers(config: DecoderConfig) -> set[str]:
    """Return the linear layers to which the config gives a bias."""
    with torch.device("meta"):
        model = CausalLM(config)
    layers = set()
    for name, _ in model.named_parameters():
        if name.endswith(".bias"):
            layers.add(name.removesuffix(".bias"))
    return layers


def _write_config(
    model: CausalLM, config: DecoderConfig, folder: Path, entries: list[Entry], format: str
) -> None:
    """Write config.json with the embedding's dtype."""
    embedding = next(entry for entry in entries if entry.name == "model.embed_tokens.weight")
    dtype_name = str(embedding.dtype).removeprefix("torch.")
    fields = replace(config, dtype=dtype_name).to_hf()
    if format == "bnb-4bit":
        fields["quantization_config"] = bitsandbytes_config(model, dtype_name)
    write_text(folder / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")


# The tensors


def _all_entries(
    model: CausalLM, config: DecoderConfig, dtype: torch.dtype | None, storage: _Storage
) -> list[Entry]:
    """Return the tensors that a model of `config` has: no tied head, and zeros for new biases."""
    entries = {entry.name: entry for entry in _entries(model, "", dtype, storage)}
    if config.tie_word_embeddings:
        del entries["lm_head.weight"]
    for path in sorted(_biased_layers(config)):
        name = f"{path}.bias"
        if name not in entries:
            base: Any = unwrapped(get_submodule(model, path))
            shape = (base.out_features,)
            zeros = partial(torch.zeros, shape)
            entries[name] = Entry(name, shape, dtype or _layer_dtype(base), zeros)
    return list(entries.values())


def _entries(
    module: nn.Module, prefix: str, dtype: torch.dtype | None, storage: _Storage
) -> Iterator[Entry]:
    """Yield every tensor of a module and its children under its plain name, adapters merged."""
    if isinstance(module, LoRALayer | QuantizedLinear | QuantizedEmbedding):
        yield from _layer_entries(module, prefix, dtype, storage)
        return
    for name, child in module.named_children():
        yield from _entries(unwrap_model(child), f"{prefix}{name}.", dtype, storage)
    for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
        shape = tuple(value.shape)
        yield Entry(f"{prefix}{name}", shape, dtype or value.dtype, value.detach)


def _layer_entries(
    layer: LoRALayer | QuantizedLinear | QuantizedEmbedding,
    prefix: str,
    dtype: torch.dtype | None,
    storage: _Storage,
) -> Iterator[Entry]:
    """Yield the weight and bias of a layer, dense, or in bitsandbytes' parts for "bnb-4bit"."""
    base: Any = unwrapped(layer)
    layer_dtype = _layer_dtype(base)
    if storage.format == "bnb-4bit" and isinstance(base, NF4Linear):
        yield from _four_bit_entries(layer, base, prefix, storage)
    else:
        shape = tuple(base.weight.shape)
        make = partial(merged_weight, layer)
        yield Entry(f"{prefix}weight", shape, dtype or layer_dtype, make)
    bias = merged_bias(layer)
    if bias is None:
        return
    bias_dtype = dtype or bias.dtype
    if any(adapter.lora_bias is not None for adapter in active_adapters(layer)):
        bias_dtype = dtype or layer_dtype  # the sum itself is in fp32
    yield Entry(f"{prefix}bias", tuple(bias.shape), bias_dtype, bias.detach)


def _layer_dtype(base: Any) -> torch.dtype:
    """Return the dtype of a dense weight, or the logical dtype of a quantised one."""
    return base.weight.dtype


def _four_bit_entries(
    layer: nn.Module, base: NF4Linear, prefix: str, storage: _Storage
) -> Iterator[Entry]:
    """Yield bitsandbytes' tensors of a 4-bit weight, rounded again if an adapter is merged."""
    weight = base.weight
    codes = weight.packed.detach
    if isinstance(layer, LoRALayer) and layer.active:
        path = prefix.removesuffix(".")
        if storage.rounding == "nearest":
            weight = four_bit_weight(layer, path, "nearest", storage.seed)
            codes = weight.packed.detach
        else:
            # The scales are those of the base: only the codes are made when the file reaches them.
            codes = partial(_drawn_codes, layer, path, storage.seed)
    key = f"{prefix}weight"
    for name, part in weight.state_dict(key).items():
        make = codes if name == key else part.detach
        yield Entry(name, tuple(part.shape), part.dtype, make)


def _drawn_codes(layer: LoRALayer, path: str, seed: int) -> Tensor:
    """Return the codes of a merged layer by stochastic rounding."""
    return four_bit_weight(layer, path, "stochastic", seed).packed


@torch.no_grad()
def _save_gguf(
    model: CausalLM, config: DecoderConfig, path: Path, dtype: Any, tokenizer: Any
) -> None:
    """Write the model and its tokenizer as one GGUF file."""
    dtype = dtype or model.model.embed_tokens.weight.dtype
    dtype_name = str(dtype).removeprefix("torch.")
    check_options(config, dtype_name)  # before the tokenizer, whose errors say how to go on
    sources = []
    for entry in _all_entries(model, config, None, _Storage("gguf")):
        sources.append((entry.name, entry.shape, entry.make))
    fields = None
    if tokenizer is not None:
        fields = to_fields(tokenizer, config.vocab_size)
    if path.suffix != ".gguf":
        path = path / "model.gguf"
    write_gguf(path, config, sources, dtype_name, fields)
