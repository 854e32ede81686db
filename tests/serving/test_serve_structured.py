"""Tests of `response_format` and tools over HTTP.

Oracle: jsonschema validates each answer of a random model; the package openai reads them, whole and
streamed; the chat template renders the calls that a client sends back. Property: a stream gives the
same calls as a complete answer. Errors: schemas, tools and choices that are refused.
"""

import json
import sys

import jsonschema
import openai
import pydantic
import pytest

from helpers.chats import real
from helpers.served import build, http, serving, tokenizer
from minilora.generation.engine import Engine
from minilora.generation.sequence import Text
from minilora.serving.schema import Chat
from minilora.serving.structured import ToolUse

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "$defs": {"name": {"type": "string", "maxLength": 5}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "get_time"}}
QUESTION = [{"role": "user", "content": "Weather?"}]


@pytest.fixture(scope="module")
def model():
    context = {"max_position_embeddings": 2048}  # the template writes long instructions for tools
    return build(adapters=0, eos_token_id=tokenizer().eos_token_id, **context)


@pytest.fixture(scope="module")
def url(model):
    engine = Engine(model, real("qwen2_5"), batch_size=4)
    with serving(model, engine=engine) as server:
        yield server.url


@pytest.fixture(scope="module")
def plain_url(model):
    with serving(model) as server:
        yield server.url


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def _chat(url, **fields):
    body = {"model": "base", "messages": QUESTION, "max_tokens": 150, "seed": 0} | fields
    return http.post(f"{url}/v1/chat/completions", json=body)


# ---- response_format


@pytest.mark.parametrize("strict", [True, False])
def test_a_chat_follows_its_schema_whole_and_streamed(client, strict):
    schema = {"name": "city", "schema": CITY, "strict": strict}
    options = {
        "model": "base",
        "messages": QUESTION,
        "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    answer = client.chat.completions.create(**options).choices[0]
    jsonschema.validate(json.loads(answer.message.content), CITY)
    assert answer.finish_reason == "stop"
    chunks = list(client.chat.completions.create(stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.message.content


def test_openai_parses_a_pydantic_class(client):
    class Pet(pydantic.BaseModel):
        kind: str = pydantic.Field(max_length=4)
        legs: int = pydantic.Field(ge=0, le=8)

    parsed = client.chat.completions.parse(model="base", messages=QUESTION, response_format=Pet)
    assert isinstance(parsed.choices[0].message.parsed, Pet)


def test_completions_and_json_objects(url):
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a", 1]}}}
    body = {"model": "base", "prompt": ["a", "b"], "max_tokens": 20, "response_format": schema}
    for choice in http.post(f"{url}/v1/completions", json=body).json()["choices"]:
        assert json.loads(choice["text"]) in ("a", 1)
    answer = _chat(url, response_format={"type": "json_object"}, max_tokens=2)
    choice = answer.json()["choices"][0]
    assert choice["message"]["content"][0] == "{"
    assert choice["finish_reason"] in ("length", "stop")
    assert _chat(url, response_format={"type": "text"}, max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        ({"schema": {"type": "objekt"}}, "response_format.json_schema.schema", "Invalid type"),
        ({"schema": {"uniqueItems": True}}, "response_format.json_schema.schema", "uniqueItems"),
        (None, "response_format.json_schema", "required"),
    ],
)
def test_an_unusable_schema_is_refused_with_its_field(url, given, param, reason):
    schema = None if given is None else {"name": "n"} | given
    answer = _chat(url, response_format={"type": "json_schema", "json_schema": schema})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert error["message"].startswith(f"{param}: ") and reason in error["message"]


def test_a_server_without_the_package_names_its_install_line(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = _chat(url, response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "pip install -e '.[structured]'" in answer.json()["error"]["message"]


# ---- tools


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call_has_valid_arguments(client, choice, stream):
    tools = [TIME, WEATHER]
    options = {"model": "base", "messages": QUESTION, "tools": tools, "tool_choice": choice}
    answer = client.chat.completions.create(stream=stream, seed=1, max_tokens=150, **options)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        finish = choices[-1].finish_reason
        (call,) = [call for one in choices for call in one.delta.tool_calls or ()]
        assert not any(one.delta.content for one in choices)
    else:
        finish = answer.choices[0].finish_reason
        (call,) = answer.choices[0].message.tool_calls
    assert finish == "tool_calls" and len(call.id) == 9
    arguments = json.loads(call.function.arguments)
    if choice != "required":
        assert call.function.name == "get_weather"
    if call.function.name == "get_weather":
        jsonschema.validate(arguments, CITY)
    else:
        assert call.function.name == "get_time" and arguments == {}


def test_calls_and_results_come_back_through_the_template(url):
    call = {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    messages = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "a1", "content": "rain"},
    ]
    answer = _chat(url, messages=messages, tools=[WEATHER], max_tokens=1)
    objects = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Bern"}}}],
        },
        {"role": "tool", "content": "rain"},
    ]
    expected = real("qwen2_5").apply_chat_template(
        objects, tools=[WEATHER], add_generation_prompt=True
    )
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == len(expected)
    without = _chat(url, tools=[WEATHER], tool_choice="none", max_tokens=1).json()
    shortest = real("qwen2_5").apply_chat_template(QUESTION, add_generation_prompt=True)
    assert without["usage"]["prompt_tokens"] == len(shortest)


def _use(**fields):
    body = Chat(model="base", messages=QUESTION, tools=[WEATHER, TIME], **fields)
    return ToolUse.of(body, real("qwen2_5"))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_gives_the_calls_of_the_complete_answer(parallel, size):
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    text = f"I look. <b>\n{call}\n{call}"
    whole, finish = _use(parallel_tool_calls=parallel).message(text, "stop")
    assert finish == "tool_calls"
    assert len(whole["message"]["tool_calls"]) == (2 if parallel else 1)
    use = _use(parallel_tool_calls=parallel)
    content = ""
    calls = []
    for start in range(0, len(text), size):
        part = text[start : start + size]
        ends = "stop" if start + size >= len(text) else None
        delta, finish = use.delta(0, part, ends)
        content += delta["delta"].get("content", "")
        calls += delta["delta"].get("tool_calls", [])
    assert finish == "tool_calls"
    assert content.strip() == whole["message"]["content"] == "I look. <b>"
    streamed = [call["function"] for call in calls]
    assert streamed == [call["function"] for call in whole["message"]["tool_calls"]]


def test_a_text_that_begins_like_a_call_is_streamed_at_its_end():
    use = _use()
    parts = [use.delta(0, "a <tool", None), use.delta(0, "_box>", "stop")]
    assert [delta["delta"] for delta, _ in parts] == [{"content": "a "}, {"content": "<tool_box>"}]
    assert parts[-1][1] == "stop"


def test_special_tokens_of_a_call_stay_in_the_text():
    chat = tokenizer()
    mark, end = chat.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    text = Text(chat, (), frozenset([mark]))
    ids = [*chat.encode("hello"), mark, *chat.encode(" w"), end]
    released = "".join(text.push(token)[0] for token in ids) + text.rest()
    assert released == "hello<|im_start|> w"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ],
)
def test_wrong_tools_are_refused(url, fields, param):
    answer = _chat(url, **({"tools": [WEATHER]} | fields))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_template_without_tools_is_refused_in_a_sentence(plain_url):
    answer = _chat(plain_url, tools=[WEATHER])
    assert answer.status_code == 400 and "chat template" in answer.json()["error"]["message"]
    assert _chat(plain_url, tools=[WEATHER], tool_choice="none", max_tokens=1).status_code == 200


def test_arguments_that_are_no_object_are_refused(url):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}}
    messages = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    answer = _chat(url, messages=messages, tools=[WEATHER])
    assert answer.status_code == 400 and "must be an object" in answer.json()["error"]["message"]
