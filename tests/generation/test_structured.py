"""Tests of answers that follow a JSON schema.

Oracle: the package jsonschema and pydantic validate every answer of random models for random
schemas; each allowed token continues a valid document, and each character that a document may have
is allowed. Property: rows without a schema keep their logits bit by bit, in one batch with others.
Errors: schemas that cannot be enforced, answers that are too short, a missing package.
"""

import json
import random
import sys

import jsonschema
import pydantic
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minilora as ml
from helpers.served import build, run, tokenizer
from minilora.generation.engine import Engine
from minilora.generation.generate import end_tokens
from minilora.generation.json_schema import schema_of
from minilora.generation.sequence import Ask
from minilora.generation.structured import compile_schema

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
}
LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -3, "maximum": 17},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[a-f]{2}$"},
        {"enum": ["red", "é☃", 1, None]},
        {"const": {"a": [1]}},
    ]
)


def _objects(values):
    names = st.lists(st.sampled_from(["a", "b c", "é"]), unique=True, min_size=1)
    return st.builds(
        lambda keys, fields, needed: {
            "type": "object",
            "properties": dict(zip(keys, fields, strict=False)),
            "required": keys[: min(needed, len(fields))],
        },
        names,
        st.lists(values, min_size=1, max_size=3),
        st.integers(0, 3),
    )


def _arrays(values):
    return st.builds(
        lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": 2},
        values,
        st.integers(0, 2),
    )


def _nested(values):
    either = st.builds(lambda one, two: {"anyOf": [one, two]}, values, values)
    return _objects(values) | _arrays(values) | either


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=4)
TEXTS = st.text('ab"\\\n é☃', max_size=3)
QUICK = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
)


@pytest.fixture(scope="module")
def model():
    return build(adapters=0, eos_token_id=tokenizer().eos_token_id)


# ---- oracle


@QUICK
@given(SCHEMAS, st.integers(0, 99))
def test_answers_of_a_random_model_are_valid_for_random_schemas(model, schema, seed):
    options = {"max_new_tokens": 150, "temperature": 1.5, "seed": seed}
    for answer in ml.generate(model, tokenizer(), ["a", "bcd"], schema=schema, **options):
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


@QUICK
@given(SCHEMAS, st.integers(0, 99))
def test_each_allowed_token_begins_a_valid_document(model, schema, seed):
    """From a random prefix and a random allowed token, a complete and valid document follows."""
    ends = end_tokens(model, tokenizer())
    constraint = compile_schema(schema, tokenizer(), ends).start()
    rng = random.Random(seed)
    ids = []
    while not constraint.is_finished:
        allowed = constraint.masked(torch.zeros(len(tokenizer()))).isfinite().nonzero()[:, 0]
        token = rng.choice(allowed.tolist())
        if token in ends:
            break
        ids.append(token)
        constraint.push(token)
    text = tokenizer().decode(ids)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@QUICK
@given(st.dictionaries(TEXTS, st.integers(-5, 5) | TEXTS, max_size=3))
def test_every_document_of_json_dumps_is_allowed(model, document):
    schema = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
    grammar = compile_schema(schema, tokenizer(), end_tokens(model, tokenizer()))
    ids = tokenizer().encode(json.dumps(document, ensure_ascii=False))
    assert grammar.is_complete(ids) and not grammar.is_complete(ids[:-1])


def test_a_pydantic_class_reads_its_answer(model):
    class Pet(pydantic.BaseModel):
        kind: str = pydantic.Field(max_length=4)
        legs: int = pydantic.Field(ge=0, le=8)

    answer = ml.generate(model, tokenizer(), "a", schema=Pet, max_new_tokens=80)
    assert set(Pet.model_validate_json(answer).model_fields_set) == {"kind", "legs"}


# ---- property


def test_rows_without_a_schema_keep_their_answer(model):
    """A batch of rows with and without schemas gives each row the answer that it has alone."""
    grammar = compile_schema(PERSON, tokenizer(), end_tokens(model, tokenizer()))
    prompts = [tokenizer().encode(text) for text in ("abc", "de", "fghi")]
    wanted = []
    for number, prompt in enumerate(prompts):
        fields = {"max_tokens": 40, "seed": number, "temperature": 0.9 * (number % 2)}
        wanted.append(Ask(prompt, **fields))
        wanted.append(Ask(prompt, grammar=grammar, **fields))
    engine = Engine(model, tokenizer(), batch_size=6)
    engine.submit(wanted)
    together = run(engine, [])
    for ask in wanted:
        engine.submit([ask])
        assert run(engine, [])[ask] == together[ask]
    engine.close()
    for ask in wanted:
        text, finish = together[ask]
        if ask.grammar is not None:
            assert finish == "stop"
            jsonschema.validate(json.loads(text), PERSON)
    plain = ml.generate(model, tokenizer(), ml.data.RawText("abc"), max_new_tokens=40)
    assert together[wanted[0]][0] == plain


def test_allowed_tokens_keep_the_bits_of_their_logits(model):
    constraint = compile_schema(PERSON, tokenizer(), end_tokens(model, tokenizer())).start()
    logits = torch.randn(len(tokenizer()) + 5)  # a vocabulary that is padded
    masked = constraint.masked(logits)
    allowed = masked.isfinite()
    assert torch.equal(masked[allowed], logits[allowed]) and not allowed[-5:].any()
    assert tokenizer().decode(allowed.nonzero()[:, 0].tolist()) == "{"


def test_objects_are_closed_unless_schemas_combine():
    open_object = {"type": "object", "properties": {"properties": {"type": "object"}}}
    closed = schema_of({"type": "array", "items": open_object})
    assert closed["items"] == open_object | {"additionalProperties": False}
    for kept in (
        {"allOf": [open_object, open_object]},
        open_object | {"anyOf": [open_object]},
        open_object | {"additionalProperties": {"type": "integer"}},
    ):
        assert schema_of(kept) == kept


# ---- errors


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "string", "pattern": "("}, "regex"),
        (3, "expected 'json', a JSON schema"),
        ({"const": {1, 2}}, "not JSON"),
    ],
)
def test_a_schema_that_cannot_be_enforced_raises(model, schema, message):
    with pytest.raises(ValueError, match=message):
        ml.generate(model, tokenizer(), "a", schema=schema)


def test_an_answer_that_is_cut_raises(model):
    with pytest.raises(ValueError, match=r"prompts \[0, 1\] are not complete.*= 3"):
        ml.generate(model, tokenizer(), ["a", "b"], schema=PERSON, max_new_tokens=3)
    with pytest.raises(ValueError, match="Leave stop, min_new_tokens"):
        ml.generate(model, tokenizer(), "a", schema=PERSON, stop="}")


def test_a_missing_package_names_its_install_line(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"llguidance.* pip install -e '\.\[structured\]'"):
        ml.generate(model, tokenizer(), "a", schema="json")
