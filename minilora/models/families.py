"""Families of decoders that `decoder.py` computes: their differences, and the kinds of layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The kinds of a layer, as layer_types names them.
FULL = "full_attention"
SLIDING = "sliding_attention"
MOST_LAYERS = 10_000  # far above any model; a config that claims a billion layers would fill memory
ROTATION_INTERVAL = 4  # of SmolLM3: the last of four layers does not rotate q and k


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


def layer_windows(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `sliding_window` and `layer_types`, by name.

    Qwen has a switch for the window, and no window below layer max_window_layers. In Gemma 3 every
    sixth layer (or as sliding_window_pattern states) has no window. In SmolLM3 the layers that do
    not rotate have one, if the switch is on.

    Args:
        config: the content of config.json.
        values: its known fields, and the family's defaults of absent ones.

    Raises:
        ValueError: a number is out of range, or the family has no such kinds of layers.
    """
    family = FAMILIES[config["model_type"]]
    window = values.get("sliding_window")
    first = 0  # first layer with a window
    if "use_sliding_window" in family.own and not config.get("use_sliding_window"):
        window = None
    if "max_window_layers" in family.own:
        first = config.get("max_window_layers", 28)
        if type(first) is not int:
            first = -1  # refused below
    every = config.get("sliding_window_pattern", 6)
    counts = {
        "num_hidden_layers": values["num_hidden_layers"],
        "sliding_window_pattern": every,
        "max_window_layers": first + 1,
    }
    for name, value in counts.items():
        if type(value) is not int or not 1 <= value <= MOST_LAYERS:
            raise ValueError(
                f"config field {name} is out of the range of a model, 1 to {MOST_LAYERS}: {value!r}."
            )
    kinds = []
    for layer in range(values["num_hidden_layers"]):
        if family.gemma:
            windowed = (layer + 1) % every != 0
        elif family.skips_rope:
            windowed = window is not None and not values["no_rope_layers"][layer]
        else:
            windowed = window is not None and layer >= first
        kinds.append(SLIDING if windowed else FULL)
    given = config.get("layer_types") or kinds
    if given != kinds and "layer_types" not in family.own:
        raise ValueError(
            f"config field layer_types is {given}: a {config['model_type']} model has {kinds[0]} only."
        )
    return {"sliding_window": window, "layer_types": tuple(given)}


def rotated_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return for each layer of a SmolLM3 model 1 if it rotates q and k, else 0.

    Args:
        config: the content of config.json; without `no_rope_layers` one layer in
            `no_rope_layer_interval`, by default in four, does not rotate.
        layers: number of layers.

    Raises:
        ValueError: the list is too short or no list, or a number is out of range.
    """
    given = config.get("no_rope_layers")
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) < layers:
            raise ValueError(
                f"config field no_rope_layers must have a 1 or a 0 for each of {layers} layers, got "
                f"{given!r:.80}."
            )
        return tuple(given[:layers])
    interval = config.get("no_rope_layer_interval", ROTATION_INTERVAL)
    if type(interval) is not int or not 1 <= interval <= MOST_LAYERS or layers > MOST_LAYERS:
        raise ValueError(
            f"config fields no_rope_layer_interval {interval!r} and num_hidden_layers {layers}: "
            f"expected numbers from 1 to {MOST_LAYERS}."
        )
    return rotated_at(interval, layers)


def rotated_at(interval: int, layers: int) -> tuple[int, ...]:
    """Return 1 for each layer, and 0 for the last of every `interval` layers.

    Args:
        interval: at least 1.
        layers: number of layers.
    """
    return tuple(int((layer + 1) % interval != 0) for layer in range(layers))
