"""Metrics for answers that are JSON objects."""

from minilora.evaluation.metrics import json_fields


def field_f1(prediction: str, reference: str) -> float:
    """Return F1 = 2 |P ∩ R| / (|P| + |R|) over the (field, value) pairs of two JSON objects.

    Values are compared as JSON values: strings letter by letter.

    Args:
        prediction: the answer; 0 if it is not a JSON object.
        reference: the expected object.

    Raises:
        ValueError: the reference is not a JSON object.
    """
    expected = json_fields(reference)
    if expected is None:
        raise ValueError(f"the reference is not a JSON object: {reference!r}")
    predicted = json_fields(prediction)
    if predicted is None:
        return 0.0
    if not predicted and not expected:
        return 1.0
    return 2 * len(predicted & expected) / (len(predicted) + len(expected))
