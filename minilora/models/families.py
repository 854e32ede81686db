"""Families of decoders that `decoder.py` computes, and their differences."""

from dataclasses import dataclass, field
from typing import Any

# The kinds of a layer, as layer_types names them.
FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Family:
    """Differences of a family from the others; decoder.py explains the switches.

    Attributes:
        architecture: class in transformers.
        defaults: that class's values of fields that config.json omits.
        own: fields that not every family's class reads; on another family a value raises an error.
        fixed: fields for which the decoder implements one value only.
        qkv_bias: biases on q, k and v, always, and none on o_proj.
        qk_norm: norms of q and k.
        skips_rope: some layers do not rotate q and k (no_rope_layers).
        gemma: norms by 1 + w, also after each block; GeGLU; scaled embeddings; a RoPE for each kind
            of layer.
    """

    architecture: str
    defaults: dict[str, Any]
    own: frozenset[str]
    fixed: dict[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    qkv_bias: bool = False
    qk_norm: bool = False
    skips_rope: bool = False
    gemma: bool = False


_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_QWEN_WINDOW = frozenset(
    {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"}
)
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        frozenset({"attention_bias", "mlp_bias"}),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        frozenset({"sliding_window"}),
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, _QWEN_WINDOW, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN | {"head_dim": 128},
        _QWEN_WINDOW | {"attention_bias"},
        qk_norm=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "pad_token_id": 128004,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        frozenset(
            {
                "attention_bias",
                "mlp_bias",
                "sliding_window",
                "layer_types",
                "use_sliding_window",
                "no_rope_layers",
                "no_rope_layer_interval",
            }
        ),
        skips_rope=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        frozenset(
            {
                "attention_bias",
                "sliding_window",
                "layer_types",
                "sliding_window_pattern",
                "query_pre_attn_scalar",
                "rope_local_base_freq",
            }
        ),
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        qk_norm=True,
        gemma=True,
    ),
}
