"""Many short examples in one row: best-fit decreasing, so that little of a row is padding.

    sort by length, longest first; each example goes into the fullest bin that still has room, else into a new one

At most 11/9 of the fewest bins possible, and 6/9 of one (Johnson 1974; Dósa 2007). Only the different amounts of room
are searched, in a sorted list that max_length bounds: one bisection an example, so O(n log n) comparisons.

A packed row is an Example as well. Each document in it keeps positions from 0 and an id of its own, and its first token
trains nothing: what the model computes of a document is what it computes of it alone.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.loss_mask import IGNORE, Example


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each at most `room` together. ValueError if one is longer than that."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room left, sorted
    with_room: dict[int, list[int]] = {}  # room left: the bins that have it
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if (length := lengths[index]) > room:
            raise ValueError(f"packing: example {index} has {length} tokens, expected at most max_length {room}.")
        at = bisect_left(rooms, length)
        if at < len(rooms):
            left = rooms[at]
            number = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        else:
            left, number = room, len(bins)
            bins.append([])
        bins[number].append(index)
        if left - length not in with_room:
            insort(rooms, left - length)
        with_room.setdefault(left - length, []).append(number)
    return bins


@dataclass(frozen=True)
class PackedDataset(Sequence[Example]):
    """Examples in rows of at most `room` tokens; a row is joined when it is asked for. `str` says how full they are."""

    examples: Sequence[Example]
    bins: list[list[int]]
    lengths: list[int]  # of the rows
    room: int

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: Any) -> Any:
        return join([self.examples[i] for i in self.bins[index]])

    def __str__(self) -> str:
        padding = 1 - sum(self.lengths) / (len(self) * self.room)
        return f"{len(self.examples)} examples in {len(self)} rows of {self.room} tokens, {padding:.1%} of them padding"


def pack(examples: Sequence[Example], lengths: Sequence[int], room: int) -> PackedDataset:
    """The examples, `lengths` long, in rows of at most `room` tokens."""
    bins = best_fit(lengths, room)
    return PackedDataset(examples, bins, [sum(lengths[i] for i in found) for found in bins], room)


def join(documents: Sequence[Example]) -> Example:
    """One row of several documents; nothing is learned from one about the next."""
    return Example(
        input_ids=[token for document in documents for token in document.input_ids],
        labels=[label for document in documents for label in (IGNORE, *document.labels[1:])],
        row=documents[0].row,
        documents=tuple((document.row, len(document)) for document in documents),
    )
