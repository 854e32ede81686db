"""What needs no model: the commonest answer, and the answer of the most similar training row.

A model that was trained must beat both, else it learned nothing that a table lookup does not know.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from minilora.evaluation.samples.task import Row, answer_of, question_of


def majority_class(train: list[Row], test: list[Row]) -> float:
    """Accuracy on `test` of always giving the commonest answer of `train` (of equals, the one seen first)."""
    _need_rows(train, test)
    commonest = Counter(map(answer_of, train)).most_common(1)[0][0]
    return sum(answer_of(row) == commonest for row in test) / len(test)


def nearest_neighbour(train: list[Row], test: list[Row]) -> float:
    """Accuracy on `test` of 1-nearest-neighbour by word overlap; of equally near rows the first one answers."""
    near = [answer_of(train[int(overlap.argmax())]) for overlap in overlaps(train, test)]
    return sum(answer == answer_of(row) for answer, row in zip(near, test, strict=True)) / len(test)


def overlaps(train: list[Row], test: list[Row]) -> Iterator[Any]:
    """For each row of `test` an array (train,): |a ∩ b| / |a ∪ b| of its question's set of words and each other's.

    Words are looked up in an inverted index: 500 × 4,600 rows take a fraction of a second.
    """
    import numpy as np  # here: `import minilora` is to stay light

    _need_rows(train, test)
    bags = [_words(question_of(row)) for row in train]
    sizes = np.array([len(bag) for bag in bags])  # (train,)
    found: dict[str, list[int]] = {}
    for index, bag in enumerate(bags):
        for word in bag:
            found.setdefault(word, []).append(index)
    rows_with = {word: np.array(indices) for word, indices in found.items()}
    for row in test:
        bag = _words(question_of(row))
        shared = np.zeros(len(train))  # (train,)
        for word in bag & rows_with.keys():
            shared[rows_with[word]] += 1
        yield shared / np.maximum(sizes + len(bag) - shared, 1)  # (train,)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _need_rows(train: list[Row], test: list[Row]) -> None:
    if not train or not test:
        raise ValueError(f"a baseline needs rows on both sides; got {len(train)} to learn from, {len(test)} to score")
