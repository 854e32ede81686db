"""Mixtures of several datasets by weight, and a split into a training and a test part.

    mix_datasets      set i gets rows · w_i / Σw rows: rounded down; the remaining rows go to the
                      largest remainders
    train_test_split  a row is held out where hash(seed, content or group) / 2^64 < test; or, for a
                      number of rows, the rows with the lowest hashes

The hash of a row does not depend on the other rows: held-out rows stay held out when rows are
added, equal rows are on one side, and so are all rows of a group. Therefore the held-out share is
`test` on average only. A number of rows is exact, except for equal rows and groups, which stay
together.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from minilora.data.read_rows import Row, read_dataset


class SourcedRow(dict):
    """A row of a mixture with the name of its dataset, which the report before training counts.

    Args:
        row: the row.
        source: name of its dataset.
    """

    def __init__(self, row: Row, source: str):
        super().__init__(row)
        self.source = source


def mix_datasets(
    parts: Mapping[Any, float] | Sequence[tuple[Any, float]],
    rows: int | None = None,
    seed: int = 42,
) -> list[SourcedRow]:
    """Return rows of several datasets, in proportion to their weights, shuffled.

    A dataset with more rows than its share gives a random choice. A dataset with fewer rows is
    repeated, so that each of its rows occurs equally often, or once more.

    Args:
        parts: (dataset, weight) pairs, or {path: weight}. A dataset is anything that `train` takes;
            weights are relative.
        rows: number of rows; None takes as many as possible without repeating a row.
        seed: seed of the choice and the order.

    Raises:
        ValueError: there are no datasets, a weight is not above 0, or a share rounds to no row.
    """
    pairs = list(parts.items()) if isinstance(parts, Mapping) else list(parts)
    weights = _fractions([weight for _, weight in pairs])
    datasets = []
    names = []
    for number, (dataset, _) in enumerate(pairs):
        datasets.append(read_dataset(dataset))
        names.append(_name(dataset, number))
    if rows is None:
        sizes = [len(dataset) for dataset in datasets]
        rows = _most_rows(sizes, weights)
    counts = shares(rows, weights)
    smallest = min(counts)
    if smallest < 1:
        name = names[counts.index(smallest)]
        raise ValueError(
            f"mix_datasets: {name} has no share in {rows} rows: raise rows, or leave it out."
        )
    mixed = []
    for index, dataset in enumerate(datasets):
        chosen = _choose(dataset, counts[index], random.Random(f"{seed} {index}"))
        for row in chosen:
            mixed.append(SourcedRow(row, names[index]))
    random.Random(seed).shuffle(mixed)
    return mixed


def _fractions(weights: Sequence[float]) -> list[Fraction]:
    """Return the weights as exact fractions.

    Raises:
        ValueError: there are no weights, or one is not above 0 and finite.
    """
    fractions = []
    for weight in weights:
        if 0 < weight < float("inf"):
            fractions.append(Fraction(str(weight)))
    if not weights or len(fractions) < len(weights):
        raise ValueError(
            f"mix_datasets: expected (dataset, weight) pairs with weights above 0, got {weights}."
        )
    return fractions


def _choose(dataset: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """Return `count` random rows; a dataset with fewer rows is repeated."""
    chosen: list[Row] = []
    while count > 0:
        size = min(count, len(dataset))
        chosen += rng.sample(dataset, size)
        count -= len(dataset)
    return chosen


def _name(dataset: Any, number: int) -> str:
    if isinstance(dataset, str | Path):
        return str(dataset)
    return f"set {number}"


def _most_rows(sizes: Sequence[int], weights: Sequence[Fraction]) -> int:
    """Return the largest number of rows of which no dataset has to repeat a row."""
    total = sum(weights)
    limits = []
    for size, weight in zip(sizes, weights, strict=True):
        limits.append(size * total / weight)
    return int(min(limits))


def shares(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Divide a number in proportion to weights, in whole numbers, by the largest remainders.

    Args:
        total: the number.
        weights: the weights.

    Returns:
        The shares; of equal remainders the first one counts.
    """
    counts = []
    remainders = []
    for weight in weights:
        share = total * weight / sum(weights)
        counts.append(int(share))
        remainders.append(share - int(share))
    order = sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)
    missing = total - sum(counts)
    for index in order[:missing]:
        counts[index] += 1
    return counts


def train_test_split(
    dataset: Any, test: float = 0.1, by: str | Callable[[Row], Any] = "hash", seed: int = 42
) -> tuple[list[Row], list[Row]]:
    """Split a dataset into rows to train on and held-out rows, both in its order.

    Args:
        dataset: anything that `train` takes.
        test: held-out share of the rows, or of the groups, between 0 and 1; or the number of rows.
        by: "hash" decides by a row's content. A key of the rows, or a function of a row, gives its
            group, which is never on both sides.
        seed: seed of the hash.

    Returns:
        Rows to train on, held-out rows.

    Raises:
        ValueError: `test` is out of range, a row lacks the key, or one side is empty.
    """
    is_count = isinstance(test, int) and not isinstance(test, bool) and test >= 1
    if not is_count and not 0 < test < 1:
        raise ValueError(
            f"train_test_split: test is a share between 0 and 1, or a number of rows, got {test}."
        )
    rows = read_dataset(dataset)
    drawn = []  # a number in [0, 1) for each row
    for index, row in enumerate(rows):
        drawn.append(_drawn(row, index, by, seed))
    limit = float(test)  # held-out rows have a drawn number below the limit
    if is_count:
        limits = [*sorted(drawn), 1.0]
        held_out = min(int(test), len(rows))
        limit = limits[held_out]
    train_rows: list[Row] = []
    test_rows: list[Row] = []
    for row, value in zip(rows, drawn, strict=True):
        if value < limit:
            test_rows.append(row)
        else:
            train_rows.append(row)
    if not train_rows or not test_rows:
        raise ValueError(
            f"train_test_split: {len(test_rows)} of {len(test_rows) + len(train_rows)} rows held "
            "out. Take another test share, a number of rows, or another seed or by."
        )
    return train_rows, test_rows


def _drawn(row: Row, index: int, by: str | Callable[[Row], Any], seed: int) -> float:
    """Return the number from 0 to 1 that the hash of a row's content or group gives."""
    group = _group(row, by)
    if group is None:
        raise ValueError(f"train_test_split: row {index} has no {by!r}: its keys are {list(row)}.")
    text = json.dumps([seed, group], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _group(row: Row, by: str | Callable[[Row], Any]) -> Any:
    if by == "hash":
        return row
    if callable(by):
        return by(row)
    return row.get(by)
