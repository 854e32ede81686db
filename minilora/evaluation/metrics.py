"""How good answers are: the metrics of `evaluate`, and the record it returns.

exact match = share of answers equal to their reference, surrounding whitespace aside (case and punctuation count)
token F1    = 2 P R / (P + R) over the words the two have in common, SQuAD's way: lower case, without punctuation
              and English articles; two answers without any word are equal (Rajpurkar et al. 2016, section 6.1)
"""

import json
import math
import string
from collections import Counter
from dataclasses import asdict, dataclass, field

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = {"a", "an", "the"}


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both are the same after stripping whitespace from their ends, else 0.0."""
    return float(prediction.strip() == reference.strip())


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1]."""
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())  # words in both, with multiplicity
    # P = common / |predicted|, R = common / |expected|, so 2PR / (P + R) is
    return 2 * common / (len(predicted) + len(expected))


def words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, punctuation and articles removed."""
    return [word for word in text.lower().translate(PUNCTUATION).split() if word not in ARTICLES]


def json_valid(prediction: str, reference: str = "") -> float:
    """1.0 if `prediction` is one JSON object and nothing else, else 0.0. `reference` is there for the common shape."""
    return float(json_fields(prediction) is not None)


def json_fields(text: str) -> set[tuple[str, str]] | None:
    """{(field, canonical JSON of its value)}, or None if `text` is not a JSON object."""
    try:
        record = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):  # JSONDecodeError, an over-long number, brackets without end
        return None
    if not isinstance(record, dict):
        return None
    return {(field, json.dumps(value, sort_keys=True)) for field, value in record.items()}


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON's")


@dataclass(frozen=True)
class Scores:
    """What `evaluate` measured; None where the rows or arguments gave nothing to measure.

    `loss` is in nats per trained token, `perplexity` its exponential; the rates are means over the `answers` rows
    that have a reference answer, in the order of the dataset.
    """

    n: int  # rows
    tokens: int  # trained tokens the loss is the mean over
    loss: float
    perplexity: float
    answers: int = 0  # rows with a reference answer
    exact_match: float | None = None
    token_f1: float | None = None
    label_accuracy: float | None = None  # accuracy of the likeliest label
    metrics: dict[str, float] = field(default_factory=dict)  # the caller's own, by name
    predictions: list[str] = field(default_factory=list, repr=False)  # greedy answers
    references: list[str] = field(default_factory=list, repr=False)
    choices: list[str] = field(default_factory=list, repr=False)  # the likeliest label of each row

    def as_dict(self) -> dict[str, int | float]:
        """The figures alone, flat and ready for JSON: what was not measured is left out, so are the answers."""
        flat = {**asdict(self), **self.metrics}
        return {name: value for name, value in flat.items() if isinstance(value, int | float)}

    def interval(self, rate: float) -> float:
        """Half the width of the 95 % interval of a rate over these answers: 1.96 sqrt(p (1 - p) / n)."""
        return 1.96 * math.sqrt(rate * (1 - rate) / self.answers)

    def __str__(self) -> str:
        rates = {"exact_match": self.exact_match, "label_accuracy": self.label_accuracy}
        lines = []
        for name, value in self.as_dict().items():
            shown = f"{value:,d}" if isinstance(value, int) else f"{value:.4f}"
            margin = f"  ± {self.interval(value):.4f}" if rates.get(name) is not None else ""
            lines.append(f"{name.replace('_', ' '):<16}{shown:>12}{margin}")
        return "\n".join(lines)
