"""The shape of a Llama-family decoder, read from and written to Hugging Face's config.json.

Both spellings are read: transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype). Written
is the spelling of 4, which every reader (transformers 4 and 5, vLLM, llama.cpp) understands. A field this file does
not know raises when it is set to anything, since it may mean another computation; what it knows to be harmless is kept
and written back.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from minilora.models.rope import Rope

# What the families differ in: their class in transformers, and its defaults for fields that config.json leaves out.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"class": "LlamaForCausalLM", "max_position_embeddings": 2048},
    "mistral": {
        "class": "MistralForCausalLM",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
# Fields only one family's class reads: for the other they would be ignored by transformers, so a value raises.
_ONLY = {"attention_bias": "llama", "mlp_bias": "llama", "sliding_window": "mistral"}

# Fields that never change the logits: kept, and written back by `to_hf`.
_HARMLESS = frozenset(
    "architectures transformers_version use_cache initializer_range pretraining_tp name_or_path return_dict "
    "output_hidden_states output_attentions torchscript id2label label2id problem_type task_specific_params "
    "tokenizer_class prefix is_llama_config unsloth_fixed unsloth_version transformers.js_config "
    "use_bfloat16 max_sequence_length torch_dtype dtype sep_token_id decoder_start_token_id max_length min_length "
    "do_sample temperature top_k top_p num_beams repetition_penalty length_penalty".split()
)
# Fields that change the logits (or the training) unless they have this value, which is all the decoder implements.
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0, "rope_interleaved": False}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches under transformers' names; 0 for a head field means "derive it", as null does in the file."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    dtype: str | None = None  # the checkpoint's, such as "bfloat16"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # harmless fields, written back

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            derived = name in ("num_key_value_heads", "head_dim") and value == 0
            if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and not derived):
                raise ValueError(f"config field {name} must be a positive whole number, got {value!r}.")
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}: give head_dim."
            )
        # frozen: derived fields are set once, here
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: each key head serves a whole group of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs of channels.")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a parsed config.json. ValueError for another architecture or a field that changes the result."""
        family = _family(config)
        known = {f.name for f in fields(cls)} - {"rope", "extra"}
        # null is not absent: Mistral without sliding_window has 4096, with null it has none
        values = {name: v for name, v in _FAMILIES[family].items() if name in known and name not in config}
        values |= {name: v for name, v in config.items() if name in known and v is not None}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values and f.name != "extra"]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: is this the config of a {family} model?")
        _reject_unknown(config, known, family)
        eos = values.get("eos_token_id")
        values |= {
            "rope": _rope(config, values.get("max_position_embeddings", cls.max_position_embeddings)),
            "dtype": config.get("dtype", config.get("torch_dtype")),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "extra": {name: value for name, value in config.items() if name in _HARMLESS - {"dtype", "torch_dtype"}},
        }
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers reads as the same model."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rope", "extra", "dtype")}
        own = {name: value for name, value in own.items() if _ONLY.get(name, self.model_type) == self.model_type}
        eos = self.eos_token_id
        return (
            dict(self.extra)
            | own
            | {
                "architectures": [_FAMILIES[self.model_type]["class"]],
                "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
                "hidden_act": _FIXED["hidden_act"],
                "rope_theta": self.rope.theta,
                "rope_scaling": self.rope.to_hf(),
                "torch_dtype": self.dtype,
            }
        )


_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
).split()


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    classes = config.get("architectures") or []
    known = {name: str(values["class"]) for name, values in _FAMILIES.items()}
    if family in known and all(name == known[family] for name in classes):
        return family
    raise ValueError(
        f"unknown architecture: model_type {family!r}, architectures {classes}. minilora's decoder reads "
        f"{', '.join(f'{name} ({cls})' for name, cls in known.items())}. Load other models with transformers "
        "(AutoModelForCausalLM.from_pretrained) and call ml.inject(model, ...) on them directly."
    )


def _reject_unknown(config: Mapping[str, Any], known: set[str], family: str) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(
            f"this checkpoint is already quantised (quant_method {method!r}): reading that is not supported yet. "
            "Give the 16-bit checkpoint and quantize='nf4'."
        )
    for name, required in _FIXED.items():
        if config.get(name, required) not in (required, None):
            raise ValueError(f"config field {name} is {config[name]!r}: minilora's decoder has {required!r} only.")
    for name, owner in _ONLY.items():
        if config.get(name) and owner != family:
            raise ValueError(f"config field {name} is {config[name]!r}, but a {family} model has no such field.")
    kind = "sliding_attention" if family == "mistral" and config.get("sliding_window", 4096) else "full_attention"
    if set(config.get("layer_types") or [kind]) != {kind}:
        raise ValueError(f"config field layer_types is {config['layer_types']}: minilora has {kind} in all layers.")
    read = known | _HARMLESS | _FIXED.keys() | {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
    for name, value in config.items():
        if name not in read and not name.startswith("_") and value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"config field {name} = {value!r} is unknown and may change the result: "
                "remove it from config.json if you know that it does not."
            )


def _rope(config: Mapping[str, Any], max_positions: int) -> Rope:
    theta = config.get("rope_theta") or Rope.theta
    spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    ropes = [Rope.from_hf(spelling, theta, max_positions) for spelling in spellings or [{}]]
    if ropes[0] != ropes[-1]:
        raise ValueError(
            f"config.json says two different rotations: rope_parameters {ropes[0]}, rope_scaling {ropes[1]}."
        )
    return ropes[0]
