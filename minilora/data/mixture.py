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
    pairs = list(parts.items() if isinstance(parts, Mapping) else parts)
    weights = [Fraction(str(weight)) for _, weight in pairs if 0 < weight < float("inf")]
    if not pairs or len(weights) < len(pairs):
        given = [weight for _, weight in pairs]
        raise ValueError(
            f"mix_datasets: expected (dataset, weight) pairs with weights above 0, got {given}."
        )
    datasets = [read_dataset(dataset) for dataset, _ in pairs]
    names = [_name(dataset, number) for number, (dataset, _) in enumerate(pairs)]
    if rows is None:
        rows = _most_rows([len(dataset) for dataset in datasets], weights)
    counts = shares(rows, weights)
    if min(counts) < 1:
        name = names[counts.index(min(counts))]
        raise ValueError(
            f"mix_datasets: {name} has no share in {rows} rows: raise rows, or leave it out."
        )
    mixed = []
    for index, (dataset, count, name) in enumerate(zip(datasets, counts, names, strict=True)):
        rng = random.Random(f"{seed} {index}")
        while count > 0:
            chosen = rng.sample(dataset, min(count, len(dataset)))
            mixed += [SourcedRow(row, name) for row in chosen]
            count -= len(dataset)
    random.Random(seed).shuffle(mixed)
    return mixed


def _name(dataset: Any, number: int) -> str:
    return str(dataset) if isinstance(dataset, str | Path) else f"set {number}"


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
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    rounded_down_by = [share - count for share, count in zip(exact, counts, strict=True)]
    order = sorted(range(len(weights)), key=rounded_down_by.__getitem__, reverse=True)
    for index in order[: total - sum(counts)]:
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
    drawn = [_drawn(row, index, by, seed) for index, row in enumerate(rows)]  # each in [0, 1)
    limit = float(test)  # of the drawn numbers of held-out rows, exclusive
    if is_count:
        limit = [*sorted(drawn), 1.0][min(int(test), len(rows))]
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
