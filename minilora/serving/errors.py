"""Sentences about invalid fields of a request, in the client's names and values.

pydantic reports an error for each alternative of a field, at a path that contains the names of its
own types (`prompt.constrained-str`). `invalid_fields` follows each path through the client's body,
leaves such names out, and joins the errors at one place into one sentence:

    messages[0].content: expected text or a list of parts, got a number.
    top_p: expected at most 1, got 2.
    temprature: this server does not support this field. Remove it, or write temperature.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilora.common import nearest

# Fields with many alternatives -> what they may be. "generate" is the route of ml.generate.
ALTERNATIVES = {
    "logit_bias": "an object of token ids and numbers from -100 to 100",
    "content": "text or a list of parts",
    "prompt": "a text, a list of texts, token ids, or a list of lists of token ids, none of them "
    "empty and at most 64",
    "generate.prompt": "a text or a list of messages",
    "stop": "a text or a list of at most 16 texts, none of them empty",
}
# pydantic's types of errors -> the expected kind of value
KINDS = {
    "string_type": "text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "finite_number": "a finite number",
}
# pydantic's types of errors -> the expected value
RANGES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} character(s)",
    "string_pattern_mismatch": "a text of the pattern {pattern}",
    "too_short": "at least {min_length} element(s)",
    "too_long": "at most {max_length} element(s)",
}
SHOWN = 40  # longest value in a message, in characters

Path = tuple[str | int, ...]


def invalid_fields(
    problems: Sequence[Mapping[str, Any]], body: Any, known: Iterable[str], route: str = ""
) -> list[tuple[str, str]]:
    """Return the invalid fields of a body, each with a sentence.

    Args:
        problems: pydantic's errors, with locations that begin with "body".
        body: the client's JSON.
        known: names of the body's fields, from which a misspelt name gets a suggestion.
        route: the name of a route whose fields differ ("generate"), or "".

    Returns:
        Pairs of the field, such as "messages[0].content", and the sentence.
    """
    types = [problem["type"] for problem in problems]
    if "json_invalid" in types:
        context = problems[0].get("ctx", {})
        reason = context.get("error", "a syntax error")
        return [("body", f"the body is not valid JSON: {reason}.")]
    found: dict[Path, list[Mapping[str, Any]]] = {}
    for problem in problems:
        path = _client_path(problem, body)
        while path and isinstance(path[-1], int) and _field(path) in ALTERNATIVES:
            path = path[:-1]
        found.setdefault(path, []).append(problem)
    sentences = []
    for path, errors in found.items():
        if _has_deeper(path, found):
            continue
        name = show_path(path)
        sentence = _sentence(path, errors, body, known, route)
        sentences.append((name, f"{name}: {sentence}"))
    return sentences


def _has_deeper(path: Path, others: Iterable[Path]) -> bool:
    """Return True if one of the other paths continues this one."""
    for other in others:
        if len(other) > len(path) and other[: len(path)] == path:
            return True
    return False


def show_path(path: Sequence[str | int]) -> str:
    """Return a path as a client writes it: `messages[0].content`.

    Args:
        path: names of fields and numbers of elements.
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text or "body"


def _client_path(problem: Mapping[str, Any], body: Any) -> Path:
    """Return the parts of a location that are fields or elements of the body."""
    location = problem["loc"][1:]
    path: list[str | int] = []
    value = body
    for number, part in enumerate(location, start=1):
        if part == "[key]":  # the name of the field is wrong, so the object is
            return tuple(path[:-1])
        is_last = number == len(location)
        if isinstance(value, dict) and part in value:
            value = value[part]
            path.append(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
            path.append(part)
        elif is_last and problem["type"] == "missing":
            path.append(part)
    return tuple(path)


def _field(path: Path) -> str:
    """Return the last name in a path."""
    names = [part for part in path if isinstance(part, str)]
    return names[-1] if names else ""


def _sentence(
    path: Path, errors: Sequence[Mapping[str, Any]], body: Any, known: Iterable[str], route: str
) -> str:
    """Return the sentence about one place in the body, without its name."""
    types = {error["type"] for error in errors}
    if "missing" in types:
        return "this field is required."
    if types == {"extra_forbidden"}:
        return _unknown_field(path, known)
    value = body
    for part in path:
        value = value[part]
    field = _field(path)
    alternatives = ALTERNATIVES.get(field)
    alternatives = ALTERNATIVES.get(f"{route}.{field}", alternatives)
    if alternatives is not None:
        return f"expected {alternatives}, got {kind_of(value)}."
    expected = []
    for error in errors:
        if error["type"] in RANGES:
            limits = error.get("ctx", {})
            limits = {name: _plain(limit) for name, limit in limits.items()}
            text = RANGES[error["type"]].format(**limits)
            expected.append(text.replace("False", "false"))
        else:
            expected.append(KINDS.get(error["type"], "another value"))
    got = kind_of(value)
    if types & RANGES.keys():
        got = _shown(value)
    distinct = dict.fromkeys(expected)
    return f"expected {' or '.join(distinct)}, got {got}."


def _plain(limit: Any) -> Any:
    """Return 2 for 2.0, and other limits as they are."""
    if isinstance(limit, float) and limit.is_integer():
        return int(limit)
    return limit


def _unknown_field(path: Path, known: Iterable[str]) -> str:
    """Return the sentence about a field that the server does not support."""
    sentence = "this server does not support this field. Remove it"
    if len(path) == 1:
        name = str(path[0])
        similar = nearest(name, known, 1)
        if similar and similar[0][:2] == name[:2]:
            return f"{sentence}, or write {similar[0]}."
    return f"{sentence}."


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value, with its article.

    Args:
        value: the value.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text" if value else "an empty text"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object" if value else "an empty object"


def _shown(value: Any) -> str:
    """Return a short value as JSON, and the kind of a longer one."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else kind_of(value)
