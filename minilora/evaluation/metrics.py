"""Metrics of answers, and their names.

    exact match = share of answers equal to their reference, up to whitespace at the ends
    token F1    = 2 P R / (P + R) over the words that answer and reference share

Case and punctuation count in the exact match. Token F1 follows SQuAD: lower case, without
punctuation and English articles; two answers without any word are equal.

Source: Rajpurkar et al. 2016 (SQuAD), arXiv:1606.05250, section 6.1.
"""

import json
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from minilora.common import comma_separated, unknown_name
from minilora.evaluation.code_execution import pass_at_1

Metric = Callable[[str, str], float]

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


def metric_functions(
    metrics: Mapping[str, Metric] | Sequence[str] | str | None,
) -> dict[str, Metric]:
    """Return the metrics of greedy answers that `evaluate` measures, by name.

    Args:
        metrics: names in NAMED, in a sequence or separated by commas; or further functions by name,
            which are measured together with exact match and token F1. None: these two alone.

    Raises:
        ValueError: a name is unknown.
    """
    standard = {"exact_match": exact_match, "token_f1": token_f1}
    if metrics is None:
        return dict(standard)
    if isinstance(metrics, Mapping):
        return {**standard, **metrics}
    names = comma_separated(metrics) if isinstance(metrics, str) else metrics
    functions = {}
    for name in names:
        full_name = SHORT_NAMES.get(name, name)
        if full_name not in NAMED:
            raise unknown_name("metrics", name, [*NAMED, *SHORT_NAMES])
        functions[full_name] = NAMED[full_name]
    return functions


NAMED: dict[str, Metric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "json_valid": json_valid,
    "pass_at_1": pass_at_1,
}
SHORT_NAMES = {"f1": "token_f1", "pass@1": "pass_at_1"}
