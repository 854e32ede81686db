"""What a sample task is: chat rows for training, chat rows held out, and where they come from.

A row is `{"messages": [system, user, assistant]}` like any other dataset minilora reads. The system turn is a short
fixed instruction: it says what the task is and keeps chat templates from adding a longer greeting of their own.

Rows are split by group, never one by one. Siblings ("..., right eye", "..., left eye") on both sides of a split
would measure memory; with whole groups held out the held-out rows are about things the training rows do not name.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows held out, the closed set of answers (None if free), and the source with its licence."""

    name: str
    train: list[Row]
    test: list[Row]
    labels: list[str] | None
    source: str


def chat_row(instruction: str, question: str, answer: str) -> Row:
    """One exchange in the `messages` shape."""
    turns = (("system", instruction), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def question_of(row: Row) -> str:
    """What the last user turn says."""
    return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")


def answer_of(row: Row) -> str:
    """What the last turn, the assistant's, says."""
    return row["messages"][-1]["content"]


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The numbers below `count` in groups, also through a third: the connected components of `pairs`, by union-find."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, j in pairs:
        parent[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def split_by_group(groups: Sequence[Sequence[Row]], test_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test): `test_rows` groups, drawn by `seed`, are held out; the rows of all others are trained on.

    Of a held-out group only the first row is used. So no two held-out rows are siblings, they are independent
    draws, and a binomial confidence interval over them means what it says.
    """
    if not 0 < test_rows < len(groups):
        raise ValueError(f"test_rows is {test_rows}, expected 1 to {len(groups) - 1}: one of each held-out group")
    rng = random.Random(seed)
    order = list(range(len(groups)))
    rng.shuffle(order)
    test = [groups[index][0] for index in order[:test_rows]]
    train = [row for index in order[test_rows:] for row in groups[index]]
    rng.shuffle(train)
    return train, test
