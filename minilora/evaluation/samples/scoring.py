"""Scores for answers that are JSON objects. Each takes (prediction, reference) and gives a number in [0, 1]."""

from minilora.evaluation.metrics import json_fields


def field_f1(prediction: str, reference: str) -> float:
    """F1 = 2 |P ∩ R| / (|P| + |R|) over the (field, value) pairs of both objects; 0 if `prediction` is not one.

    A value counts when it is the same JSON value: same string, letter by letter. Raises ValueError if `reference`
    is not a JSON object.
    """
    expected = json_fields(reference)
    if expected is None:
        raise ValueError(f"the reference is not a JSON object: {reference!r}")
    got = json_fields(prediction)
    if got is None:
        return 0.0
    if not got and not expected:
        return 1.0
    return 2 * len(got & expected) / (len(got) + len(expected))
