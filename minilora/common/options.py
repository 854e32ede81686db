"""Fields of a dataclass with a type, limits and a help text, which are checked."""

import math
import os
from collections.abc import Mapping
from dataclasses import field, fields
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from minilora.common.suggestions import nearest

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    list[str]: "a list of names",
    list[int]: "a list of whole numbers",
    dict[str, int]: "a dict of whole numbers",
    dict[str, float]: "a dict of finite numbers",
    dict[str, list[int]]: "a dict of lists of whole numbers",
    dict[str, Any]: "a dict",
}


def option(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    choices: tuple = (),
    shown: str = "",
) -> Any:
    """Return a dataclass field with a help text and the values that it may have.

    `check_options` checks the limits. In a dict they hold for each value.

    Args:
        default: The default value.
        help: The meaning of the field, for error messages and the command line.
        low: Smallest value.
        high: Largest value.
        above: Every value is larger than this.
        below: Every value is smaller than this.
        choices: The only values; empty allows any value.
        shown: The values, as the help of the command line shows them; empty shows the type.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    start: dict[str, Any] = {"default": default}
    if default == {}:
        start = {"default_factory": dict}
    return field(**start, metadata={"help": help, "shown": shown} | bounds)


class Options:
    """Base class of dataclasses of options: an unknown name raises with the nearest names."""

    def __new__(cls, *args: Any, **options: Any):
        """Refuse unknown names here: the TypeError of `__init__` does not name the nearest ones."""
        known = [field.name for field in fields(cast(Any, cls))]
        for name in options:
            if name not in known:
                suggestions = ", ".join(nearest(name, known))
                raise TypeError(f"{cls.__name__} has no field {name!r}. Nearest: {suggestions}.")
        return super().__new__(cls)


def check_options(config: Any) -> None:
    """Convert the `option` fields of a frozen dataclass to their types and check them.

    Args:
        config: The dataclass instance. Its fields are changed in place (int → float, path → str).

    Raises:
        ValueError: A value has the wrong type or is outside its range.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        if "choices" in f.metadata:
            value = _checked(f.name, getattr(config, f.name), hints[f.name], f.metadata)
            object.__setattr__(config, f.name, value)


def _checked(name: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
    """Return the value in the type of its field, or raise ValueError."""
    allowed = (hint,)
    if isinstance(hint, UnionType):
        allowed = get_args(hint)
    if value is None and type(None) in allowed:
        return None
    if str in allowed and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if float in allowed and type(value) is int:
        value = float(value)
    types = [kind for kind in allowed if kind is not type(None)]
    if not any(_has_type(value, kind) for kind in types):
        names = " or ".join(_TYPE_NAMES[kind] for kind in types)
        raise ValueError(f"{name}: expected {names}, got {value!r}. It is: {rules['help']}.")
    if rules["choices"] and value not in rules["choices"]:
        choices = ", ".join(map(str, rules["choices"]))
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")
    numbers = value.values() if isinstance(value, dict) else [value]
    for number in numbers:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            _check_range(name, number, rules)
    return value


def _check_range(name: str, number: float, rules: Mapping[str, Any]) -> None:
    """Raise ValueError if a number is outside the limits of its field."""
    in_closed_range = rules["low"] <= number <= rules["high"]
    if in_closed_range and rules["above"] < number < rules["below"]:
        return
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    limits = []
    for key, sign in signs.items():
        if math.isfinite(rules[key]):
            limits.append(f"{sign} {rules[key]:g}")
    expected = " and ".join(limits)
    raise ValueError(f"{name}: expected {expected}, got {number!r}. It is: {rules['help']}.")


def _has_type(value: Any, kind: Any) -> bool:
    """Return True if a value, and each element that it contains, has a type of `_TYPE_NAMES`."""
    if get_origin(kind) is list:
        (item_kind,) = get_args(kind)
        return isinstance(value, list) and all(_has_type(item, item_kind) for item in value)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            return False
        key_kind, item_kind = get_args(kind)
        item_kinds = [item_kind]
        if item_kind is float:
            item_kinds.append(int)  # a whole number is a number too
        return all(
            _has_type(key, key_kind) and any(_has_type(item, k) for k in item_kinds)
            for key, item in value.items()
        )
    if kind is Any:
        return True
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind
