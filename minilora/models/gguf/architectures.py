"""Architectures of GGUF files: tensor names, order of rows, and the offset of norms.

llama.cpp's converter changes a Hugging Face checkpoint in three ways that depend on the family.

1. The tensors have other names. In Gemma 3 four norms of a layer have names of their own.
2. In llama and smollm3 files the rows of q_proj and k_proj have another order.
3. Gemma normalises by 1 + w. Its checkpoints store w, a GGUF file stores 1 + w in fp32. The sum is
   rounded, so w returns from a file with an absolute error of up to 2^-24.
"""

from pathlib import Path

from minilora.models.config import DecoderConfig
from minilora.models.families import FAMILIES

ARCHITECTURES = {  # model_type -> GGUF's
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma3_text": "gemma3",
}
MODEL_TYPES = {  # GGUF's -> model_type
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma3": "gemma3_text",
}
LIKE_LLAMA = ("llama", "smollm3")  # architectures whose rows of q and k llama.cpp reorders
ROPE_FACTORS = "rope_freqs.weight"
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NAMES = {  # GGUF -> Hugging Face, the part of the name after the layer
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
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NORM = "norm.weight"


def layer_names(model_type: str) -> dict[str, str]:
    """Return the names of a layer's tensors, without layer number and leaf.

    Args:
        model_type: A key of ARCHITECTURES.

    Returns:
        Hugging Face names by GGUF names.
    """
    family = FAMILIES[model_type]
    names = dict(_NAMES)
    if family.qk_norm:
        names |= _HEAD_NORMS
    if family.gemma:
        names |= _GEMMA_NORMS
    return names


def hf_name(path: Path, gguf_name: str, model_type: str) -> str:
    """Translate blk.3.ffn_up.weight to model.layers.3.mlp.up_proj.weight.

    Args:
        path: The file, for the error message.
        gguf_name: Name of a tensor in the file.
        model_type: A key of ARCHITECTURES.

    Returns:
        The Hugging Face name.

    Raises:
        ValueError: If the architecture has no such tensor.
    """
    module_path, _, leaf = gguf_name.rpartition(".")
    *prefix, module = module_path.split(".")
    names = layer_names(model_type)
    if not prefix and module in TOP:
        return f"{TOP[module]}.{leaf}"
    if len(prefix) == 2 and prefix[0] == "blk" and module in names:
        return f"model.layers.{prefix[1]}.{names[module]}.{leaf}"
    raise ValueError(f"{path}: tensor {gguf_name} is none of a Llama-family decoder.")


def gguf_name(name: str, model_type: str) -> str:
    """Translate model.layers.3.mlp.up_proj.weight to blk.3.ffn_up.weight.

    Args:
        name: Hugging Face name of a tensor.
        model_type: A key of ARCHITECTURES.

    Returns:
        Its name in a GGUF file.
    """
    if name == ROPE_FACTORS:
        return name
    path, _, leaf = name.rpartition(".")
    names = layer_names(model_type) | TOP
    gguf_names = {hf: gguf for gguf, hf in names.items()}
    if path in gguf_names:
        return f"{gguf_names[path]}.{leaf}"
    _, _, layer, module = path.split(".", 3)
    return f"blk.{layer}.{gguf_names[module]}.{leaf}"


def permuted_heads(config: DecoderConfig) -> dict[str, int]:
    """Return the number of heads of each module whose rows llama.cpp reorders.

    Args:
        config: The model's config.

    Returns:
        Heads by module name; empty for architectures whose rows keep their order.
    """
    if ARCHITECTURES[config.model_type] not in LIKE_LLAMA:
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def norm_offset(config: DecoderConfig, name: str) -> float:
    """Return the number that a GGUF file adds to a tensor: 1 for the norms of Gemma, else 0.

    Args:
        config: The model's config.
        name: Hugging Face name of the tensor.

    Returns:
        The offset.
    """
    if FAMILIES[config.model_type].gemma and name.endswith(_NORM):
        return 1.0
    return 0.0
