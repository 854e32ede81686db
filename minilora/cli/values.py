"""Values of options, read by the types of the fields that they are for: from the command line, or from a TOML file.

    minilora train run.toml --learning_rate 1e-4

A TOML file holds the options of `train` under their own names, `model` and `dataset` among them; tables only group
them. What follows on the command line wins.
"""

import argparse
import json
import tomllib
from collections.abc import Collection
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import minilora as ml
from minilora.common import unknown

CONFIGS = (ml.LoRAConfig, ml.TrainConfig)
MAPPINGS = ("rank_pattern", "alpha_pattern")  # fields whose value is a table


def from_toml(path: Path, known: Collection[str]) -> list[str]:
    """The file as arguments of `train`. ValueError for what is no TOML, or a name that is no option."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}.") from error
    values: dict[str, Any] = {}
    for name, value in content.items():
        values |= value if isinstance(value, dict) and name not in MAPPINGS else {name: value}
    for name in values:
        if name not in known:
            raise unknown(f"{path}", name, known)
    if missing := {"model", "dataset"} - values.keys():
        raise ValueError(f"{path}: {' and '.join(sorted(missing))} missing: what to train, and on what?")
    first = [str(values.pop("model")), str(values.pop("dataset"))]
    mixed = [part for pair in values.pop("mix", ()) for part in ("--mix", *map(str, pair))]
    return [*first, *mixed, *(f"--{name}={_text(value)}" for name, value in values.items())]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def add_fields(group: Any, config: type, names: Collection[str] | None = None) -> None:
    """One option for each field (of `names`), without a default: what is not given is not passed on."""
    hints = get_type_hints(config)
    for f in (f for f in fields(config) if names is None or f.name in names):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = f"default {default}" if default is not MISSING else "required"
        text = f.metadata["help"].replace("%", "%%")
        group.add_argument(
            f"--{f.name}",
            type=partial(_read, hint=hints[f.name]),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{text} ({default})",
        )


def _read(text: str, hint: Any) -> Any:
    try:
        return parse_value(text, hint)
    except ValueError:
        expected = hint.__name__ if isinstance(hint, type) else hint
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def parse_value(text: str, hint: Any) -> Any:
    """`text` as a value of the type `hint`: 8, 1e-4, true, none, q_proj,v_proj, all-linear, {"q_proj": 4}.

    Where both a list of names and a text are allowed, commas or a plain name make a list; "all-linear" and anything
    with a regular expression's characters stay text. ValueError for what cannot be read so.
    """
    alone = get_origin(hint) in (dict, list)
    kinds = [get_origin(kind) or kind for kind in ((hint,) if alone else get_args(hint) or (hint,))]
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if dict in kinds:
        return json.loads(text)
    if kinds == [list]:
        return text.split(",")
    if list in kinds and int in kinds:
        numbers = [int(part) for part in text.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]
    if list in kinds and text != "all-linear" and text.replace(",", "").replace("_", "").replace(".", "").isalnum():
        return text.split(",")
    for kind in (int, float):
        if kind in kinds:
            return kind(text)
    if str in kinds:
        return text
    raise ValueError(f"expected {hint}, got {text!r}.")
