"""Rows of several datasets by weight, and a dataset cut into a training and a test part.

    mix_datasets      rows · w_i / Σw rows of set i, to the row: rounded down, the rows left over go to the largest
                      remainders
    train_test_split  a row is held out where hash(seed, content or group) / 2^64 < test

A hash knows nothing of the other rows: what is held out stays held out when rows are added, equal rows lie on one side,
and so do all rows of a group. The share held out is therefore `test` on average only.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from minilora.data.formats import Row, read_dataset


class SourcedRow(dict):
    """A row that knows where it came from: `source`, which the report before training counts."""

    def __init__(self, row: Row, source: str):
        super().__init__(row)
        self.source = source


def mix_datasets(
    parts: Mapping[Any, float] | Sequence[tuple[Any, float]], rows: int | None = None, seed: int = 42
) -> list[SourcedRow]:
    """`rows` rows of several datasets, in proportion to their weights, shuffled; the same for the same seed.

    parts: (dataset, weight) pairs, or {path: weight}; a dataset is anything `train` takes. Weights are relative.
    rows: None takes as many as there are without repeating one. Of a set that has more rows than its share a seeded
        choice is taken; one that has fewer is gone through again, so that its rows come equally often, or once more.
    ValueError: no sets, a weight that is not above 0, a share that rounds to no row.
    """
    pairs = list(parts.items() if isinstance(parts, Mapping) else parts)
    weights = [Fraction(str(weight)) for _, weight in pairs if 0 < weight < float("inf")]
    if not pairs or len(weights) < len(pairs):
        raise ValueError(
            f"mix_datasets: expected (dataset, weight) pairs with weights above 0, got {[w for _, w in pairs]}."
        )
    sets = [read_dataset(dataset) for dataset, _ in pairs]
    names = [str(d) if isinstance(d, str | Path) else f"set {i}" for i, (d, _) in enumerate(pairs)]
    if rows is None:
        rows = int(min(len(found) * sum(weights) / weight for found, weight in zip(sets, weights, strict=True)))
    counts = shares(rows, weights)
    if (least := min(counts)) < 1:
        raise ValueError(
            f"mix_datasets: {names[counts.index(least)]} has no share in {rows} rows: raise rows, or leave it out."
        )
    mixed = []
    for index, (found, count, name) in enumerate(zip(sets, counts, names, strict=True)):
        rng = random.Random(f"{seed} {index}")
        while count > 0:
            mixed += [SourcedRow(row, name) for row in rng.sample(found, min(count, len(found)))]
            count -= len(found)
    random.Random(seed).shuffle(mixed)
    return mixed


def shares(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` in proportion to `weights`, in whole numbers (largest remainder; the first of equals)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def train_test_split(
    dataset: Any, test: float = 0.1, by: str | Callable[[Row], Any] = "hash", seed: int = 42
) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to test on) in the dataset's order; about `test` of them, or of the groups, held out.

    by: "hash" goes by a row's content. A key of the rows, or a function of a row, gives its group, which is never on
        both sides.
    ValueError: `test` not between 0 and 1, a row without the key, nothing on one side.
    """
    if not 0 < test < 1:
        raise ValueError(f"train_test_split: test is a share between 0 and 1, got {test}.")
    parts: tuple[list[Row], list[Row]] = [], []
    for index, row in enumerate(read_dataset(dataset)):
        group = row if by == "hash" else by(row) if callable(by) else row.get(by)
        if group is None:
            raise ValueError(f"train_test_split: row {index} has no {by!r}: its keys are {list(row)}.")
        text = json.dumps([seed, group], sort_keys=True, default=str)
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        parts[drawn < test].append(row)
    if not all(parts):
        held = len(parts[1])
        raise ValueError(
            f"train_test_split: {held} of {held + len(parts[0])} rows held out. Take another test share, seed or by."
        )
    return parts
