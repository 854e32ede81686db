"""Sequences: their types, their order by length, and tables of text."""

from collections.abc import Sequence, Sized
from typing import Any


def is_list_of(value: Any, kind: Any) -> bool:
    """Return True for a list in which every item has a type. An empty list counts.

    Args:
        value: Any value, such as one that was read from a file.
        kind: The type of the items, or a union of types.
    """
    if not isinstance(value, list):
        return False
    return all(isinstance(item, kind) for item in value)


def order_by_length(rows: Sequence[Sized], longest_first: bool = True) -> list[int]:
    """Return the numbers of the rows, sorted by the length of the row.

    Rows of similar length share a batch, which saves padding. Rows of equal length keep their
    order.

    Args:
        rows: The rows, such as token ids.
        longest_first: Sort from the longest to the shortest; False sorts the other way.
    """

    def length_of(index: int) -> int:
        return len(rows[index])

    return sorted(range(len(rows)), key=length_of, reverse=longest_first)


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the number of characters of the longest cell of each column.

    Args:
        rows: The cells of each row; every row has the same number of cells.
    """
    widths = []
    for column in zip(*rows, strict=True):
        widths.append(max(len(cell) for cell in column))
    return widths


def comma_separated(text: str | None) -> list[str]:
    """Return the names in a text that commas separate, without spaces and empty names.

    Args:
        text: The text, or None for no names.
    """
    names = []
    for part in (text or "").split(","):
        name = part.strip()
        if name:
            names.append(name)
    return names
