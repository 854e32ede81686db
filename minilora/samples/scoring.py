"""Scores for answers that are JSON objects. Each takes (prediction, reference) and gives a number in [0, 1]."""

import json


def json_valid(prediction: str, reference: str = "") -> float:
    """1 if `prediction` is one JSON object and nothing else, else 0. `reference` is there for the common shape."""
    return float(_fields(prediction) is not None)


def field_f1(prediction: str, reference: str) -> float:
    """F1 = 2 |P ∩ R| / (|P| + |R|) over the (field, value) pairs of both objects; 0 if `prediction` is not one.

    A value counts when it is the same JSON value: same string, letter by letter. Raises ValueError if `reference`
    is not a JSON object.
    """
    expected = _fields(reference)
    if expected is None:
        raise ValueError(f"the reference is not a JSON object: {reference!r}")
    got = _fields(prediction)
    if got is None:
        return 0.0
    if not got and not expected:
        return 1.0
    return 2 * len(got & expected) / (len(got) + len(expected))


def _fields(text: str) -> set[tuple[str, str]] | None:
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
