"""The shape of a decoder of a family (families.py), read from and written to config.json.

Both spellings are read: transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5
(rope_parameters, dtype). The spelling of 4 is written, which every reader (transformers 4 and 5,
vLLM, llama.cpp) understands. An unknown field that is set raises an error, because it may change
the computation; fields that never change it are kept and written back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from minilora.models.families import (
    FAMILIES,
    FULL,
    SLIDING,
    Family,
    layer_windows,
    rotated_layers,
)
from minilora.models.rope_config import Rope

# Fields that never change the logits: kept, and written back by `to_hf`.
_HARMLESS = frozenset(
    "architectures transformers_version use_cache initializer_range pretraining_tp name_or_path "
    "return_dict output_hidden_states output_attentions torchscript id2label label2id problem_type "
    "task_specific_params tokenizer_class prefix is_llama_config unsloth_fixed unsloth_version "
    "transformers.js_config use_bfloat16 max_sequence_length torch_dtype dtype sep_token_id "
    "decoder_start_token_id max_length min_length do_sample temperature top_k top_p num_beams "
    "repetition_penalty length_penalty cache_implementation".split()
)
# Fields that change the logits or the training; the decoder implements this value only.
_FIXED = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0, "rope_interleaved": False}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder under transformers' names.

    Attributes:
        vocab_size: words, V.
        hidden_size: width of the residual stream, D.
        intermediate_size: width inside the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads.
        num_key_value_heads: key heads; 0 is as many as query heads.
        head_dim: channels of a head; 0 is hidden_size / num_attention_heads.
        max_position_embeddings: longest context in tokens.
        rms_norm_eps: ε of the norms.
        rope: the rotation.
        sliding_window: in layers of kind SLIDING, a token attends to itself and the
            sliding_window - 1 tokens before it; None is no window.
        layer_types: kind of each layer; () is SLIDING for all layers if there is a window.
        no_rope_layers: of each layer, 1 if it rotates q and k and 0 if not; () is 1 for all layers.
            The name is that of transformers.
        rope_local_base_freq: θ of the rotation in SLIDING layers, unscaled; None is `rope`.
        query_pre_attn_scalar: scores are divided by its root; None is head_dim.
        attention_bias: biases on q, k, v and o.
        mlp_bias: biases in the MLP.
        tie_word_embeddings: the output layer shares the embedding's weight.
        model_type: a key of FAMILIES.
        dtype: dtype of the checkpoint, such as "bfloat16".
        bos_token_id: id of BOS.
        eos_token_id: id or ids of EOS.
        pad_token_id: id of the padding token.
        extra: fields of config.json that never change the logits, written back.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    no_rope_layers: tuple[int, ...] = ()
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_sizes(vars(self))
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}: give head_dim."
            )
        # The dataclass is frozen: derived fields are set once, here.
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        object.__setattr__(self, "head_dim", head_dim)
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", kv_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: each key head serves a whole group "
                "of query heads."
            )
        self._set_layer_types()
        self._check_rotated_layers()
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs of channels.")

    def _set_layer_types(self) -> None:
        """Derive and check the kind of each layer."""
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(
                f"config field sliding_window must be null or at least 1, got {window!r}."
            )
        default = FULL if window is None else SLIDING
        kinds = self.layer_types or (default,) * self.num_hidden_layers
        object.__setattr__(self, "layer_types", kinds)
        allowed = {FULL, SLIDING} if window else {FULL}
        if len(kinds) != self.num_hidden_layers or set(kinds) - allowed:
            raise ValueError(
                f"layer_types must name the kind of each of {self.num_hidden_layers} layers, {FULL} "
                f"or (with a sliding_window; it is {window}) {SLIDING}; got {list(kinds)}."
            )

    def _check_rotated_layers(self) -> None:
        """Derive and check which layers rotate q and k."""
        rotated = self.no_rope_layers or (1,) * self.num_hidden_layers
        object.__setattr__(self, "no_rope_layers", rotated)
        if len(rotated) != self.num_hidden_layers or set(rotated) - {0, 1}:
            raise ValueError(
                f"no_rope_layers must have a 1 (the layer rotates q and k) or a 0 for each of "
                f"{self.num_hidden_layers} layers, got {list(rotated)}."
            )

    @property
    def family(self) -> Family:
        """Family of the model."""
        return FAMILIES[self.model_type]

    def rope_of(self, kind: str) -> Rope:
        """Return the rotation in layers of a kind.

        Args:
            kind: FULL or SLIDING.
        """
        if kind == SLIDING and self.rope_local_base_freq:
            return Rope(self.rope_local_base_freq)
        return self.rope

    def of_layers(self, numbers: Sequence[int]) -> "DecoderConfig":
        """Return the config of a model that has some of the layers.

        Args:
            numbers: the numbers of the layers, in their new order.
        """
        return replace(
            self,
            num_hidden_layers=len(numbers),
            layer_types=tuple(self.layer_types[i] for i in numbers),
            no_rope_layers=tuple(self.no_rope_layers[i] for i in numbers),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read a parsed config.json.

        Args:
            config: the content of config.json.

        Raises:
            ValueError: the architecture is unknown, or a field changes the result.
        """
        model_type = _model_type(config)
        family = FAMILIES[model_type]
        if family.gemma:
            config = _one_rope(config, family)
        known = {f.name for f in fields(cls)} - {"rope", "extra"}
        values = _known_values(config, family, known)
        missing = []
        for f in fields(cls):
            required = f.default is MISSING and f.name != "extra"
            if required and f.name not in values:
                missing.append(f.name)
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}: is this the config of a {model_type} model?"
            )
        _reject_unknown(config, known, family)
        _check_sizes(values)
        if family.skips_rope:
            values["no_rope_layers"] = rotated_layers(config, values["num_hidden_layers"])
        values |= layer_windows(config, values)
        max_positions = values.get("max_position_embeddings", cls.max_position_embeddings)
        values["rope"] = _rope(config, family, max_positions)
        values["dtype"] = config.get("dtype", config.get("torch_dtype"))
        eos = values.get("eos_token_id")
        values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else eos
        kept = _HARMLESS - {"dtype", "torch_dtype"}
        values["extra"] = {name: value for name, value in config.items() if name in kept}
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers reads as the same model."""
        family = self.family
        values: dict[str, Any] = {}
        for f in fields(self):
            if f.name not in ("rope", "extra", "dtype"):
                values[f.name] = getattr(self, f.name)
        values["layer_types"] = list(self.layer_types)
        values["no_rope_layers"] = list(self.no_rope_layers)
        values["use_sliding_window"] = self.sliding_window is not None
        # For readers older than layer_types.
        values["max_window_layers"] = self.layer_types.count(FULL)
        foreign = _OWN - family.own
        values = {name: value for name, value in values.items() if name not in foreign}
        eos = self.eos_token_id
        return {
            **self.extra,
            **values,
            **family.fixed,
            "architectures": [family.architecture],
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
            "torch_dtype": self.dtype,
        }


_OWN = frozenset().union(*(family.own for family in FAMILIES.values()))
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def _known_values(config: Mapping[str, Any], family: Family, known: set[str]) -> dict[str, Any]:
    """Return the known fields that are set, and the family's defaults of absent ones.

    null differs from absent: Mistral without sliding_window has 4096, with null it has no window.
    """
    values = {}
    for name, value in family.defaults.items():
        if name in known and name not in config:
            values[name] = value
    for name, value in config.items():
        if name in known and value is not None:
            values[name] = value
    return values


def _check_sizes(values: Mapping[str, Any]) -> None:
    for name in _SIZES:
        least = 0 if name in ("num_key_value_heads", "head_dim") else 1  # 0: derived
        value = values.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"config field {name} must be a positive whole number, got {value!r}.")


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    classes = config.get("architectures") or []
    if model_type in FAMILIES and all(
        name == FAMILIES[model_type].architecture for name in classes
    ):
        return model_type
    known = [f"{name} ({family.architecture})" for name, family in FAMILIES.items()]
    raise ValueError(
        f"unknown architecture: model_type {model_type!r}, architectures {classes}. minilora's "
        f"decoder reads {', '.join(known)}. Load another model with transformers: "
        "model = AutoModelForCausalLM.from_pretrained(...), then ml.inject(model, ...) and all the "
        "rest."
    )


def _reject_unknown(config: Mapping[str, Any], known: set[str], family: Family) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(
            f"this config is of a quantised checkpoint (quant_method {method!r}), not of a dense "
            "decoder. load_model reads folders of bitsandbytes in NF4; for others give the 16-bit "
            "checkpoint and quantize='nf4'."
        )
    fixed = _FIXED | family.fixed
    for name, required in fixed.items():
        if config.get(name, required) not in (required, None):
            raise ValueError(
                f"config field {name} is {config[name]!r}: minilora's decoder has {required!r} only."
            )
    for name in sorted(_OWN - family.own - {"layer_types"}):
        if config.get(name):
            raise ValueError(
                f"config field {name} is {config[name]!r}, but {family.architecture} has no such "
                "field."
            )
    ropes = {"rope_theta", "rope_scaling", "rope_parameters"}
    read = known | _HARMLESS | fixed.keys() | family.own | ropes
    for name, value in config.items():
        if name in read or name.startswith("_"):
            continue
        if value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"config field {name} = {value!r} is unknown and may change the result: "
                "remove it from config.json if you know that it does not."
            )


def _one_rope(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the config with one rotation and θ of the SLIDING layers, as transformers 4 writes it.

    transformers 5 has rope_parameters for each kind of layer.
    """
    by_kind = config.get("rope_parameters") or {}
    local = by_kind.get(SLIDING) or {}
    if by_kind.keys() - {FULL, SLIDING} or local.keys() - {"rope_type", "rope_theta"}:
        raise ValueError(
            f"rope_parameters {by_kind}: expected those of {FULL} and θ only of {SLIDING}."
        )
    theta = local.get("rope_theta") or config.get("rope_local_base_freq")
    theta = theta or family.defaults["rope_local_base_freq"]
    return {**config, "rope_parameters": by_kind.get(FULL), "rope_local_base_freq": theta}


def _rope(config: Mapping[str, Any], family: Family, max_positions: int) -> Rope:
    theta = config.get("rope_theta") or family.defaults.get("rope_theta", Rope.theta)
    spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    ropes = [Rope.from_hf(spelling, theta, max_positions) for spelling in spellings or [{}]]
    if ropes[0] != ropes[-1]:
        raise ValueError(
            f"config.json has two different rotations: rope_parameters {ropes[0]}, rope_scaling "
            f"{ropes[1]}."
        )
    return ropes[0]
