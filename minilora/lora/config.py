"""What to adapt and how: the fields and defaults of PEFT's LoraConfig, so that a tutorial's config runs unchanged.

PEFT's `adapter_config.json` has some forty fields. Those that minilora implements are the dataclass below; those that
would change the result and are not implemented raise when they are set, in Python and in a file alike. Nothing is
silently ignored: PEFT warns about an unknown key and goes on.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from minilora.common import check_options, nearest, option


class TaskType(StrEnum):
    """PEFT's task types; minilora trains CAUSAL_LM and SEQ_CLS, and carries the others in the file."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and which adapter. Fields and defaults are PEFT's; each says what it is for.

    Raises ValueError for a value outside its range or one that is not supported; TypeError for an unknown field.
    """

    r: int = option(8, "rank of the correction B A", low=1)
    lora_alpha: float = option(8, "its strength: B A is scaled by lora_alpha / r")
    lora_dropout: float = option(
        0.0, "probability of dropping an adapter's input (but ids) in training", low=0, below=1
    )
    target_modules: list[str] | str | None = option(
        None,
        'names or ends of names ("q_proj"), a regular expression for whole names, "all-linear" (every linear layer '
        "but the output layer), or None: q_proj and v_proj in a Llama, c_attn in GPT-2",
    )
    exclude_modules: list[str] | str | None = option(None, "what to leave out again: names, or a regular expression")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)")
    rank_pattern: dict[str, int] = option({}, "{end of a name or regular expression: r}, the first that fits", low=1)
    alpha_pattern: dict[str, float] = option({}, "the same for lora_alpha")
    layers_to_transform: list[int] | int | None = option(None, "only layers of these numbers")
    layers_pattern: list[str] | str | None = option(None, "the name that the layer number follows (layers, h)")
    use_dora: bool = option(False, "the rows of W + s B A take lengths that train by themselves (DoRA)")
    init_lora_weights: bool | str = option(
        True,
        'True: A uniform, B zero; "gaussian": A normal, deviation 1/r; "pissa" or "pissa_niter_N": s B A begins as the '
        'best approximation of W, found exactly or in N iterations; "loftq": of what 4 bits lose of W',
    )
    loftq_config: dict[str, int] = option({}, 'of "loftq": {"loftq_bits": 4, "loftq_iter": 1}', low=1)
    lora_bias: bool = option(False, "a bias trains with each B: W x + s (B A x + b)")
    bias: str = option(
        "none",
        'biases that train too: "none", "all", or "lora_only", those of the adapted layers',
        choices=("none", "all", "lora_only"),
    )
    modules_to_save: list[str] | None = option(None, "modules that train and are saved whole: names or ends of names")
    tie: str | None = option(
        None,
        "for what shares its weight, as an embedding and the output layer may: "
        '"shared", one update for all that share it, or "untie", for the named one alone',
        choices=("shared", "untie"),
    )
    task_type: str | None = option(TaskType.CAUSAL_LM.value, "carried into the file", choices=tuple(TaskType))
    base_model_name_or_path: str | None = option(None, "carried into the file; None takes the model's")
    revision: str | None = option(None, "carried into the file")
    inference_mode: bool = option(False, "carried by PEFT's files; changes nothing")

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), (set, tuple, frozenset)):
                object.__setattr__(self, name, sorted(getattr(self, name)))
        object.__setattr__(self, "task_type", getattr(self.task_type, "value", self.task_type))
        check_options(self)
        if not all((self.lora_alpha, *self.alpha_pattern.values())):
            raise ValueError("lora_alpha: expected a number that is not 0, at which an adapter does nothing.")
        self._check_start()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform and would do nothing.")
        numbered = self.layers_pattern if isinstance(self.layers_pattern, list) else [self.layers_pattern]
        for text in (self.target_modules, self.exclude_modules, *self.rank_pattern, *self.alpha_pattern, *numbered):
            try:
                re.compile(text if isinstance(text, str) else "")
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}. Any text is .*, not *.") from error

    def _check_start(self) -> None:  # raises for what A and B cannot begin as
        how, settings = self.init_lora_weights, {"loftq_bits": 4, "loftq_iter": 1} | self.loftq_config
        if how is not True and not re.fullmatch(r"gaussian|loftq|pissa(_niter_\d+)?", str(how)):
            raise ValueError(f"init_lora_weights: not one of True, gaussian, pissa, pissa_niter_N, loftq: {how!r}.")
        if self.use_dora and self.begins_from_weight:
            raise ValueError(f"use_dora with init_lora_weights={how!r}: each changes what the other starts from.")
        if self.lora_bias and (how is not True or self.use_dora):
            raise ValueError(f"lora_bias: PEFT has it without use_dora and with init_lora_weights=True, got {how!r}.")
        if self.loftq_config and (how != "loftq" or len(settings) > 2 or settings["loftq_bits"] != 4):
            raise ValueError(f"loftq_config: expected loftq_bits=4, loftq_iter, for {how!r}; got {self.loftq_config}.")

    @property
    def begins_from_weight(self) -> bool:
        """Whether A and B begin as something that W says: PiSSA, LoftQ."""
        return self.init_lora_weights not in (True, "gaussian")

    def strength(self, path: str) -> tuple[int, float]:
        """r and lora_alpha of the layer `path`, by the first pattern that fits it."""
        r = next((r for key, r in self.rank_pattern.items() if fits_pattern(key, path)), self.r)
        return r, next((a for key, a in self.alpha_pattern.items() if fits_pattern(key, path)), self.lora_alpha)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """A config from the contents of a PEFT `adapter_config.json`.

        A field that minilora does not implement is accepted when it is null, false, empty or PEFT's default, and
        raises ValueError when it would change the result.
        """
        values = dict(values)
        if values.pop("ensure_weight_tying", False):
            values["tie"] = "shared"  # without it PEFT adapts what is named and nothing else, as None does for a file
        if values.get("init_lora_weights") in (False, "orthogonal"):
            del values["init_lora_weights"]  # how A and B began, and no more: the base is as it was
        values.pop("loftq_config", None)  # the same, and PEFT leaves it there for any start
        if (peft_type := values.pop("peft_type", "LORA")) != "LORA":
            raise ValueError(f"peft_type: expected 'LORA', got {peft_type!r}: minilora reads LoRA adapters only.")
        known = {f.name for f in fields(cls)}
        for name in set(values) - known:
            if not _is_neutral(name, value := values.pop(name)):
                raise ValueError(
                    f"adapter config field {name!r} = {value!r} would change the result and is not supported. "
                    f"Nearest supported fields: {', '.join(nearest(name, known))}."
                )
        present: dict[str, Any] = {"task_type": None} | {n: v for n, v in values.items() if v is not None}
        return cls(**present)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `adapter_config.json`: PEFT's names, lists sorted, so that equal configs give equal bytes."""
        values = asdict(self)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(values[name], list):
                values[name] = sorted(values[name])
        if values.pop("tie") == "shared":
            values["ensure_weight_tying"] = True
        if not values["lora_bias"]:
            del values["lora_bias"]  # readers older than the field stay content
        return {"peft_type": "LORA"} | values | {"inference_mode": True, "fan_in_fan_out": False}


# Fields of PEFT's file that hold something in every file and change nothing for a plain LoRA adapter.
_PEFT_DEFAULTS = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "fan_in_fan_out": True,  # written for Conv1D; the stored A and B have the same shapes either way
}


def _is_neutral(name: str, value: Any) -> bool:
    return name in ("peft_version", "auto_mapping") or not value or _PEFT_DEFAULTS.get(name) == value


def fits_pattern(key: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is for the layer `path`: PEFT's rule."""
    return re.match(rf"(.*\.)?({key})$", path) is not None
