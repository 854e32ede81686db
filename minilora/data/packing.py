"""Packing: many short examples in one row, so that little of a row is padding.

    best-fit decreasing: sort by length, longest first; put each example into the fullest bin that
    has room for it, else into a new bin

The result needs at most 11/9 of the fewest bins possible, plus 6/9 of one. Only the different
amounts of room are searched, in a sorted list whose length max_length bounds: one bisection an
example, so O(n log n) comparisons.

A packed row is an Example too. Each document in it has positions from 0 and its own document id,
and its first token is not supervised: the model computes for a document exactly what it computes
for the document alone.

Source: Johnson 1974; Dósa 2007 (tight bound).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.loss_mask import IGNORE, Example


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return bins of indices into `lengths`, each of at most `room` tokens together.

    Args:
        lengths: tokens of each example.
        room: tokens of a bin.

    Raises:
        ValueError: an example is longer than a bin.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room left, sorted
    with_room: dict[int, list[int]] = {}  # amount of room left → the bins that have it
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for index in longest_first:
        length = lengths[index]
        if length > room:
            raise ValueError(
                f"packing: example {index} has {length} tokens, expected at most max_length {room}."
            )
        at = bisect_left(rooms, length)
        if at < len(rooms):
            left = rooms[at]
            number = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        else:
            left = room
            number = len(bins)
            bins.append([])
        bins[number].append(index)
        remaining = left - length
        if remaining not in with_room:
            insort(rooms, remaining)
        with_room.setdefault(remaining, []).append(number)
    return bins


@dataclass(frozen=True)
class PackedDataset(Sequence[Example]):
    """Examples in rows of at most `room` tokens; a row is joined on access.

    Attributes:
        examples: the examples.
        bins: indices of the examples of each row.
        lengths: tokens of each row.
        room: most tokens of a row.
    """

    examples: Sequence[Example]
    bins: list[list[int]]
    lengths: list[int]
    room: int

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: Any) -> Any:
        return join([self.examples[i] for i in self.bins[index]])

    def __str__(self) -> str:
        padding = 1 - sum(self.lengths) / (len(self) * self.room)
        return (
            f"{len(self.examples)} examples in {len(self)} rows of {self.room} tokens, "
            f"{padding:.1%} of them padding"
        )


def pack(examples: Sequence[Example], lengths: Sequence[int], room: int) -> PackedDataset:
    """Return the examples in rows.

    Args:
        examples: the examples.
        lengths: tokens of each example.
        room: most tokens of a row.
    """
    bins = best_fit(lengths, room)
    row_lengths = []
    for indices in bins:
        row_lengths.append(sum(lengths[index] for index in indices))
    return PackedDataset(examples, bins, row_lengths, room)


def join(documents: Sequence[Example]) -> Example:
    """Return several documents as one row; a document's first token is not supervised.

    Args:
        documents: the examples.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        input_ids += document.input_ids
        labels += [IGNORE, *document.labels[1:]]
    return Example(
        input_ids=input_ids,
        labels=labels,
        row=documents[0].row,
        documents=tuple((document.row, len(document)) for document in documents),
    )
