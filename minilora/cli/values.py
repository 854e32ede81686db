"""Option values, read by the types of the fields that they set, and options from TOML files.

    minilora train --config run.toml --learning_rate 1e-4

A TOML file holds the options of a command under their own names, its positional arguments among
them; its tables only group the options. Options on the command line replace those of the file.
"""

import argparse
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import minilora as ml
from minilora.common import unknown_name

CONFIGS = (ml.LoRAConfig, ml.TrainConfig)
MAPPINGS = (
    "rank_pattern",
    "alpha_pattern",
    "chat_template_kwargs",
    "columns",
)  # fields whose value is a table

EXPECTED = {  # the values of a type, for errors
    bool: "true or false",
    int: "a whole number",
    float: "a number such as 1e-4",
    str: "text",
    list: "names with commas between them",
    dict: "a JSON object",
    type(None): "none",
}


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Return the options of a TOML file by name.

    Args:
        path: the file.
        known: the names of the command's options and positional arguments.

    Raises:
        ValueError: the file is not TOML, or has an unknown name.
        OSError: the file does not exist or cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--config: {path} does not exist. Expected a .toml file of options; paths begin at "
            f"{Path.cwd()}."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}.") from error
    values = {}
    for written, value in _without_tables(content).items():
        name = written.replace("-", "_")
        if name not in known:
            raise unknown_name(f"{path}", written, known)
        values[name] = value
    return values


def as_words(action: argparse.Action, name: str, value: Any) -> list[str]:
    """Return an option of a TOML file as words of a command line.

    Args:
        action: the option.
        name: its name, without dashes.
        value: its value in the file.

    Raises:
        ValueError: the option has no value on the command line, and the file gives one that is
            neither true nor false.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}.")
        return [f"--{name}"] if value else []
    if not isinstance(action, argparse._AppendAction):
        return [f"--{name}={_as_argument(value)}"]
    words = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(action.nargs, int):
            words += [f"--{name}", *map(_as_argument, entry)]
        else:
            words.append(f"--{name}={_as_argument(entry)}")
    return words


def _without_tables(content: dict[str, Any]) -> dict[str, Any]:
    """Return name → value of all options; a table groups options unless its name is a field."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and name not in MAPPINGS:
            values |= value
        else:
            values[name] = value
    return values


def _as_argument(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def add_fields(
    group: Any, config: type, names: Collection[str] | None = None
) -> dict[str, argparse.Action]:
    """Add one option for each field of a configuration.

    The options have no default: an option that is not given is not passed on.

    Args:
        group: a parser or an argument group.
        config: a dataclass whose fields have a help text in their metadata.
        names: the fields to add; None adds all.

    Returns:
        The added options, by the name of the field.
    """
    hints = get_type_hints(config)
    added = {}
    for field in fields(config):
        if names is not None and field.name not in names:
            continue
        text = field.metadata["help"].replace("%", "%%")
        shown = field.metadata.get("shown")
        if not shown:
            shown = _value_text(hints[field.name], field.metadata.get("choices", ()))
        added[field.name] = group.add_argument(
            f"--{field.name}",
            type=partial(_read, hint=hints[field.name]),
            default=argparse.SUPPRESS,
            metavar=shown,
            help=f"{text} ({_default_text(field)})",
        )
    return added


def add_objectives(parser: argparse.ArgumentParser, objectives: Mapping[str, type]) -> None:
    """Add one option for each field of the objectives.

    A field that several objectives have is one option. Its help names the later ones, and the
    objective that is chosen checks its value.

    Args:
        parser: the parser of the command.
        objectives: a dataclass for each name of `--objective`.
    """
    added: dict[str, argparse.Action] = {}
    for name, kind in objectives.items():
        new = [field.name for field in fields(kind) if field.name not in added]
        for field in fields(kind):
            if field.name in added:
                _share(added[field.name], name, field)
        if new:
            group = parser.add_argument_group(f"--objective {name} ({kind.__name__})")
            added |= add_fields(group, kind, new)


def _share(action: argparse.Action, name: str, field: Field) -> None:
    """Add the help and the choices of another objective's field to an option."""
    text = field.metadata["help"].replace("%", "%%")
    if text not in (action.help or ""):
        action.help = f"{action.help}; with {name}: {text} ({_default_text(field)})"
    known = str(action.metavar).strip("{}").split(",")
    further = [str(choice) for choice in field.metadata.get("choices", ())]
    if further:
        choices = dict.fromkeys([*known, *further])
        action.metavar = "{" + ",".join(choices) + "}"


def _value_text(hint: Any, choices: Collection[str]) -> str:
    """Return the kind of an option's value, as the help shows it."""
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    kinds = _kinds(hint)
    if dict in kinds:
        return "JSON"
    if list in kinds:
        return "A,B"
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    return "|".join(name for kind, name in names.items() if kind in kinds)


def _default_text(field: Field) -> str:
    if field.default_factory is not MISSING:
        return f"default {field.default_factory()}"
    if field.default is not MISSING:
        return f"default {field.default}"
    return "required"


def _read(text: str, hint: Any) -> Any:
    """Return parse_value's result, or the error that argparse expects."""
    try:
        return parse_value(text, hint)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {_expected(hint)}, got {text!r}") from None


def _expected(hint: Any) -> str:
    """Return the values that a type accepts, in words."""
    words = [EXPECTED[kind] for kind in _kinds(hint) if kind in EXPECTED]
    return " or ".join(words)


def parse_value(text: str, hint: Any) -> Any:
    """Return `text` as a value of a type.

    Examples: 8, 1e-4, true, none, q_proj,v_proj, all-linear, {"q_proj": 4}.

    Where both a list of names and a text are allowed, commas or a plain name make a list;
    "all-linear" and anything with a regular expression's characters stay text.

    Args:
        text: the value as written.
        hint: the type hint of the field.

    Returns:
        The value.

    Raises:
        ValueError: the text is not a value of that type.
    """
    kinds = _kinds(hint)
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
    if list in kinds and _is_names(text):
        return text.split(",")
    for kind in (int, float):
        if kind in kinds:
            return kind(text)
    if str in kinds:
        return text
    raise ValueError(f"expected {hint}, got {text!r}.")


def _kinds(hint: Any) -> list[Any]:
    """Return the members of a type hint: list[str] | None → [list, NoneType]."""
    if get_origin(hint) in (dict, list):
        members = (hint,)
    else:
        members = get_args(hint) or (hint,)
    return [get_origin(member) or member for member in members]


def _is_names(text: str) -> bool:
    """Return True for names between commas, False for "all-linear" and regular expressions."""
    letters = text.replace(",", "").replace("_", "").replace(".", "")
    return text != "all-linear" and letters.isalnum()
