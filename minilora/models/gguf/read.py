"""GGUF, llama.cpp's single-file format: config, tensors and tokenizer pieces of llama and qwen2 files.

Three things differ from a Hugging Face checkpoint: the names; in llama the rows of q_proj and k_proj (llama.cpp turns
neighbouring channels (2i, 2i+1) where Hugging Face turns (i, i + d/2); undone here); and the values, in one of many
quantised types, which are left to the `gguf` package. gguf_header.py reads the file's layout.
"""

import importlib.util
import math
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.models.config import DecoderConfig
from minilora.models.gguf.header import Record, read_header
from minilora.models.rope_config import Rope, frequencies

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}  # model_type -> GGUF's
NAMES = {  # GGUF -> Hugging Face, the part after the layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"

SIZES = {  # keys under "llama." or "qwen2." that every file has
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
# All keys there that are read here or mean nothing; any other must be empty.
_KEYS = SIZES.keys() | set(
    "vocab_size attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
    "rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.finetuned tensor_data_layout".split()
)


@dataclass(frozen=True)
class TokenizerFields:
    """What a tokenizer is built from. token_types: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""

    model: str  # "gpt2" is byte-level BPE, "llama" is SentencePiece
    pre: str | None  # name of the pre-tokenizer, such as "smollm" or "llama-bpe"
    tokens: list[str]
    token_types: list[int]
    merges: list[str]  # "left right", in the order of their rank
    scores: list[float]
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


class GGUFCheckpoint:
    """A GGUF file seen as a Hugging Face checkpoint: `config`, `shapes` by name, `read(name)`, `where(name)`."""

    four_bit: Set[str] = frozenset()  # its quantised tensors are not NF4: they come out dense
    skip: list[str] = []

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"{path}: reading a GGUF model needs the gguf package: pip install 'minilora[gguf]'")
        self.path = path
        fields, self._records = read_header(path)
        end = 0
        for name, record in sorted(self._records.items(), key=lambda item: item[1].offset):
            if record.offset < end:
                raise ValueError(f"{path} is damaged: tensor {name} overlaps the one before it. Download it again.")
            end = record.offset + math.prod(_byte_shape(record, f"{path}: tensor {name}"))
            if end > path.stat().st_size:
                raise ValueError(f"{path} is cut off: tensor {name} ends after the file does. Download it again.")
        factors = self._records.pop(ROPE_FACTORS, None)
        try:
            self.config = _config(path, fields, self._records, None if factors is None else self._dense(factors))
        except (TypeError, OverflowError) as error:  # a list or a text where a number belongs; an infinite one
            raise ValueError(f"{path}: a field of its header is of the wrong kind ({error}).") from error
        self._gguf_names = {_hf_name(path, name): name for name in self._records}
        self.shapes = {name: self._records[gguf_name].shape for name, gguf_name in self._gguf_names.items()}

    def where(self, name: str) -> str:
        return f"{self._gguf_names[name]} of {self.path}" if name in self._gguf_names else str(self.path)

    def read(self, name: str) -> Tensor:
        """One tensor, fp32, in Hugging Face's row order."""
        tensor = self._dense(self._records[self._gguf_names[name]])
        heads = permuted_heads(self.config)
        module = name.split(".")[-2]
        return unpermute(tensor, heads[module]) if module in heads else tensor

    def _dense(self, record: Record) -> Tensor:
        import gguf
        import numpy as np  # here: `import minilora` is to stay light

        kind, shape = gguf.GGMLQuantizationType(record.kind), _byte_shape(record, str(self.path))
        raw = np.fromfile(self.path, np.uint8, count=math.prod(shape), offset=record.offset)
        try:
            dense = gguf.dequantize(raw.reshape(shape), kind)
        except NotImplementedError:
            raise ValueError(f"{self.path}: the gguf package cannot dequantise type {kind.name}.") from None
        return torch.from_numpy(dense.copy() if not dense.flags.writeable else dense)


def permuted_heads(config: DecoderConfig) -> dict[str, int]:
    """The modules whose rows llama.cpp reorders, with their number of heads."""
    if config.model_type == "qwen2":
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's order of a head's rows: (h, i, half) back to (h, half, i). rows (heads·d, …)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def read_tokenizer_fields(path: Path | str) -> TokenizerFields:
    """The tokenizer stored in a GGUF file, without its tensors; needs no extra package."""
    fields, _ = read_header(Path(path))

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    _check_tokenizer(Path(path), fields)
    return TokenizerFields(
        model=get("model", ""),
        pre=get("pre"),
        tokens=get("tokens"),
        token_types=get("token_type", [1] * len(get("tokens"))),
        merges=get("merges", []),
        scores=get("scores", []),
        bos_token_id=get("bos_token_id"),
        eos_token_id=get("eos_token_id"),
        unk_token_id=get("unknown_token_id"),
        pad_token_id=get("padding_token_id"),
        add_bos=get("add_bos_token", get("model") == "llama" or get("pre") == "llama-bpe"),
        add_eos=get("add_eos_token", False),
        add_space_prefix=get("add_space_prefix", get("model") == "llama"),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _check_tokenizer(path: Path, fields: dict[str, Any]) -> None:
    """ValueError unless lists are lists, of the right things and equally long, and ids lie within them."""
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    if not own.get("tokens"):
        raise ValueError(f"{path} holds no tokenizer (tokenizer.ggml.tokens is missing).")
    kinds = {"tokens": str, "token_type": int, "merges": str, "scores": int | float}
    lists = {key: own.get(key, []) for key in kinds}
    wrong = [k for k, v in lists.items() if not isinstance(v, list) or not all(isinstance(x, kinds[k]) for x in v)]
    count = len(own["tokens"]) if not wrong else 0
    for key in ["token_type"] * ("token_type" in own) + ["scores"] * (own.get("model") == "llama"):
        wrong += [key] * (not wrong and (len(lists[key]) != count or not all(map(math.isfinite, lists[key]))))
    ids = {key: own.get(f"{key}_token_id") for key in ("bos", "eos", "unknown", "padding")}
    wrong += [key for key, i in ids.items() if i is not None and not (type(i) is int and 0 <= i < count)]
    wrong += [key for key in ("model", "pre", "tokenizer.chat_template") if not isinstance(own.get(key, ""), str)]
    if wrong:
        raise ValueError(f"{path}: its tokenizer is damaged: {', '.join(wrong)} of the wrong kind, length or range.")


def _config(path: Path, fields: dict[str, Any], records: dict[str, Record], factors: Tensor | None) -> DecoderConfig:
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES.values():
        raise ValueError(
            f"{path}: unknown GGUF architecture {arch!r}; minilora reads llama (Llama, Mistral, SmolLM2) and qwen2. "
            "Other models: load with transformers and call ml.inject(model, ...) on them."
        )
    if fields.get("split.count", 0) not in (0, 1):
        raise ValueError(f"{path} is one of {fields['split.count']} parts: join them with llama-gguf-split --merge.")
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    unread = {key: value for key, value in own.items() if key not in _KEYS and value not in (0, False, "", [])}
    if unread:
        raise ValueError(f"{path}: {arch} keys {unread} are unknown and may change the result.")
    for key in (*SIZES, "attention.layer_norm_rms_epsilon"):
        if not isinstance(own.get(key), int | float) or not own[key] > 0:
            raise ValueError(f"{path}: {arch}.{key} must be a positive number, got {own.get(key)!r}.")
    sizes = {name: own[key] for key, name in SIZES.items()}
    if "token_embd.weight" not in records:
        raise ValueError(f"{path}: no token_embd.weight: this is not a whole model.")
    heads = sizes["num_attention_heads"]
    head_dim = own.get("attention.key_length", sizes["hidden_size"] // heads)
    if {own.get("attention.value_length", head_dim), own.get("rope.dimension_count", head_dim)} != {head_dim}:
        raise ValueError(f"{path}: heads of {head_dim} channels of which not all are rotated or valued: not supported.")
    config = sizes | {
        "model_type": arch,
        "vocab_size": records["token_embd.weight"].shape[0],
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in records,
    }
    if arch == "llama":  # qwen2 has them in fixed places
        config |= {"attention_bias": "blk.0.attn_q.bias" in records, "mlp_bias": "blk.0.ffn_gate.bias" in records}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        config[f"{name}_token_id"] = number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if not isinstance(number, int | None):
            raise ValueError(f"{path}: tokenizer.ggml.{key}_token_id must be a number, got {number!r:.50}.")
    return replace(DecoderConfig.from_hf(config), rope=_rope(path, own, head_dim, factors))


def _rope(path: Path, own: dict[str, Any], head_dim: int, factors: Tensor | None) -> Rope:
    theta = own.get("rope.freq_base", Rope.theta)
    kind = own.get("rope.scaling.type", "none")
    if factors is None:
        return Rope(theta) if kind == "none" else Rope(theta, kind, own.get("rope.scaling.factor", 0.0))  # 0 raises
    # Llama 3.1 and later store ω / ω' instead of its recipe: recover the recipe, then prove that it gives these values.
    plain = frequencies(Rope(theta), head_dim)
    if kind == "none" and factors.shape == plain.shape:
        rope = Rope(theta, "llama3", round(factors.max().item(), 4))
        if torch.allclose(factors, plain / frequencies(rope, head_dim), rtol=1e-4):
            return rope
    raise ValueError(f"{path}: {ROPE_FACTORS} is not the scaling of Llama 3.1: not supported.")


def _hf_name(path: Path, name: str) -> str:
    path_to, _, leaf = name.rpartition(".")
    *prefix, module = path_to.split(".")
    if not prefix and module in TOP:
        return f"{TOP[module]}.{leaf}"
    if len(prefix) == 2 and prefix[0] == "blk" and module in NAMES:
        return f"model.layers.{prefix[1]}.{NAMES[module]}.{leaf}"
    raise ValueError(f"{path}: tensor {name} is none of a Llama-family decoder.")


def _byte_shape(record: Record, where: str) -> tuple[int, ...]:
    """The stored tensor as rows of bytes."""
    import gguf

    try:
        return gguf.quant_shape_to_byte_shape(record.shape, gguf.GGMLQuantizationType(record.kind))
    except ValueError as error:  # no such type, or a row that is no whole number of its blocks
        raise ValueError(f"{where} has shape {record.shape} and type {record.kind}: {error}.") from error
