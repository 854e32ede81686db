"""Columns of any name → the keys of a known shape.

    columns={"prompt": "ticket", "completion": "answer"}      --columns prompt=ticket,completion=answer

The mapped keys decide the shape of the rows: it is the first of SHAPES that has all of them. Keys
that would make a row one of another shape are dropped, so a mapped column is never ignored. All
other columns stay, under their own names.
"""

from collections.abc import Mapping, Sequence

from minilora.common import unknown_name
from minilora.data.chat.values import present
from minilora.data.formats import SHAPES, known_shapes
from minilora.data.read_rows import Row

# The forms of preference data have the keys of other shapes next to their two answers.
PREFERENCE = frozenset({"prompt", "messages", "conversations", "instruction", "input", "system"})
LABEL = frozenset({"label"})  # of classification


def known_keys() -> list[str]:
    """Return every key that a row of a known shape can have."""
    keys = {"label"}
    for required, optional in SHAPES.values():
        keys |= required | optional
    return sorted(keys)


def map_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Return rows whose columns have the keys of a known shape.

    Args:
        rows: the rows.
        columns: key of a known shape → column of the rows.

    Raises:
        ValueError: a key belongs to no shape, no row has a column, a column is mapped twice, or no
            shape has all the keys.
    """
    keys = known_keys()
    for key in columns:
        if key not in keys:
            raise unknown_name("columns: the key", key, keys)
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns: {dict(columns)} maps one column to two keys.")
    distinct: dict[str, None] = {}
    for row in rows:
        distinct |= dict.fromkeys(map(str, row))
    existing = list(distinct)
    for key, column in columns.items():
        if column not in existing:
            raise ValueError(
                f"columns: there is no column {column!r} for {key!r}. The columns are "
                f"{', '.join(existing)}."
            )
    kept = _keys_of_shape(columns, existing)
    return [_mapped(row, columns, kept) for row in rows]


def _keys_of_shape(columns: Mapping[str, str], existing: Sequence[str]) -> frozenset[str]:
    """Return the keys of the shape that the mapped rows have."""
    names = (set(existing) - set(columns.values())) | columns.keys()
    for shape, (required, optional) in SHAPES.items():
        keys = required | optional | LABEL
        if shape == "preference":
            keys |= PREFERENCE
        if columns.keys() <= keys and required <= names:
            return keys
    raise ValueError(
        f"columns: with the keys {', '.join(columns)} and the columns {', '.join(existing)}, the "
        f"rows match no known shape. Expected one of: {known_shapes()}."
    )


def _mapped(row: Row, columns: Mapping[str, str], kept: frozenset[str]) -> Row:
    """Return a row with mapped names, without the keys of other shapes."""
    mapped = {}
    others = set(known_keys()) - kept
    for name, value in row.items():
        if name not in columns.values() and name not in columns and name not in others:
            mapped[name] = value
    for key, column in columns.items():
        if column in present(row):
            mapped[key] = row[column]
    return mapped
