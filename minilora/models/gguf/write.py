"""Write a model as one GGUF file for llama.cpp: the reverse of gguf.py, tensor by tensor.

Names, the order of q_proj's and k_proj's rows, and the keys are those of llama.cpp's own converter, which also keeps
vectors (norms, biases) in fp32 and falls back to fp16 where Q8_0's blocks of 32 do not fit a row. Llama and Mistral are
both the architecture "llama" there. It has no sliding window: a model that uses one is refused.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.common import whole
from minilora.models.config import DecoderConfig
from minilora.models.gguf.config import ARCHITECTURES, ROPE_FACTORS, SIZES
from minilora.models.gguf.read import NAMES, TOP, TokenizerFields, permuted_heads
from minilora.models.rope_config import Rope, frequencies

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_GGUF_NAMES = {hf: own for own, hf in (NAMES | TOP).items()}

Source = tuple[str, tuple[int, ...], Callable[[], Tensor]]  # Hugging Face name, shape, and what computes the tensor


def write_gguf(
    path: Path, config: DecoderConfig, sources: Iterable[Source], dtype: str, tokenizer: TokenizerFields | None
) -> None:
    """Write `path`, whole or not at all; matrices as `dtype` (a key of KINDS). Without a tokenizer llama.cpp cannot
    take text. ValueError for what GGUF has no place for, or a value that is not finite in `dtype`."""
    try:
        import gguf
        import numpy as np  # here: `import minilora` is to stay light
    except ImportError as error:
        raise ImportError(f"{path}: writing GGUF needs the gguf package: pip install 'minilora[gguf]'") from error
    for what, value, known in (("dtype", dtype, KINDS), ("model_type", config.model_type, ARCHITECTURES)):
        if value not in known:
            raise ValueError(f"{what} of a GGUF file must be one of {', '.join(known)}, got {value!r}.")
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        raise ValueError(
            f"llama.cpp would ignore sliding_window {config.sliding_window}: texts up to max_position_embeddings "
            f"{config.max_position_embeddings} would be computed otherwise. Set that to the window first, or use "
            "format='safetensors'."
        )
    heads = permuted_heads(config)
    sources = [*_rope_factors(config), *sources]
    with whole(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config.model_type])
        try:
            _add_fields(writer, config, KINDS[dtype])
            _add_tokenizer(writer, config, tokenizer)
            kinds = [gguf.GGMLQuantizationType[_kind(shape, dtype)] for _, shape, _ in sources]
            for (name, shape, _), kind in zip(sources, kinds, strict=True):
                nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
                writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (name, _, make), kind in zip(sources, kinds, strict=True):
                tensor = make().float().cpu()
                if module_heads := heads.get(name.split(".")[-2]):
                    tensor = permute(tensor, module_heads)
                _check_range(name, tensor, kind.name)
                writer.write_tensor_data(gguf.quantize(tensor.contiguous().numpy(), kind))
                del tensor  # before the next one is made
        finally:
            writer.close()


def permute(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of a head's rows: (h, half, i) to (h, i, half). rows (heads·d, …); unpermute undoes it."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    if name == ROPE_FACTORS:
        return name
    path, _, leaf = name.rpartition(".")
    if path in _GGUF_NAMES:
        return f"{_GGUF_NAMES[path]}.{leaf}"
    _, _, layer, module = path.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{leaf}"


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) < 2:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % 32 else KINDS[dtype]


def _check_range(name: str, tensor: Tensor, kind: str) -> None:
    stored = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)  # Q8_0: its scale, max / 127
    if not (tensor.abs().max() / (127 if kind == "Q8_0" else 1)).to(stored).isfinite():
        raise ValueError(f"{name} holds NaN or infinity in {kind}: nothing was written.")


def _rope_factors(config: DecoderConfig) -> list[Source]:
    """Llama 3.1's scaling is stored as a tensor ω / ω', (head_dim / 2,)."""
    if config.rope.kind != "llama3":
        return []
    plain, scaled = (frequencies(rope, config.head_dim) for rope in (Rope(config.rope.theta), config.rope))
    return [(ROPE_FACTORS, (config.head_dim // 2,), lambda: plain / scaled)]


def _add_fields(writer: Any, config: DecoderConfig, kind: str) -> None:
    import gguf

    arch, rope = ARCHITECTURES[config.model_type], config.rope
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    numbers = {key: getattr(config, name) for key, name in SIZES.items()}
    numbers |= dict.fromkeys(
        ("attention.key_length", "attention.value_length", "rope.dimension_count"), config.head_dim
    )
    numbers |= {"attention.head_count_kv": config.num_key_value_heads, "vocab_size": config.vocab_size}
    for key, number in numbers.items():
        writer.add_uint32(f"{arch}.{key}", number)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)


def _add_tokenizer(writer: Any, config: DecoderConfig, fields: TokenizerFields | None) -> None:
    """The tokenizer's fields; without one, the ids which the config names. ValueError if neither names an EOS."""
    ids = {name: getattr(fields or config, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    eos = config.eos_token_id if ids["eos"] is None else ids["eos"]
    if fields and eos is None:
        raise ValueError(
            "GGUF: neither tokenizer nor config names an EOS: llama.cpp would take some other token for it."
        )
    ids["eos"] = eos[0] if isinstance(eos, tuple) else eos  # llama.cpp finds the others by their text
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_tokenizer_model(fields.model if fields else "none")
    if fields is not None:
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
