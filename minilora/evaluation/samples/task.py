"""A sample task: chat rows for training, held-out chat rows, and their source.

A row is `{"messages": [system, user, assistant]}`, like any dataset that minilora reads. The system
turn is a short fixed instruction: it names the task, and it stops chat templates from adding a
longer default.

Rows are split by groups. Similar rows ("..., right eye", "..., left eye") on both sides of a split
would measure memory; with whole groups held out, the training rows do not name the held-out topics.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Task:
    """Rows of a task.

    Attributes:
        name: name of the task.
        train: rows to train on.
        test: held-out rows.
        labels: the closed set of answers; None if answers are free.
        source: origin of the data, with its licence.
    """

    name: str
    train: list[Row]
    test: list[Row]
    labels: list[str] | None
    source: str


def chat_row(instruction: str, question: str, answer: str) -> Row:
    """Return one exchange in the `messages` shape.

    Args:
        instruction: system turn.
        question: user turn.
        answer: assistant turn.
    """
    turns = (("system", instruction), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def question_of(row: Row) -> str:
    """Return the content of the last user turn.

    Args:
        row: a chat row.
    """
    questions = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    return questions[-1]


def answer_of(row: Row) -> str:
    """Return the content of the last turn, the assistant's.

    Args:
        row: a chat row.
    """
    return row["messages"][-1]["content"]


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of a graph, by union-find.

    Args:
        count: number of nodes.
        pairs: edges between nodes 0 … count - 1.

    Returns:
        Groups of node numbers.
    """
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


def split_by_group(
    groups: Sequence[Sequence[Row]], test_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Hold out some groups; return the training rows and the held-out rows.

    Of a held-out group only the first row is used. So held-out rows are independent draws, and a
    binomial confidence interval over them is valid.

    Args:
        groups: rows that belong together.
        test_rows: number of groups to hold out.
        seed: seed of the draw.

    Returns:
        Rows to train on, held-out rows.

    Raises:
        ValueError: `test_rows` is not between 1 and the number of groups - 1.
    """
    if not 0 < test_rows < len(groups):
        raise ValueError(
            f"test_rows is {test_rows}, expected 1 to {len(groups) - 1}: one of each held-out group"
        )
    rng = random.Random(seed)
    order = list(range(len(groups)))
    rng.shuffle(order)
    test = [groups[index][0] for index in order[:test_rows]]
    train = [row for index in order[test_rows:] for row in groups[index]]
    rng.shuffle(train)
    return train, test
