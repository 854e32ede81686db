"""Sequences: their types, their order by length, and tables of text."""

from collections.abc import Sequence, Sized
from typing import Any

BATCH_TOKENS = 4096  # of a batch whose number of rows is not given
MOST_ROWS = 256  # of a batch of short rows: each row needs memory for the logits of one token


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


def batches_by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return the numbers of the rows in batches of similar length, the longest rows first.

    A batch has many short rows or few long ones.

    Args:
        lengths: Tokens of each row.
        most: Largest number of tokens of a batch that is padded to its longest row. A longer row is
            a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0  # tokens of the longest row of the last batch
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        rows = len(batches[-1]) if batches else MOST_ROWS
        if rows == MOST_ROWS or (rows + 1) * width > most:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def batch_tokens(lengths: Sequence[int], rows: int | None) -> int:
    """Return the largest number of tokens of a batch, for `batches_by_tokens`.

    Args:
        lengths: Tokens of each row.
        rows: Number of rows of the greatest length that fit. None stands for 4,096 tokens.
    """
    if rows is None:
        return BATCH_TOKENS
    return rows * max(lengths, default=0)


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
