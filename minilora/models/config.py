"""The shape of a decoder (Llama, Mistral, Qwen, Gemma 3), read from and written to Hugging Face's config.json.

Both spellings are read: transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype). Written
is the spelling of 4, which every reader (transformers 4 and 5, vLLM, llama.cpp) understands. A field this file does
not know raises when it is set to anything, since it may mean another computation; what it knows to be harmless is kept
and written back.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from minilora.models.rope_config import Rope

FULL, SLIDING = "full_attention", "sliding_attention"  # the kinds of a layer, as layer_types names them


@dataclass(frozen=True)
class Family:
    """What sets a family apart; the parts that decoder.py builds from the switches are explained there."""

    architecture: str  # its class in transformers
    defaults: dict[str, Any]  # its class's, for fields that config.json leaves out
    own: frozenset[str]  # fields that not every family's class reads: on another family a value raises
    fixed: dict[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})  # fields read with one value only
    qkv_bias: bool = False  # always, and none on o_proj
    qk_norm: bool = False
    gemma: bool = False  # norms by 1 + w, also after each block; GeGLU; scaled embeddings; a RoPE per kind of layer


_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_QWEN_WINDOW = frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"})
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        frozenset({"sliding_window"}),
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, _QWEN_WINDOW, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, _QWEN_WINDOW | {"attention_bias"}, qk_norm=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
        | {"tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        | {"query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        frozenset("attention_bias sliding_window layer_types sliding_window_pattern".split())
        | {"query_pre_attn_scalar", "rope_local_base_freq"},
        {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        qk_norm=True,
        gemma=True,
    ),
}

# Fields that never change the logits: kept, and written back by `to_hf`.
_HARMLESS = frozenset(
    "architectures transformers_version use_cache initializer_range pretraining_tp name_or_path return_dict "
    "output_hidden_states output_attentions torchscript id2label label2id problem_type task_specific_params "
    "tokenizer_class prefix is_llama_config unsloth_fixed unsloth_version transformers.js_config "
    "use_bfloat16 max_sequence_length torch_dtype dtype sep_token_id decoder_start_token_id max_length min_length "
    "do_sample temperature top_k top_p num_beams repetition_penalty length_penalty cache_implementation".split()
)
# Fields that change the logits (or the training) unless they have this value, which is all the decoder implements.
_FIXED = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0, "rope_interleaved": False}


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
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it …
    layer_types: tuple[str, ...] = ()  # … in the layers of kind SLIDING; (): in all, if there is a window
    rope_local_base_freq: float | None = None  # RoPE's θ in the SLIDING layers, unscaled; None: `rope` there too
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
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
        _check_sizes(vars(self))
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
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"config field sliding_window must be null or at least 1, got {window!r}.")
        kinds = self.layer_types or (FULL if window is None else SLIDING,) * self.num_hidden_layers
        object.__setattr__(self, "layer_types", kinds)
        if len(kinds) != self.num_hidden_layers or set(kinds) - {FULL} - ({SLIDING} if window else set()):
            raise ValueError(
                f"layer_types must name the kind of each of {self.num_hidden_layers} layers, {FULL} or (with a "
                f"sliding_window; it is {window}) {SLIDING}; got {list(kinds)}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs of channels.")

    @property
    def family(self) -> Family:
        """What sets this model's family apart."""
        return FAMILIES[self.model_type]

    def rope_of(self, kind: str) -> Rope:
        """The rotation in layers of the kind FULL or SLIDING."""
        return Rope(self.rope_local_base_freq) if kind == SLIDING and self.rope_local_base_freq else self.rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a parsed config.json. ValueError for another architecture or a field that changes the result."""
        model_type = _model_type(config)
        family = FAMILIES[model_type]
        if family.gemma:
            config = _one_rope(config, family)
        known = {f.name for f in fields(cls)} - {"rope", "extra"}
        # null is not absent: Mistral without sliding_window has 4096, with null it has none
        values = {name: v for name, v in family.defaults.items() if name in known and name not in config}
        values |= {name: v for name, v in config.items() if name in known and v is not None}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values and f.name != "extra"]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: is this the config of a {model_type} model?")
        _reject_unknown(config, known, family)
        _check_sizes(values)
        eos = values.get("eos_token_id")
        values |= _windows(config, values) | {
            "rope": _rope(config, family, values.get("max_position_embeddings", cls.max_position_embeddings)),
            "dtype": config.get("dtype", config.get("torch_dtype")),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "extra": {name: value for name, value in config.items() if name in _HARMLESS - {"dtype", "torch_dtype"}},
        }
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers reads as the same model."""
        family, eos = self.family, self.eos_token_id
        derived = {
            "layer_types": list(self.layer_types),
            "use_sliding_window": self.sliding_window is not None,
            "max_window_layers": self.layer_types.count(FULL),  # for readers from before layer_types
        }
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rope", "extra", "dtype")}
        own = {name: value for name, value in (own | derived).items() if name not in _OWN or name in family.own}
        return (
            dict(self.extra)
            | own
            | family.fixed
            | {
                "architectures": [family.architecture],
                "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
                "rope_theta": self.rope.theta,
                "rope_scaling": self.rope.to_hf(),
                "torch_dtype": self.dtype,
            }
        )


_OWN = frozenset().union(*(family.own for family in FAMILIES.values()))
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
).split()


def _check_sizes(values: Mapping[str, Any]) -> None:
    for name in _SIZES:
        least = 0 if name in ("num_key_value_heads", "head_dim") else 1  # 0: derived
        value = values.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"config field {name} must be a positive whole number, got {value!r}.")


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    classes = config.get("architectures") or []
    if model_type in FAMILIES and all(name == FAMILIES[model_type].architecture for name in classes):
        return model_type
    raise ValueError(
        f"unknown architecture: model_type {model_type!r}, architectures {classes}. minilora's decoder reads "
        f"{', '.join(f'{name} ({family.architecture})' for name, family in FAMILIES.items())}. Other models go through "
        "transformers: model = AutoModelForCausalLM.from_pretrained(...), then ml.inject(model, ...) and all the rest."
    )


def _reject_unknown(config: Mapping[str, Any], known: set[str], family: Family) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(
            f"this config is of a quantised checkpoint (quant_method {method!r}), not of a dense decoder. load_model "
            "reads folders of bitsandbytes in NF4; for others give the 16-bit checkpoint and quantize='nf4'."
        )
    fixed = _FIXED | family.fixed
    for name, required in fixed.items():
        if config.get(name, required) not in (required, None):
            raise ValueError(f"config field {name} is {config[name]!r}: minilora's decoder has {required!r} only.")
    for name in sorted(_OWN - family.own - {"layer_types"}):
        if config.get(name):
            raise ValueError(f"config field {name} is {config[name]!r}, but {family.architecture} has no such field.")
    read = known | _HARMLESS | fixed.keys() | family.own | {"rope_theta", "rope_scaling", "rope_parameters"}
    for name, value in config.items():
        if name not in read and not name.startswith("_") and value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"config field {name} = {value!r} is unknown and may change the result: "
                "remove it from config.json if you know that it does not."
            )


MOST_LAYERS = 10_000  # far above any model: a list of so many costs nothing, of a billion all memory


def _windows(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `layer_types`. Qwen has a switch for the window, and none below layer max_window_layers.

    In Gemma 3 every sixth layer (or as sliding_window_pattern says) has none.
    """
    family, window = FAMILIES[config["model_type"]], values.get("sliding_window")
    first = 0
    if "use_sliding_window" in family.own:
        window = window if config.get("use_sliding_window") else None
        first = config.get("max_window_layers", 28)
        first = first if type(first) is int else -1  # refused below
    every = config.get("sliding_window_pattern", 6)
    counts = {"num_hidden_layers": values["num_hidden_layers"], "sliding_window_pattern": every}
    for name, value in (counts | {"max_window_layers": first + 1}).items():
        if type(value) is not int or not 1 <= value <= MOST_LAYERS:
            raise ValueError(f"config field {name} is out of the range of a model, 1 to {MOST_LAYERS}: {value!r}.")
    layers = range(values["num_hidden_layers"])
    kinds = [FULL if window is None or layer < first else SLIDING for layer in layers]
    if family.gemma:
        kinds = [SLIDING if (layer + 1) % every else FULL for layer in layers]
    given = config.get("layer_types") or kinds
    if given != kinds and "layer_types" not in family.own:
        raise ValueError(f"config field layer_types is {given}: a {config['model_type']} model has {kinds[0]} only.")
    return {"sliding_window": window, "layer_types": tuple(given)}


def _one_rope(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Transformers 5 gives each kind of layer its own rope_parameters; of those of SLIDING layers 4 has θ only."""
    by_kind = config.get("rope_parameters") or {}
    local = by_kind.get(SLIDING) or {}
    if by_kind.keys() - {FULL, SLIDING} or local.keys() - {"rope_type", "rope_theta"}:
        raise ValueError(f"rope_parameters {by_kind}: expected those of {FULL} and θ only of {SLIDING}.")
    theta = local.get("rope_theta") or config.get("rope_local_base_freq") or family.defaults["rope_local_base_freq"]
    return {**config, "rope_parameters": by_kind.get(FULL), "rope_local_base_freq": theta}


def _rope(config: Mapping[str, Any], family: Family, max_positions: int) -> Rope:
    theta = config.get("rope_theta") or family.defaults.get("rope_theta", Rope.theta)
    spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    ropes = [Rope.from_hf(spelling, theta, max_positions) for spelling in spellings or [{}]]
    if ropes[0] != ropes[-1]:
        raise ValueError(
            f"config.json says two different rotations: rope_parameters {ropes[0]}, rope_scaling {ropes[1]}."
        )
    return ropes[0]
