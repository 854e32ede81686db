"""The result of `evaluate`: figures over all rows, each row with its answer, and comparisons."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minilora.common import unknown_name, write_text
from minilora.common.notebook import html_table

SHOWN_CHARACTERS = 300  # of a text in the list of the worst rows


@dataclass(frozen=True)
class ScoredRow:
    """One row with a reference answer.

    Attributes:
        row: Number of the row in the dataset, from 0.
        prompt: The messages, or the raw text.
        expected: The reference answer.
        got: The greedy answer, or None if none was generated.
        choice: The likeliest label, or None without labels.
        scores: Value of each metric of this row.
    """

    row: int
    prompt: Any
    expected: str
    got: str | None
    choice: str | None
    scores: dict[str, float]

    def __str__(self) -> str:
        values = [f"{name} {value:.4g}" for name, value in self.scores.items()]
        question = _question(self.prompt)
        lines = [f"row {self.row}: {', '.join(values)}"]
        lines.append(f"  prompt    {_short(question)}")
        lines.append(f"  expected  {_short(self.expected)}")
        if self.got is not None:
            lines.append(f"  got       {_short(self.got)}")
        if self.choice is not None:
            lines.append(f"  label     {_short(self.choice)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values, without the figures that were not measured."""
        values = {}
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if value is not None:
                values[attribute.name] = value
        return values


def _question(prompt: Any) -> str:
    """Return the last message of a prompt, or the raw text."""
    if isinstance(prompt, str):
        return prompt
    last_message = prompt[-1]
    return str(last_message.get("content"))


def _short(text: str) -> str:
    """Return a text on one line, cut in the middle if it is long."""
    line = text.replace("\n", "⏎")
    if len(line) <= SHOWN_CHARACTERS:
        return line
    half = SHOWN_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"


@dataclass(frozen=True)
class Scores:
    """Result of `evaluate`; None stands for a figure that the rows or arguments did not allow.

    The rates are means over the rows with a reference answer, in the order of the dataset.

    Attributes:
        n: number of rows.
        tokens: number of supervised tokens; the loss is the mean over them.
        loss: mean of -log p(token), in nats.
        perplexity: exp(loss).
        answers: number of rows with a reference answer.
        exact_match: share of greedy answers equal to their reference.
        token_f1: mean token F1 of the greedy answers.
        label_accuracy: share of rows whose likeliest label is the reference.
        metrics: means of the further metrics, by name.
        predictions: the greedy answers.
        references: the reference answers.
        choices: the likeliest label of each row.
        rows: the rows with a reference answer, each with its answer and its scores.
    """

    n: int
    tokens: int
    loss: float
    perplexity: float
    answers: int = 0
    exact_match: float | None = None
    token_f1: float | None = None
    label_accuracy: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    predictions: list[str] = field(default_factory=list, repr=False)
    references: list[str] = field(default_factory=list, repr=False)
    choices: list[str] = field(default_factory=list, repr=False)
    rows: list[ScoredRow] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, int | float]:
        """Return the measured figures, flat and ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= self.metrics
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    def interval(self, rate: float) -> float:
        """Return half the width of the 95 % interval of a rate: 1.96 √(p (1 - p) / n).

        Args:
            rate: a share p of the `answers` rows.
        """
        variance = rate * (1 - rate) / self.answers
        return 1.96 * math.sqrt(variance)

    def worst(self, count: int = 5, by: str | None = None) -> list[ScoredRow]:
        """Return the rows with the lowest scores, the worst first.

        Args:
            count: number of rows.
            by: name of the metric that ranks the rows. None ranks by the first metric, and equal
                rows by the next one.

        Raises:
            ValueError: `by` names a metric that was not measured.
        """
        if by is not None and self.rows and by not in self.rows[0].scores:
            raise unknown_name("by", by, self.rows[0].scores)

        def rank(row: ScoredRow) -> list[float]:
            if by is None:
                return list(row.scores.values())
            return [row.scores[by]]

        ranked = sorted(self.rows, key=rank)
        return ranked[:count]

    def compare(
        self, before: "Scores", names: tuple[str, str] = ("before", "after")
    ) -> "ScoresComparison":
        """Return the comparison with other scores of the same rows.

        Args:
            before: the other scores, such as those of the base without its adapter.
            names: what the two are called in the table.

        Raises:
            ValueError: the scores are of other rows.
        """
        return ScoresComparison(before, self, names)

    def write(self, path: str | Path, compared: "Scores | None" = None) -> None:
        """Write the rows as JSON lines; the file appears when it is complete.

        Args:
            path: the file.
            compared: other scores of the same rows, whose answers and scores are added to each
                line under "compared"; None adds nothing.
        """
        lines = []
        for number, row in enumerate(self.rows):
            record = row.to_dict()
            if compared is not None:
                other = compared.rows[number].to_dict()
                answers = ("got", "choice", "scores")
                record["compared"] = {name: other[name] for name in answers if name in other}
            line = json.dumps(record, ensure_ascii=False, default=str)
            lines.append(f"{line}\n")
        write_text(Path(path), "".join(lines))

    def _table(self) -> list[tuple[str, str, str]]:
        """Return name, value and margin of each figure, as texts."""
        rates = {"exact_match": self.exact_match, "label_accuracy": self.label_accuracy}
        cells = []
        for name, value in self.as_dict().items():
            margin = ""
            if rates.get(name) is not None:
                margin = f"± {self.interval(value):.4f}"
            label = name.replace("_", " ")
            cells.append((label, _number(value), margin))
        return cells

    def __str__(self) -> str:
        lines = []
        for name, value, margin in self._table():
            line = f"{name:<16}{value:>12}  {margin}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table([], self._table())


@dataclass(frozen=True)
class ScoresComparison:
    """Two scores of the same rows; prints as a table.

    Attributes:
        before: The first scores.
        after: The second scores.
        names: What the two are called.

    Raises:
        ValueError: The scores are of other rows.
    """

    before: Scores
    after: Scores
    names: tuple[str, str] = ("before", "after")

    def __post_init__(self):
        first = [(row.row, row.expected) for row in self.before.rows]
        second = [(row.row, row.expected) for row in self.after.rows]
        if first != second or self.before.n != self.after.n:
            raise ValueError(
                f"compare: expected scores of the same rows, got {self.before.n} and "
                f"{self.after.n} rows with other references. Evaluate both on one dataset."
            )

    def changed(self, metric: str) -> tuple[int, int]:
        """Return the number of rows that a metric calls better, and the number of worse ones.

        Args:
            metric: A metric of single rows, such as "exact_match".
        """
        better = 0
        worse = 0
        for row, other in zip(self.after.rows, self.before.rows, strict=True):
            change = row.scores[metric] - other.scores[metric]
            if change > 0:
                better += 1
            if change < 0:
                worse += 1
        return better, worse

    def _table(self) -> list[list[str]]:
        """Return the cells of the table, with its header."""
        cells = [["", *self.names, "change", "rows better", "rows worse"]]
        before = self.before.as_dict()
        measured = self.after.rows[0].scores if self.after.rows else {}
        for name, value in self.after.as_dict().items():
            if name not in before or isinstance(value, int):
                continue
            label = name.replace("_", " ")
            first = before[name]
            change = f"{value - first:+.4f}"
            changed = ["", ""]
            if name in measured:
                changed = [str(count) for count in self.changed(name)]
            cells.append([label, _number(first), _number(value), change, *changed])
        return cells

    def __str__(self) -> str:
        lines = []
        for cells in self._table():
            name, *values = cells
            line = f"{name:<16}"
            for value in values:
                line += f"{value:>13}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        header, *lines = self._table()
        return html_table(header, lines)


def _number(value: float) -> str:
    """Return a whole number with separators, any other number with four digits."""
    if isinstance(value, int):
        return f"{value:,d}"
    return f"{value:.4f}"
