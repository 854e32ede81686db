"""What to adapt and how: the fields and defaults of PEFT's LoraConfig, so that a tutorial's config runs unchanged.

PEFT's `adapter_config.json` has some forty fields. Those that minilora implements are the dataclass below; those that
would change the result and are not implemented raise when they are set, in Python and in a file alike. Nothing is
silently ignored: PEFT warns about an unknown key and goes on.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from minilora.names import nearest


class TaskType(StrEnum):
    """PEFT's task types; minilora trains CAUSAL_LM and SEQ_CLS, and carries the others in the file."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def _option(default: Any, help: str) -> Any:
    default = {"default_factory": dict} if default == {} else {"default": default}
    return field(**default, metadata={"help": help})


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and which adapter. Fields and defaults are PEFT's; each says what it is for.

    Raises ValueError for a value outside its range or one that is not supported; TypeError for an unknown field.
    """

    r: int = _option(8, "rank of the correction B A")
    lora_alpha: float = _option(8, "its strength: B A is scaled by lora_alpha / r")
    lora_dropout: float = _option(0.0, "probability with which an adapter's input (but ids) is dropped in training")
    target_modules: list[str] | str | None = _option(
        None,
        'names or ends of names ("q_proj"), a regular expression for whole names, "all-linear" (every linear layer '
        "but the output layer), or None: q_proj and v_proj in a Llama, c_attn in GPT-2",
    )
    exclude_modules: list[str] | str | None = _option(None, "what to leave out again: names, or a regular expression")
    use_rslora: bool = _option(False, "scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)")
    rank_pattern: dict[str, int] = _option({}, "{end of a name or regular expression: r}; the first that fits wins")
    alpha_pattern: dict[str, float] = _option({}, "the same for lora_alpha")
    layers_to_transform: list[int] | int | None = _option(None, "only layers of these numbers")
    layers_pattern: list[str] | str | None = _option(None, "the name that the layer number follows (layers, h)")
    init_lora_weights: bool | str = _option(True, 'True: A uniform, B zero; "gaussian": A normal, deviation 1/r')
    lora_bias: bool = _option(False, "a bias trains with each B: W x + s (B A x + b)")
    bias: str = _option("none", 'biases that train too: "none", "all", or "lora_only", those of the adapted layers')
    modules_to_save: list[str] | None = _option(None, "modules that train and are saved whole: names or ends of names")
    tie: str | None = _option(
        None,
        "for what shares its weight, as an embedding and the output layer may: "
        '"shared", one update for all that share it, or "untie", for the named one alone',
    )
    task_type: str | None = _option(TaskType.CAUSAL_LM.value, "carried into the file")
    base_model_name_or_path: str | None = _option(None, "carried into the file; None takes the model's")
    revision: str | None = _option(None, "carried into the file")
    inference_mode: bool = _option(False, "carried by PEFT's files; changes nothing")

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), (set, tuple, frozenset)):
                object.__setattr__(self, name, sorted(getattr(self, name)))
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise ValueError(f"r: expected a whole number of at least 1, got {r!r}.")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
                raise ValueError(f"lora_alpha: expected a finite number that is not 0, got {alpha!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {self.lora_dropout!r}.")
        if self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(f'init_lora_weights: expected True or "gaussian", got {self.init_lora_weights!r}.')
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'bias: expected "none", "all" or "lora_only", got {self.bias!r}.')
        if self.tie not in (None, "shared", "untie"):
            raise ValueError(f'tie: expected None, "shared" or "untie", got {self.tie!r}.')
        if self.lora_bias and self.init_lora_weights is not True:
            raise ValueError(
                f"lora_bias: PEFT has it with init_lora_weights=True only, got {self.init_lora_weights!r}."
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save: expected a list of names, got the string {self.modules_to_save!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform and would do nothing.")
        object.__setattr__(self, "task_type", getattr(self.task_type, "value", self.task_type))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """A config from the contents of a PEFT `adapter_config.json`.

        A field that minilora does not implement is accepted when it is null, false, empty or PEFT's default, and
        raises ValueError when it would change the result.
        """
        values = dict(values)
        if values.pop("ensure_weight_tying", False):
            values["tie"] = "shared"  # without it PEFT adapts what is named and nothing else, as None does for a file
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
        return {"peft_type": "LORA"} | values | {"inference_mode": True, "use_dora": False, "fan_in_fan_out": False}


# Fields of PEFT's file that hold something in every file and change nothing for a plain LoRA adapter.
_PEFT_DEFAULTS = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "fan_in_fan_out": True,  # written for Conv1D; the stored A and B have the same shapes either way
}


def _is_neutral(name: str, value: Any) -> bool:
    return name in ("peft_version", "auto_mapping") or not value or _PEFT_DEFAULTS.get(name) == value
