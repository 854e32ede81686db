"""LoRAConfig: the settings of an adapter, with the fields and defaults of PEFT's LoraConfig.

A config from a PEFT tutorial therefore runs unchanged. PEFT's `adapter_config.json` has about forty
fields. The dataclass below has those that minilora implements. Any other field raises an error if
its value would change the result, in Python and in a file. PEFT itself warns about an unknown field
and continues.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from minilora.common import Options, check_options, nearest, option

_LIST_FIELDS = ("target_modules", "exclude_modules", "modules_to_save")


class TaskType(StrEnum):
    """PEFT's task types. minilora trains CAUSAL_LM and SEQ_CLS, and stores the others in files."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class LoRAConfig(Options):
    """The layers that get an adapter, and the hyperparameters of the adapter.

    Names and defaults are PEFT's. The text of each `option` below is the field's documentation; the
    command line and error messages show the same text.

    Raises:
        ValueError: A value is outside its range or not supported.
        TypeError: A field is unknown.
    """

    r: int = option(8, "rank of the correction B A", low=1)
    lora_alpha: float = option(8, "strength of the correction: B A is scaled by lora_alpha / r")
    lora_dropout: float = option(
        0.0,
        "probability of setting an element of an adapter's input to zero in training "
        "(token ids are never dropped)",
        low=0,
        below=1,
    )
    target_modules: list[str] | str | None = option(
        None,
        'names or ends of names ("q_proj"), a regular expression for whole names, "all-linear" '
        "(every linear layer but the output layer), or None for the default of the model's type: "
        "q_proj and v_proj for Llama, c_attn for GPT-2",
    )
    exclude_modules: list[str] | str | None = option(
        None, "layers to leave out of target_modules: names, or a regular expression"
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) (rank-stabilised LoRA)")
    rank_pattern: dict[str, int] = option(
        {},
        "{end of a name or regular expression: r}; the first pattern that matches a layer is used",
        low=1,
    )
    alpha_pattern: dict[str, float] = option({}, "the same as rank_pattern, for lora_alpha")
    layers_to_transform: list[int] | int | None = option(
        None, "numbers of the layers to adapt; None adapts all"
    )
    layers_pattern: list[str] | str | None = option(
        None, "the part of a name before the layer number (layers, h)"
    )
    use_dora: bool = option(False, "train the lengths of the rows of W + s B A separately (DoRA)")
    init_lora_weights: bool | str = option(
        True,
        'initial values. True: A uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. '
        '"pissa" or "pissa_niter_N": s B A is the best approximation of W, found exactly or in N '
        'iterations. "loftq": s B A approximates the error of quantising W to 4 bits',
        shown="true|gaussian|pissa|pissa_niter_N|loftq",
    )
    loftq_config: dict[str, int] = option(
        {}, 'settings of "loftq": {"loftq_bits": 4, "loftq_iter": 1}', low=1
    )
    lora_bias: bool = option(False, "train a bias b with each B: W x + s (B A x + b)")
    bias: str = option(
        "none",
        'biases of the model that are trained: "none", "all", or "lora_only" (biases of adapted '
        "layers)",
        choices=("none", "all", "lora_only"),
    )
    modules_to_save: list[str] | None = option(
        None, "modules that are trained and saved completely: names or ends of names"
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None,
        "ids of tokens whose rows of the embedding train, or {end of a layer's name: ids}; a layer "
        "that shares the embedding's weight shares the rows",
    )
    tie: str | None = option(
        None,
        "treatment of layers that share one weight, as an embedding and the output layer may: "
        '"shared" trains one update for all of them, "untie" changes the named layer alone',
        choices=("shared", "untie"),
    )
    task_type: str | None = option(
        None,
        "stored in the file; None stores CAUSAL_LM for a causal language model, and else nothing",
        choices=tuple(TaskType),
    )
    base_model_name_or_path: str | None = option(
        None, "stored in the file; None stores the name of the model"
    )
    revision: str | None = option(None, "stored in the file")
    inference_mode: bool = option(False, "present in PEFT's files; changes nothing")

    def __post_init__(self):
        for name in _LIST_FIELDS:
            value = getattr(self, name)
            if isinstance(value, (set, tuple, frozenset)):
                object.__setattr__(self, name, sorted(value))
        task_type = getattr(self.task_type, "value", self.task_type)  # an enum member of PEFT
        object.__setattr__(self, "task_type", task_type)
        check_options(self)
        if not all((self.lora_alpha, *self.alpha_pattern.values())):
            raise ValueError(
                "lora_alpha: expected a number that is not 0. With 0 an adapter would do nothing."
            )
        self._check_token_indices()
        self._check_initialisation()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern is given without layers_to_transform and would do nothing."
            )
        self._check_regular_expressions()

    def _check_token_indices(self) -> None:
        """Raise ValueError for token ids that are negative, given twice, or none."""
        wanted = self.trainable_token_indices
        if wanted is None:
            return
        lists = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
        for indices in lists:
            if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
                raise ValueError(
                    "trainable_token_indices: expected different ids of tokens, 0 or more, "
                    f"got {indices!r}."
                )
        if not lists:
            raise ValueError("trainable_token_indices: expected ids of tokens, got {}.")

    def _check_initialisation(self) -> None:
        """Raise ValueError for initial values that are unknown or exclude another setting."""
        method = self.init_lora_weights
        known = re.fullmatch(r"gaussian|loftq|pissa(_niter_\d+)?", str(method))
        if method is not True and not known:
            raise ValueError(
                "init_lora_weights: not one of True, gaussian, pissa, pissa_niter_N, loftq: "
                f"{method!r}."
            )
        if self.use_dora and self.begins_from_weight:
            raise ValueError(
                f"use_dora with init_lora_weights={method!r}: "
                "each changes the starting point of the other. Use one of the two."
            )
        if self.lora_bias and (method is not True or self.use_dora):
            raise ValueError(
                "lora_bias: PEFT has it without use_dora and with init_lora_weights=True, "
                f"got {method!r}."
            )
        if self.loftq_config:
            settings = {"loftq_bits": 4, "loftq_iter": 1} | self.loftq_config
            if method != "loftq" or len(settings) > 2 or settings["loftq_bits"] != 4:
                raise ValueError(
                    f"loftq_config: expected loftq_bits=4, loftq_iter, for {method!r}; "
                    f"got {self.loftq_config}."
                )

    def _check_regular_expressions(self) -> None:
        """Raise ValueError for a pattern that is not a regular expression."""
        patterns: list[Any] = [self.target_modules, self.exclude_modules]
        patterns += [*self.rank_pattern, *self.alpha_pattern]
        if isinstance(self.layers_pattern, list):
            patterns += self.layers_pattern
        else:
            patterns.append(self.layers_pattern)
        for pattern in patterns:
            if not isinstance(pattern, str):
                continue
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is not a regular expression: {error}. "
                    "Write .* (not *) for any text."
                ) from error

    @property
    def begins_from_weight(self) -> bool:
        """True if the initial A and B are computed from W (PiSSA, LoftQ)."""
        return self.init_lora_weights not in (True, "gaussian")

    def strength(self, path: str) -> tuple[int, float]:
        """Return r and lora_alpha of one layer: of the first pattern that matches its name.

        Args:
            path: Name of the layer in the model.
        """
        r = _first_match(self.rank_pattern, path, self.r)
        lora_alpha = _first_match(self.alpha_pattern, path, self.lora_alpha)
        return r, lora_alpha

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """Create a config from the contents of a PEFT `adapter_config.json`.

        A field that minilora does not implement is accepted when it is null, false, empty or PEFT's
        default.

        Args:
            values: The parsed JSON object.

        Returns:
            The config.

        Raises:
            ValueError: A field that is not supported would change the result, or a value is outside
                its range.
        """
        values = dict(values)
        if values.pop("ensure_weight_tying", False):
            values["tie"] = "shared"  # without it PEFT adapts only the named layers, as None does
        if values.get("init_lora_weights") in _INITIAL_VALUES_ONLY:
            del values["init_lora_weights"]
        for name in _FIELDS_OF_TRAINING:
            values.pop(name, None)
        peft_type = values.pop("peft_type", "LORA")
        if peft_type != "LORA":
            raise ValueError(
                f"peft_type: expected 'LORA', got {peft_type!r}: minilora reads LoRA adapters only."
            )
        known = {f.name for f in fields(cls)}
        for name in set(values) - known:
            value = values.pop(name)
            if not _is_neutral(name, value):
                raise ValueError(
                    f"adapter config field {name!r} = {value!r} would change the result "
                    "and is not supported. "
                    f"Nearest supported fields: {', '.join(nearest(name, known))}."
                )
        return cls(**{name: value for name, value in values.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `adapter_config.json`.

        Names are PEFT's. Lists are sorted, so that equal configs give equal bytes.
        """
        values = asdict(self)
        for name in _LIST_FIELDS:
            if isinstance(values[name], list):
                values[name] = sorted(values[name])
        if values.pop("tie") == "shared":
            values["ensure_weight_tying"] = True
        for name in ("lora_bias", "trainable_token_indices"):
            if not values[name]:
                del values[name]  # older readers do not know these fields
        return {"peft_type": "LORA"} | values | {"inference_mode": True, "fan_in_fan_out": False}


# Methods of PEFT that choose the initial A and B and leave W as it is: a trained file is plain LoRA.
_INITIAL_VALUES_ONLY = (False, "orthogonal", "eva", "mica")
# Settings of initial values and of the backward pass. PEFT writes some of them for every method.
_FIELDS_OF_TRAINING = ("loftq_config", "eva_config", "velora_config")

# Fields that have a value in every file of PEFT and change nothing for a plain LoRA adapter.
_PEFT_DEFAULTS = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "fan_in_fan_out": True,  # written for Conv1D; the stored A and B have the same shapes
}


def _is_neutral(name: str, value: Any) -> bool:
    """Return True if a field that minilora does not know changes nothing at this value."""
    if name in ("peft_version", "auto_mapping") or not value:
        return True
    return _PEFT_DEFAULTS.get(name) == value


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the layer `path`, else the default."""
    for key, value in patterns.items():
        if fits_pattern(key, path):
            return value
    return default


def fits_pattern(key: str, path: str) -> bool:
    """Return True if a key of rank_pattern or alpha_pattern matches a layer, by PEFT's rule.

    Args:
        key: The end of a name, or a regular expression for it.
        path: Name of the layer in the model.
    """
    return re.match(rf"(.*\.)?({key})$", path) is not None
