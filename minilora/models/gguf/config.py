"""The config of a GGUF file: llama.cpp's keys for the architectures of architectures.py.

Llama and Mistral models both have the architecture "llama" there. Llama 3.1's scaling of the
rotation is not stored as a recipe but as the tensor rope_freqs.weight with the values ω / ω', plain
over scaled frequencies. It is recognised by its values. A key that this module does not know may
change the model's result, so it is an error.

Gemma 3 files do not list the kind of each layer. llama.cpp gives every sixth layer full attention,
or every p-th if the file has attention.sliding_window_pattern = p. The other layers have a window
and their own θ: 10,000, or rope.freq_base_swa. In SmolLM3 files every fourth layer does not rotate
q and k: llama.cpp has this number in its code.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.models.config import DecoderConfig
from minilora.models.families import FULL, MOST_LAYERS, SLIDING
from minilora.models.gguf.architectures import MODEL_TYPES, ROPE_FACTORS
from minilora.models.gguf.header import Record
from minilora.models.rope_config import Rope, frequencies

SIZES = {  # keys under the architecture, such as "llama.", of every file -> field of DecoderConfig
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_NORM_EPS = "attention.layer_norm_rms_epsilon"
_KNOWN_KEYS = {  # read below, or without effect on the result; any other key must be empty
    *SIZES,
    _NORM_EPS,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
WINDOW = "attention.sliding_window"
WINDOW_PERIOD = "attention.sliding_window_pattern"
LOCAL_THETA = "rope.freq_base_swa"
_GEMMA_KEYS = {WINDOW, WINDOW_PERIOD, LOCAL_THETA}
DEFAULT_PERIOD = 6  # of Gemma's layers with full attention
DEFAULT_LOCAL_THETA = 10_000.0
_LAYERS_OF_27B = 62  # the number by which llama.cpp recognises Gemma 3 27B


def read_config(
    path: Path, fields: dict[str, Any], records: dict[str, Record], factors: Tensor | None
) -> DecoderConfig:
    """Return the config of the model in a GGUF file.

    Args:
        path: The file, for error messages.
        fields: The pairs of its header.
        records: The tensor records of its header.
        factors: The tensor rope_freqs.weight, ω / ω', shape (head_dim / 2,); None without one.

    Returns:
        The config, with the fields of a Hugging Face config.json.

    Raises:
        ValueError: If the architecture, a key or a value is not supported.
        TypeError: If a value is a list or a text where a number belongs.
        OverflowError: If a value is infinite.
    """
    arch = fields.get("general.architecture")
    if arch not in MODEL_TYPES:
        raise ValueError(
            f"{path}: unknown GGUF architecture {arch!r}; minilora reads llama (Llama, Mistral, "
            "SmolLM2), smollm3, qwen2, qwen3 and gemma3. Other models: load with transformers and call "
            "ml.inject(model, ...) on them."
        )
    if fields.get("split.count", 0) not in (0, 1):
        raise ValueError(
            f"{path} is one of {fields['split.count']} parts: join them with "
            "llama-gguf-split --merge."
        )
    keys = _architecture_keys(path, fields, str(arch))
    if "token_embd.weight" not in records:
        raise ValueError(f"{path}: no token_embd.weight: the file is not a complete model.")

    config = {name: keys[key] for key, name in SIZES.items()}
    heads = config["num_attention_heads"]
    head_dim = _head_dim(path, keys, config["hidden_size"], heads)
    config["model_type"] = MODEL_TYPES[arch]
    config["vocab_size"] = records["token_embd.weight"].shape[0]
    config["num_key_value_heads"] = keys.get("attention.head_count_kv", heads)
    config["head_dim"] = head_dim
    config["rms_norm_eps"] = keys[_NORM_EPS]
    config["tie_word_embeddings"] = "output.weight" not in records
    if arch == "llama":  # qwen2 has biases in fixed places, the others none
        config["attention_bias"] = "blk.0.attn_q.bias" in records
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in records
    if arch == "gemma3":
        config.update(_gemma_fields(path, keys, config))
    config.update(_special_ids(path, fields))
    rope = _rope(path, keys, head_dim, factors)
    return replace(DecoderConfig.from_hf(config), rope=rope)


def _architecture_keys(path: Path, fields: dict[str, Any], arch: str) -> dict[str, Any]:
    """Return the values under the architecture's prefix after checking that all are known."""
    prefix = f"{arch}."
    keys = {}
    for key, value in fields.items():
        if key.startswith(prefix):
            keys[key.removeprefix(prefix)] = value
    known = _KNOWN_KEYS | _GEMMA_KEYS if arch == "gemma3" else _KNOWN_KEYS
    unknown = {}
    for key, value in keys.items():
        if key not in known and value not in (0, False, "", []):
            unknown[key] = value
    if unknown:
        raise ValueError(f"{path}: {arch} keys {unknown} are unknown and may change the result.")
    for key in (*SIZES, _NORM_EPS):
        value = keys.get(key)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{path}: {arch}.{key} must be a positive number, got {value!r}.")
    return keys


def _head_dim(path: Path, keys: dict[str, Any], hidden_size: int, heads: int) -> int:
    """Return the channels of a head, which keys, values and the rotation must share."""
    head_dim = keys.get("attention.key_length", hidden_size // heads)
    value_dim = keys.get("attention.value_length", head_dim)
    rotated_dim = keys.get("rope.dimension_count", head_dim)
    if {value_dim, rotated_dim} != {head_dim}:  # a list raises a TypeError here
        raise ValueError(
            f"{path}: heads of {head_dim} channels of which not all are rotated or valued: "
            "not supported."
        )
    return head_dim


def attention_scalar(layers: int, hidden_size: int, heads: int, head_dim: int) -> int:
    """Return the number by whose root llama.cpp divides the scores of a Gemma 3 model.

    A file does not store it: it is hidden_size / heads for the 27B model, else head_dim.

    Args:
        layers: Number of layers.
        hidden_size: Width of the residual stream.
        heads: Number of query heads.
        head_dim: Channels of a head.

    Returns:
        query_pre_attn_scalar of config.json.
    """
    if layers == _LAYERS_OF_27B:
        return hidden_size // heads
    return head_dim


def layer_kinds(layers: int, period: int) -> tuple[str, ...]:
    """Return the kind of each layer if the last one of every `period` layers has full attention.

    Args:
        layers: Number of layers.
        period: At least 1, which gives full attention to all of them.

    Returns:
        FULL or SLIDING for each layer.
    """
    kinds = []
    for layer in range(layers):
        kinds.append(FULL if (layer + 1) % period == 0 else SLIDING)
    return tuple(kinds)


def _gemma_fields(path: Path, keys: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return Gemma 3's window, kinds of layers, second θ and scale of the scores."""
    layers = config["num_hidden_layers"]
    window = keys.get(WINDOW, 0)
    period = keys.get(WINDOW_PERIOD, DEFAULT_PERIOD)
    for key, value, least in ((WINDOW, window, 0), (WINDOW_PERIOD, period, 1)):
        if type(value) is not int or value < least:
            raise ValueError(
                f"{path}: gemma3.{key} must be a whole number of at least {least}, got {value!r}."
            )
    fields: dict[str, Any] = {"sliding_window": window or None}
    if type(layers) is int and layers <= MOST_LAYERS:  # DecoderConfig refuses other numbers
        fields["layer_types"] = list(layer_kinds(layers, period if window else 1))
    fields["rope_local_base_freq"] = keys.get(LOCAL_THETA, DEFAULT_LOCAL_THETA)
    fields["query_pre_attn_scalar"] = attention_scalar(
        layers, config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    )
    return fields


def _special_ids(path: Path, fields: dict[str, Any]) -> dict[str, int | None]:
    """Return the config's ids of BOS, EOS and the padding token."""
    ids: dict[str, int | None] = {}
    for name, gguf_key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        key = f"tokenizer.ggml.{gguf_key}_token_id"
        number = fields.get(key)
        if not isinstance(number, int | None):
            raise ValueError(f"{path}: {key} must be a number, got {number!r:.50}.")
        ids[f"{name}_token_id"] = number
    return ids


def _rope(path: Path, keys: dict[str, Any], head_dim: int, factors: Tensor | None) -> Rope:
    """Return the rotation; Llama 3.1's recipe is recovered from the factors that it gives."""
    theta = keys.get("rope.freq_base", Rope.theta)
    kind = keys.get("rope.scaling.type", "none")
    if factors is None:
        if kind == "none":
            return Rope(theta)
        return Rope(theta, kind, keys.get("rope.scaling.factor", 0.0))  # a factor of 0 raises
    plain = frequencies(Rope(theta), head_dim)  # (head_dim / 2,)
    if kind == "none" and factors.shape == plain.shape:
        rope = Rope(theta, "llama3", round(factors.max().item(), 4))
        # ω / ω' of the recovered recipe must be the stored values.
        recovered = plain / frequencies(rope, head_dim)  # (head_dim / 2,)
        if torch.allclose(factors, recovered, rtol=1e-4):
            return rope
    raise ValueError(f"{path}: {ROPE_FACTORS} is not the scaling of Llama 3.1: not supported.")
