"""Metrics of answers, and the record that `evaluate` returns.

    exact match = share of answers equal to their reference, up to whitespace at the ends
    token F1    = 2 P R / (P + R) over the words that answer and reference share

Case and punctuation count in the exact match. Token F1 follows SQuAD: lower case, without
punctuation and English articles; two answers without any word are equal.

Source: Rajpurkar et al. 2016 (SQuAD), arXiv:1606.05250, section 6.1.
"""

import json
import math
import string
from collections import Counter
from dataclasses import asdict, dataclass, field

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = {"a", "an", "the"}


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 if both texts are equal after stripping whitespace from their ends, else 0.0.

    Args:
        prediction: the answer.
        reference: the expected answer.
    """
    return float(prediction.strip() == reference.strip())


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of word precision and word recall, in [0, 1].

    Args:
        prediction: the answer.
        reference: the expected answer.
    """
    predicted = words(prediction)
    expected = words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = Counter(predicted) & Counter(expected)  # with multiplicity
    # P = shared / |predicted| and R = shared / |expected|, so 2 P R / (P + R) =
    return 2 * shared.total() / (len(predicted) + len(expected))


def words(text: str) -> list[str]:
    """Return the words of a text in SQuAD's normal form.

    Args:
        text: any text.

    Returns:
        Words in lower case, without punctuation and English articles.
    """
    plain = text.lower().translate(PUNCTUATION)
    return [word for word in plain.split() if word not in ARTICLES]


def json_valid(prediction: str, reference: str = "") -> float:
    """Return 1.0 if the answer is one JSON object and nothing else, else 0.0.

    Args:
        prediction: the answer.
        reference: not used; every metric takes a prediction and a reference.
    """
    return float(json_fields(prediction) is not None)


def json_fields(text: str) -> set[tuple[str, str]] | None:
    """Return the fields of a JSON object as pairs of name and canonical JSON value.

    Args:
        text: any text.

    Returns:
        The pairs, or None if the text is not a JSON object.
    """
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # not JSON, an over-long number, too many brackets
        return None
    if not isinstance(record, dict):
        return None
    return {(name, json.dumps(value, sort_keys=True)) for name, value in record.items()}


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is valid in Python, not in JSON")


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
        metrics: means of the caller's metrics, by name.
        predictions: the greedy answers.
        references: the reference answers.
        choices: the likeliest label of each row.
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

    def as_dict(self) -> dict[str, int | float]:
        """Return the measured figures, flat and ready for JSON."""
        flat = {**asdict(self), **self.metrics}
        return {name: value for name, value in flat.items() if isinstance(value, int | float)}

    def interval(self, rate: float) -> float:
        """Return half the width of the 95 % interval of a rate: 1.96 √(p (1 - p) / n).

        Args:
            rate: a share p of the `answers` rows.
        """
        return 1.96 * math.sqrt(rate * (1 - rate) / self.answers)

    def __str__(self) -> str:
        rates = {"exact_match": self.exact_match, "label_accuracy": self.label_accuracy}
        lines = []
        for name, value in self.as_dict().items():
            shown = f"{value:,d}" if isinstance(value, int) else f"{value:.4f}"
            margin = ""
            if rates.get(name) is not None:
                margin = f"  ± {self.interval(value):.4f}"
            lines.append(f"{name.replace('_', ' '):<16}{shown:>12}{margin}")
        return "\n".join(lines)
