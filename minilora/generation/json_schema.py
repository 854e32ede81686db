"""JSON schemas in the forms that users give them → one schema, as text.

    "json"              any JSON object
    a dict              the schema itself
    a pydantic class    the schema of the class

If the schema of an object lists properties and does not mention others, the object may have others.
A model would invent such properties, often without end. Therefore the object is closed:
`additionalProperties` becomes false, as OpenAI requires it. A closed answer is valid for the open
schema too. Schemas that combine objects (`allOf` of several, or properties next to `anyOf`, `oneOf`
and `$ref`) stay as they are, because each part would forbid the properties of the others.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
COMBINATIONS = ("anyOf", "oneOf", "allOf", "$ref", "if", "then", "else")
OTHER_PROPERTIES = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def schema_of(schema: Any) -> dict[str, Any] | bool:
    """Return a JSON schema with closed objects.

    Args:
        schema: "json", a schema, or a pydantic class.

    Raises:
        ValueError: it is none of the three, or has a value that is not JSON.
    """
    if schema == "json":
        return {"type": "object"}
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ValueError(
            "schema: expected 'json', a JSON schema (a dict) or a pydantic class, got "
            f"{schema!r:.80}."
        )
    try:
        copied = json.loads(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema: it has a value that is not JSON: {error}.") from error
    parts = list(_subschemas(copied))
    if any(_combines(part) for part in parts):
        return copied
    for part in parts:
        if "properties" in part and not _has_any(part, OTHER_PROPERTIES):
            part["additionalProperties"] = False
    return copied


def _has_any(schema: dict[str, Any], keys: Sequence[str]) -> bool:
    """Return True if a schema has one of the keys."""
    return any(key in schema for key in keys)


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    inner = [schema.get(key) for key in SINGLE_SCHEMAS]
    for key in SCHEMA_LISTS:
        parts = schema.get(key)
        inner += parts if isinstance(parts, list) else []
    for key in SCHEMA_MAPS:
        named = schema.get(key)
        inner += [*named.values()] if isinstance(named, dict) else []
    for part in inner:
        yield from _subschemas(part)


def _combines(schema: dict[str, Any]) -> bool:
    """Return True if properties of one object may come from several schemas."""
    parts = schema.get("allOf")
    if isinstance(parts, list) and len(parts) > 1:
        return True
    return "properties" in schema and _has_any(schema, COMBINATIONS)
