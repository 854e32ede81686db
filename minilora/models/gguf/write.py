"""One GGUF file for llama.cpp from a model: the reverse of read.py, tensor by tensor.

Names, the order of q_proj's and k_proj's rows, Gemma's norms and the keys are those of llama.cpp's
converter. It keeps vectors (norms, biases) in fp32, and uses fp16 where a row is not divisible into
the blocks of 32 values that Q8_0 has. Llama and Mistral are both the architecture "llama" there.
Only the architecture "gemma3" has a sliding window, so another model that uses one is an error.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.common import atomic_write
from minilora.common.extras import require
from minilora.common.progress import ProgressBar
from minilora.models.config import DecoderConfig
from minilora.models.families import ROTATION_INTERVAL, SLIDING, rotated_at
from minilora.models.gguf.architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    gguf_name,
    norm_offset,
    permuted_heads,
)
from minilora.models.gguf.config import (
    DEFAULT_LOCAL_THETA,
    DEFAULT_PERIOD,
    LOCAL_THETA,
    SIZES,
    WINDOW,
    WINDOW_PERIOD,
    attention_scalar,
    layer_kinds,
)
from minilora.models.gguf.read import TokenizerFields
from minilora.models.rope_config import Rope, frequencies

KINDS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
}
_BLOCK = 32  # values that share a scale in Q8_0 and Q4_0
# The scale of a block is its largest magnitude / 127 in Q8_0, / 8 in Q4_0, stored in fp16.
_DIVISORS = {"Q8_0": 127, "Q4_0": 8}
# The vocabulary's matrices keep 8 bits in a file of 4 bits, as llama.cpp's own tool keeps more bits.
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")

# Hugging Face name, shape, and the function that computes the tensor
Source = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def write_gguf(
    path: Path,
    config: DecoderConfig,
    sources: Iterable[Source],
    dtype: str,
    tokenizer: TokenizerFields | None,
) -> None:
    """Write a model to a GGUF file, which appears only when it is complete.

    Args:
        path: The file to write.
        config: The model's config.
        sources: Name, shape and function of each tensor; one tensor is in memory at a time.
        dtype: Type of the matrices, a key of KINDS; vectors are fp32.
        tokenizer: Fields of the tokenizer; without them llama.cpp takes ids but not text.

    Raises:
        ImportError: If the gguf package is not installed.
        ValueError: If GGUF cannot represent the model, or a value is not finite in `dtype`.
    """
    require(f"{path}: writing GGUF", "gguf")
    import gguf

    check_options(config, dtype)
    heads = permuted_heads(config)
    sources = [*_rope_factors(config), *sources]
    with atomic_write(path) as temporary, ProgressBar("save", len(sources), "tensor") as bar:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config.model_type])
        try:
            _add_fields(writer, config, KINDS[dtype])
            _add_tokenizer(writer, config, tokenizer)
            names = [_kind(name, shape, dtype) for name, shape, _ in sources]
            kinds = [gguf.GGMLQuantizationType[name] for name in names]
            _add_records(writer, config, sources, kinds)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (name, _, make), kind in zip(sources, kinds, strict=True):
                tensor = make().float().cpu()
                module = name.split(".")[-2]
                if module in heads:
                    tensor = permute(tensor, heads[module])
                tensor = tensor + norm_offset(config, name)
                _check_range(name, tensor, kind.name)
                writer.write_tensor_data(gguf.quantize(tensor.contiguous().numpy(), kind))
                del tensor  # before the next one is made
                bar.update()
        finally:
            writer.close()


def permute(rows: Tensor, heads: int) -> Tensor:
    """Put a head's rows in llama.cpp's order: (h, half, i) becomes (h, i, half).

    `unpermute` of read.py is the inverse.

    Args:
        rows: Weight or bias in Hugging Face's order, shape (heads · d, …).
        heads: Number of heads.

    Returns:
        The same rows in llama.cpp's order, same shape.
    """
    halves = rows.unflatten(0, (heads, 2, -1))  # (heads, 2, d / 2, …)
    return halves.transpose(1, 2).reshape(rows.shape)  # (heads · d, …)


def check_options(config: DecoderConfig, dtype: str) -> None:
    """Check that GGUF has the dtype and the architecture, and that llama.cpp computes this model.

    Args:
        config: The model's config.
        dtype: Type of the matrices.

    Raises:
        ValueError: If one of them does not fit.
    """
    message = "{} of a GGUF file must be one of {}, got {!r}."
    if dtype not in KINDS:
        raise ValueError(message.format("dtype", ", ".join(KINDS), dtype))
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(message.format("model_type", known, config.model_type))
    if config.family.gemma:
        _check_gemma(config)
    window = config.sliding_window
    if not config.family.gemma and window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"llama.cpp would ignore sliding_window {window} and compute texts of up to "
            f"max_position_embeddings {config.max_position_embeddings} tokens differently. Set "
            "max_position_embeddings to the window first, or use format='safetensors'."
        )
    arch = ARCHITECTURES[config.model_type]
    problem = None
    rotated = rotated_at(ROTATION_INTERVAL, config.num_hidden_layers)
    if config.family.skips_rope and config.no_rope_layers != rotated:
        problem = "rotates q and k in three of four layers, always,"
    if config.family.skips_rope and (config.attention_bias or config.mlp_bias):
        problem = "has no biases"
    if arch != "llama" and config.rope.kind == "llama3":
        problem = "would ignore the llama3 scaling of the rotation"
    if config.family.qk_norm and config.attention_bias:
        problem = "has no biases of attention"
    if problem:
        raise ValueError(f"llama.cpp {problem} in {arch} files. Use format='safetensors'.")


def _check_gemma(config: DecoderConfig) -> None:
    """Check the parts of a Gemma 3 model that llama.cpp derives from its sizes."""
    _window_period(config)
    expected = attention_scalar(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
    )
    scalar = config.query_pre_attn_scalar or config.head_dim
    if scalar != expected:
        raise ValueError(
            f"llama.cpp divides the scores of this model by √{expected}, not by √{scalar} as "
            "query_pre_attn_scalar says. Use format='safetensors'."
        )
    local = config.rope_of(SLIDING)
    if SLIDING in config.layer_types and local.kind != "default":
        raise ValueError(
            f"llama.cpp does not scale the rotation of sliding layers, but this model does "
            f"({local.kind}). Use format='safetensors'."
        )


def _window_period(config: DecoderConfig) -> int:
    """Return p such that the last of every p layers has full attention, and no other layer."""
    layers = config.num_hidden_layers
    for period in (DEFAULT_PERIOD, *range(1, layers + 2)):
        if layer_kinds(layers, period) == tuple(config.layer_types):
            return period
    raise ValueError(
        "llama.cpp gives full attention to the last of every p layers of a Gemma 3 model, got "
        f"layer_types {list(config.layer_types)}. Use format='safetensors'."
    )


def _add_records(
    writer: Any, config: DecoderConfig, sources: list[Source], kinds: list[Any]
) -> None:
    """Add the name, shape, type and size of each tensor to the header."""
    import gguf
    import numpy as np  # not at the top: `import minilora` must stay light

    for (name, shape, _), kind in zip(sources, kinds, strict=True):
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        dtype = np.dtype(np.float32)
        stored_name = gguf_name(name, config.model_type)
        writer.add_tensor_info(stored_name, shape, dtype, nbytes, raw_dtype=kind)


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return the name of the GGUF type for a tensor of this name and shape."""
    if len(shape) < 2:
        return "F32"
    if KINDS[dtype] in _DIVISORS and shape[-1] % _BLOCK != 0:
        return "F16"
    if dtype == "q4_0" and name in _VOCABULARY:
        return "Q8_0"
    return KINDS[dtype]


def _check_range(name: str, tensor: Tensor, kind: str) -> None:
    """Check that every value is finite in the stored type."""
    stored_dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    stored_dtype = stored_dtypes.get(kind, torch.float16)  # of scales too
    largest = tensor.abs().max() / _DIVISORS.get(kind, 1)  # ()
    if not largest.to(stored_dtype).isfinite():
        raise ValueError(f"{name} holds NaN or infinity in {kind}: nothing was written.")


def _rope_factors(config: DecoderConfig) -> list[Source]:
    """Return Llama 3.1's scaling as a tensor ω / ω', shape (head_dim / 2,)."""
    if config.rope.kind != "llama3":
        return []
    plain = frequencies(Rope(config.rope.theta), config.head_dim)  # (head_dim / 2,)
    scaled = frequencies(config.rope, config.head_dim)  # (head_dim / 2,)
    return [(ROPE_FACTORS, (config.head_dim // 2,), lambda: plain / scaled)]


def _add_fields(writer: Any, config: DecoderConfig, kind: str) -> None:
    """Add the config to the header; the order of the keys is that of the file."""
    import gguf

    arch = ARCHITECTURES[config.model_type]
    share = "ALL" if kind == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{share}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    numbers = {key: getattr(config, name) for key, name in SIZES.items()}
    numbers["attention.key_length"] = config.head_dim
    numbers["attention.value_length"] = config.head_dim
    numbers["rope.dimension_count"] = config.head_dim
    numbers["attention.head_count_kv"] = config.num_key_value_heads
    numbers["vocab_size"] = config.vocab_size
    for key, number in numbers.items():
        writer.add_uint32(f"{arch}.{key}", number)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.family.gemma:
        _add_window(writer, config, arch)


def _add_window(writer: Any, config: DecoderConfig, arch: str) -> None:
    """Add Gemma 3's window, and the period and θ of its layers if llama.cpp's defaults differ."""
    if config.sliding_window is None:
        return  # llama.cpp then gives full attention to every layer
    writer.add_uint32(f"{arch}.{WINDOW}", config.sliding_window)
    period = _window_period(config)
    if period != DEFAULT_PERIOD:
        writer.add_uint32(f"{arch}.{WINDOW_PERIOD}", period)
    local_theta = config.rope_of(SLIDING).theta
    if local_theta != DEFAULT_LOCAL_THETA:
        writer.add_float32(f"{arch}.{LOCAL_THETA}", local_theta)


def _add_tokenizer(writer: Any, config: DecoderConfig, fields: TokenizerFields | None) -> None:
    """Add the tokenizer, or without one only the ids that the config names."""
    _add_special_ids(writer, config, fields)
    if fields is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(fields.model)
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.token_types)
    if fields.model == "llama":
        writer.add_token_scores(fields.scores)
    else:
        writer.add_token_merges(fields.merges)
    writer.add_add_bos_token(fields.add_bos)
    writer.add_add_eos_token(fields.add_eos)
    writer.add_add_space_prefix(fields.add_space_prefix)
    if fields.chat_template is not None:
        writer.add_chat_template(fields.chat_template)


def _add_special_ids(writer: Any, config: DecoderConfig, fields: TokenizerFields | None) -> None:
    """Add the ids of BOS, EOS, UNK and padding; a tokenizer needs an EOS."""
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        ids[name] = getattr(fields or config, f"{name}_token_id", None)
    if ids["eos"] is None:
        ids["eos"] = config.eos_token_id
    if fields is not None and ids["eos"] is None:
        raise ValueError(
            "GGUF: neither tokenizer nor config names an EOS: llama.cpp would take some other "
            "token for it."
        )
    if isinstance(ids["eos"], tuple):
        ids["eos"] = ids["eos"][0]  # llama.cpp finds the others by their text
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
