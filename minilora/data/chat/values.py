"""Nested values of a row: absent values, and JSON that is stored as text.

    absent       None: Arrow gives every nested dict the keys of all other rows; NaN and NA of pandas
    JSON text    "[…]" or "{…}": most published datasets store tools and arguments so, and every CSV

A null inside the JSON text of tools, tool calls or arguments stays: nothing fills keys into a text,
so its author wrote it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

PANDAS_MISSING = ("NAType", "NaTType")  # the types of pandas.NA and pandas.NaT


class Decoded(dict[str, Any]):
    """A dict that was decoded from JSON text, so its nulls are values and stay."""


def kind_of(value: Any) -> str:
    """Return the name of a value's type, for errors.

    Args:
        value: any value.
    """
    return "dict" if isinstance(value, dict) else type(value).__name__


def is_absent(value: Any) -> bool:
    """Return True for None, NaN and the missing values of pandas.

    Args:
        value: any value.
    """
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return type(value).__name__ in PANDAS_MISSING


def present(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries of a dict that are not absent; nested values stay as they are.

    Args:
        row: a row, or another dict.
    """
    return {key: value for key, value in row.items() if not is_absent(value)}


def plain(value: Any) -> Any:
    """Return a nested value as dicts, lists and scalars, without the absent entries of its dicts.

    A list keeps its length: an absent element is None.

    Args:
        value: a value of Python, numpy (a list in a DataFrame is an array) or a mix of them.
    """
    if isinstance(value, Decoded):
        return value
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in present(value).items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if is_absent(value) else value


def parse(value: Any, where: str) -> Any:
    """Return the value of a JSON text, or any other value unchanged.

    Args:
        value: a text, or a value that needs no decoding.
        where: the row and the name of the value, for errors.

    Returns:
        The value; None for a blank text, which is an empty cell of a CSV.

    Raises:
        ValueError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is a text, and it is not JSON: {error}: {value[:60]!r}. "
            "Write it with json.dumps, or give the value itself."
        ) from error


def from_json(value: Any, where: str) -> Any:
    """Return the value of a JSON text with its nulls, or any other value unchanged.

    Args:
        value: a text, or a value that needs no decoding.
        where: the row and the name of the value, for errors.

    Raises:
        ValueError: the text is not JSON.
    """
    return _keep_nulls(parse(value, where)) if isinstance(value, str) else value


def _keep_nulls(value: Any) -> Any:
    """Return a decoded value whose dicts keep their nulls, but not NaN, which is not JSON."""
    if isinstance(value, dict):
        entries = {}
        for key, entry in value.items():
            if entry is None or not is_absent(entry):
                entries[key] = _keep_nulls(entry)
        return Decoded(entries)
    if isinstance(value, list):
        return [_keep_nulls(entry) for entry in value]
    return value
