"""Proves that the server implements OpenAI's protocol and gives each request its own answer.

OpenAI's own client sends the requests. Oracle: `ml.generate` with the request's adapter, prompt,
seed and stop strings, for whole and streamed answers, also with 64 clients at a time. Property:
counted metrics, listed models, and adapters that are loaded and unloaded at run time. Error: the
server refuses, in OpenAI's format, fields that it would have to ignore.
"""

import asyncio
import json
import re
from copy import copy
from typing import Any

import httpx
import openai
import pytest

import minilora as ml
from helpers.served import NAMES, alone, asks, build, http, serving, tokenizer
from minilora.data import RawText
from minilora.generation.sequence import Ask
from minilora.lora.registry import lora_configs

HELLO: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat_ids(messages) -> list[int]:
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True)


@pytest.fixture(scope="module")
def expect():
    """Provide expected answers from a second model with the same weights, outside the server."""
    twin, known = build(), {}

    def find(
        prompt: list[int], adapter: str | None = None, max_tokens: int = 12, **given: Any
    ) -> str:
        key = tuple(prompt), adapter, max_tokens, *given.items()
        known[key] = (
            known[key] if key in known else alone(twin, Ask(prompt, adapter, max_tokens, **given))
        )
        return known[key]

    return find


# ---- oracle


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}]
)
@pytest.mark.parametrize("name", ["base", NAMES[3]])
def test_a_chat_answer_equals_generate_whole_and_streamed(client, expect, name, sampling):
    wanted = expect(chat_ids(HELLO), None if name == "base" else name, **sampling)
    given: Any = {"model": name, "messages": HELLO, "max_tokens": 12} | sampling
    whole = client.chat.completions.create(**given)
    (choice,) = whole.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        wanted,
        "assistant",
        "length",
    )
    usage = {
        "prompt_tokens": len(chat_ids(HELLO)),
        "completion_tokens": 12,
        "total_tokens": len(chat_ids(HELLO)) + 12,
    }
    assert whole.usage.model_dump(exclude_none=True) == usage and whole.model == name
    chunks = [
        *client.chat.completions.create(
            **given, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 2
    ) + ["length"]
    assert (
        chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.model_dump(exclude_none=True) == usage
    assert len(chunks) > 4, "not a stream"


def test_completions_take_texts_and_ids(client, expect):
    prompts = ["hello", "hello wo"]
    ids = [tokenizer().encode(prompt) for prompt in prompts]
    wanted = [expect(one, NAMES[1]) for one in ids]
    given: Any = {"model": NAMES[1], "max_tokens": 12, "temperature": 0}
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, **given)
        assert [choice.text for choice in answer.choices] == wanted
        texts = ["", ""]
        for chunk in client.completions.create(prompt=prompt, stream=True, **given):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == wanted
    for prompt in (prompts[0], ids[0]):
        assert client.completions.create(prompt=prompt, **given).choices[0].text == wanted[0]
    # greedy, since a sampled answer could end sooner
    usual = client.completions.create(model="base", prompt="a", temperature=0)
    assert usual.usage.completion_tokens == 16  # OpenAI's default


def test_every_event_of_a_stream_has_the_usage_if_the_client_wants_it(client):
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    given: Any = {"model": "base", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    chunks = [*client.completions.create(stream=True, stream_options=options, **given)]
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 12 and len(set(counts)) > 2


def test_the_generate_route_equals_ml_generate(server, model, expect):
    wanted = expect(chat_ids([{"role": "user", "content": "hello"}]), NAMES[2])
    body = {"prompt": "hello", "adapter": NAMES[2], "max_new_tokens": 12}
    answer = http.post(f"{server.url}/generate", json=body).json()
    assert answer["text"] == wanted and answer["finish_reason"] == "length"
    with http.stream("POST", f"{server.url}/generate", json=body | {"stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        *events, done, end = stream.read().decode().split("\n\n")
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(event["text"] for event in events) == wanted and (done, end) == (
        "data: [DONE]",
        "",
    )
    assert events[-1]["usage"] == answer["usage"] and events[-2]["finish_reason"] == "length"


def test_stop_strings_end_an_answer(client, expect):
    free = {name: expect(chat_ids(HELLO), name, 30) for name in NAMES[:4]}
    name, stop = next(
        (name, text[i : i + 2])
        for name, text in free.items()
        for i in range(2, 9)
        if text[i : i + 2].isascii()
    )
    given: Any = {
        "model": name,
        "messages": HELLO,
        "max_tokens": 30,
        "temperature": 0,
        "stop": [stop, "never"],
    }
    whole = client.chat.completions.create(**given).choices[0]
    assert whole.message.content == free[name].partition(stop)[0] and whole.finish_reason == "stop"
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **given)]
    assert "".join(one.delta.content or "" for one in streamed) == whole.message.content
    assert streamed[-1].finish_reason == "stop"


def test_64_clients_with_8_adapters_get_their_own_answers(server, expect):
    """Requests are streamed and whole, greedy and sampled, in several batches.

    No answer is lost, and none goes to another client.
    """
    wanted = asks(64, seed=1)

    async def one(client, number: int, ask: Ask) -> str:
        given: Any = {
            "model": ask.adapter or "base",
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
        }
        given |= {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
        if number % 2:
            return (await client.completions.create(**given)).choices[0].text
        stream = await client.completions.create(stream=True, **given)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, i, ask) for i, ask in enumerate(wanted)))

    found = asyncio.run(everybody())
    sampling = [
        {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed} for ask in wanted
    ]
    expected = [
        expect(ask.prompt, ask.adapter, ask.max_tokens, **s)
        for ask, s in zip(wanted, sampling, strict=True)
    ]
    assert found == expected and len({*found}) > 50
    assert not server.worker.engine.busy and not server.worker.listeners


# ---- property


def test_models_are_the_base_and_its_adapters(client):
    models = {model.id: model for model in client.models.list()}
    assert [*models] == ["base", *NAMES]
    assert client.models.retrieve(NAMES[0]).model_dump()["parent"] == "base"
    assert models["base"].object == "model" and models["base"].owned_by == "minilora"


def test_adapters_are_loaded_and_unloaded_at_run_time(tmp_path, expect):
    source = build(adapters=3)
    ml.save_adapter(source, tmp_path / "two", name=NAMES[2])
    wanted = expect(chat_ids(HELLO), NAMES[2])
    with serving(build(adapters=1), adapter_folder=str(tmp_path), max_adapters=2) as server:

        def post(what: str, **body: str) -> httpx.Response:
            return http.post(f"{server.url}/v1/{what}_lora_adapter", json=body)

        given: Any = {"model": "new", "messages": HELLO, "max_tokens": 12, "temperature": 0}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError, match="Expected one of base, adapter0"):
                client.chat.completions.create(**given)
            assert post("load", lora_name="new", lora_path="two").json()["id"] == "new"
            assert client.chat.completions.create(**given).choices[0].message.content == wanted
            assert [model.id for model in client.models.list()] == ["base", NAMES[0], "new"]
            assert "already served" in post("load", lora_name="new", lora_path="two").text
            assert "which is the limit" in post("load", lora_name="more", lora_path="two").text
            assert post("unload", lora_name="new").json()["deleted"]
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(**given)
            assert post("unload", lora_name="new").status_code == 404
            assert "the base itself" in post("unload", lora_name="base").text
        assert ml.list_adapters(server.worker.engine.model) == [NAMES[0]]


METRIC = re.compile(r'minilora_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \d+(\.\d+)?(e-?\d+)?')


def test_metrics_count(server, client):
    def read() -> dict[str, float]:
        lines = http.get(f"{server.url}/metrics").text.splitlines()
        assert all(
            METRIC.fullmatch(line) for line in lines if not line.startswith(("# HELP ", "# TYPE "))
        )
        return {
            line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")
        }

    before = read()
    # Without temperature=0 the server samples, and a sampled end token would end the answer early.
    client.completions.create(model="base", prompt=[1, 2, 3], max_tokens=5, temperature=0)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt="", max_tokens=5)
    moved = {name: value - before.get(name, 0) for name, value in read().items()}
    assert (
        moved['minilora_tokens_total{kind="prompt"}'] == 3
        and moved['minilora_tokens_total{kind="generated"}'] == 5
    )
    assert moved['minilora_requests_total{route="/v1/completions",status="200"}'] == 1
    assert moved['minilora_requests_total{route="refused",status="400"}'] == 1
    assert (
        moved['minilora_answers_total{reason="length"}']
        == moved["minilora_first_token_seconds_count"]
        == 1
    )
    assert http.get(f"{server.url}/healthz").json() == {"status": "ok"}


# ---- error

CHAT = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
USER = {"role": "user", "content": "a"}
FINE = [
    {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False},
    {"n": None, "stop": None, "tools": [], "tool_choice": "none", "top_logprobs": 0},
    {"response_format": {"type": "text"}, "store": False, "service_tier": "auto"},
    {"user": "me", "metadata": {"a": "b"}, "seed": -1, "top_k": -1, "stop": [], "stream": False},
    {"reasoning_effort": None, "repetition_penalty": 1.0, "modalities": ["text"]},
    {"stop_token_ids": [], "min_p": 0, "ignore_eos": False, "a_field_of_next_year": None},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{"role": "developer", "content": "be brief"}, USER | {"name": "me"}]},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": None}, USER]},
    {"messages": [USER, {"role": "assistant", "content": "b", "reasoning_content": "c"}, USER]},
    {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": "b",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning_content": None,
            },
            USER,
        ]
    },
]
CONTENT = "messages[0].content: expected text or a list of parts, got"
# fields, the field that the error names, a part of its message
REFUSED = [
    ({"n": 0}, "n", "n: expected at least 1, got 0."),
    ({"length_penalty": 0.5}, "length_penalty", "length_penalty: this server does not support"),
    ({"use_beam_search": 0}, "use_beam_search", "does not support"),
    ({"presence_penalty": False}, "presence_penalty", "expected a number, got false."),
    ({"presence_penalty": 3}, "presence_penalty", "expected at most 2, got 3."),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "logit_bias.5: expected at most 100, got 101."),
    ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias: expected an object of token ids and"),
    ({"logit_bias": {"99999": 1}}, None, "logit_bias: expected token ids from 0 to"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "this field is required"),
    ({"response_format": {"type": "xml"}}, "response_format.type", 'got "xml".'),
    (
        {"temprature": 0.1},
        "temprature",
        "temprature: this server does not support this field. Remove it, or write temperature.",
    ),
    ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role", "'assistant'"),
    ({"messages": [USER, USER | {"nom": "me"}]}, "messages[1].nom", "does not support"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", f"{CONTENT} a number."),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", f"{CONTENT} null."),
    ({"messages": [{"role": "user"}]}, "messages[0].content", f"{CONTENT} null."),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "role: this field is required."),
    (
        {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "messages[0].content[0].type: expected 'text', got \"image_url\".",
    ),
    ({"messages": []}, "messages", "messages: expected at least 1 element(s), got []."),
    ({"messages": "a"}, "messages", "messages: expected a list, got text."),
    ({"max_tokens": 0}, "max_tokens", "max_tokens: expected at least 1, got 0."),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens: expected an integer, got text."),
    ({"max_tokens": 2000}, "max_tokens", "max_tokens: this server gives at most 1024, got 2000"),
    ({"max_tokens": 600}, None, "which with 600 new ones exceed the 512"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ: give one"),
    ({"temperature": 2.1}, "temperature", "temperature: expected at most 2, got 2.1."),
    ({"top_p": 0}, "top_p", "top_p: expected more than 0, got 0."),
    ({"stop": ""}, "stop", "stop: expected a text or a list of at most 16 texts"),
    ({"stop": ["a", 5]}, "stop", "none of them empty, got a list."),
    (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "stream_options: allowed only with stream",
    ),
]


def test_several_answers_are_those_of_several_rows_of_generate(client, model):
    """The prompt counts once. Without a seed the answers differ too."""
    given: Any = {"model": "base", "max_tokens": 8, "temperature": 1.5, "seed": 5, "n": 3}
    texts = ["hello", "hello wo"]
    prompts = [RawText(text) for text in texts for _ in range(3)]
    wanted = []
    for start in (0, 3):
        rows = prompts[start : start + 3]
        options = {"max_new_tokens": 8, "temperature": 1.5, "seed": 5}
        wanted += ml.generate(build(adapters=0), tokenizer(), rows, **options)
    answer = client.completions.create(prompt=texts, **given)
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [*range(6)] and len({*wanted}) == 6
    tokens = sum(len(tokenizer().encode(text)) for text in texts)
    assert answer.usage.prompt_tokens == tokens
    chat = client.chat.completions.create(messages=HELLO, **(given | {"seed": None}))
    assert len({choice.message.content for choice in chat.choices}) == 3
    assert chat.usage.prompt_tokens == len(chat_ids(HELLO))
    assert client.completions.create(prompt="a", **given, best_of=3).choices[2].index == 2
    with pytest.raises(openai.BadRequestError, match="best_of: expected the value of n"):
        client.completions.create(prompt="a", **given, best_of=4)
    with pytest.raises(openai.BadRequestError, match="n: expected at most 72 answers"):
        client.completions.create(prompt=texts, **(given | {"n": 40}))


def test_rules_of_a_request_equal_those_of_generate(server):
    rules = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "min_p": 0.05,
        "top_k": 20,
        "seed": 2,
    }
    body = {"model": "base", "prompt": "hello", "max_tokens": 12, "temperature": 0.9} | rules
    bias = {"60": 3.5}
    answer = http.post(f"{server.url}/v1/completions", json=body | {"logit_bias": bias}).json()
    options = rules | {"max_new_tokens": 12, "temperature": 0.9, "logit_bias": {60: 3.5}}
    wanted = ml.generate(build(adapters=0), tokenizer(), RawText("hello"), **options)
    assert answer["choices"][0]["text"] == wanted
    plain = {"max_new_tokens": 12, "temperature": 0.9, "seed": 2}
    assert wanted != ml.generate(build(adapters=0), tokenizer(), RawText("hello"), **plain)


def test_ignore_eos_and_min_tokens_lengthen_an_answer(server):
    """The bias makes the end token the likeliest one."""
    end = tokenizer().eos_token_id
    body = {"model": "base", "prompt": "hello", "max_tokens": 9, "temperature": 0}
    body["logit_bias"] = {str(end): 100}
    lengths = {}
    for more in ({}, {"min_tokens": 4}, {"ignore_eos": True}, {"stop_token_ids": [end]}):
        answer = http.post(f"{server.url}/v1/completions", json=body | more).json()
        lengths[str(more)] = answer["usage"]["completion_tokens"]
    assert [*lengths.values()] == [0, 4, 9, 0]
    body |= {"ignore_eos": True, "stop_token_ids": [end]}
    answer = http.post(f"{server.url}/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("more", FINE)
def test_fields_without_effect_are_accepted(server, more):
    answer = http.post(f"{server.url}/v1/chat/completions", json=CHAT | more)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("more", "field", "message"), REFUSED)
def test_unsupported_fields_are_refused(server, more, field, message):
    answer = http.post(f"{server.url}/v1/chat/completions", json=CHAT | more)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error" and error["param"] == field
    assert {*error} == {"message", "type", "param", "code"}


def test_a_conversation_takes_the_answers_back(client):
    """OpenAI's documented idiom sends the message that the server has sent."""
    messages: Any = [USER]
    for _ in range(2):
        answer = client.chat.completions.create(model="base", messages=messages, max_tokens=3)
        messages.append(answer.choices[0].message)
        messages.append(answer.choices[0].message.model_dump())
        messages.append(USER)
    assert len(messages) == 7


def test_developer_and_parts_are_the_prompt_of_system_and_text(client):
    def prompt_tokens(role: str, content: Any) -> int:
        messages: Any = [{"role": role, "content": content}, USER]
        answer = client.chat.completions.create(model="base", messages=messages, max_tokens=1)
        return answer.usage.prompt_tokens

    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    assert prompt_tokens("developer", parts) == prompt_tokens("system", "be brief")


def test_invalid_prompts_are_refused(server):
    for prompt, message in [
        ([999999], "each from 0 to"),
        ([], "prompt: expected a text, a list of texts, token ids, or a list of lists"),
        ([[]], "at most 64, got a list."),
        (["a", 1], "at most 64, got a list."),
        (5, "at most 64, got a number."),
    ]:
        body = {"model": "base", "prompt": prompt}
        answer = http.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    for prompt, field, message in [
        (5, "prompt", "prompt: expected a text or a list of messages, got a number."),
        ([USER, {"role": "critic"}], "prompt[1].role", "prompt[1].role: expected 'system'"),
        ([{"role": "user"}], "prompt[0].content", "prompt[0].content: expected text or a list"),
    ]:
        answer = http.post(f"{server.url}/generate", json={"prompt": prompt})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
        assert message in answer.json()["error"]["message"]
    headers = {"content-type": "application/json"}
    broken = http.post(f"{server.url}/v1/completions", content='{"model": ', headers=headers)
    assert broken.json()["error"]["message"].startswith("the body is not valid JSON: ")
    refused = http.post(f"{server.url}/generate", json={"prompt": "a", "adapter": "nobody"})
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"


def test_a_base_without_a_chat_template_completes_and_refuses_chats(model):
    class Plain:
        chat_template = None

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer(), name)

        def apply_chat_template(self, *given: Any, **more: Any) -> Any:
            raise ValueError("this tokenizer has no chat template")

    with serving(build(adapters=0)) as server:
        server.worker.engine.tokenizer = Plain()
        body = {"model": "base", "prompt": "hello", "max_tokens": 3, "temperature": 0}
        said = http.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
        assert said == ml.generate(
            build(adapters=0), tokenizer(), RawText("hello"), max_new_tokens=3
        )
        refused = http.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert (
            refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
        )


def test_variables_of_the_chat_template_reach_the_prompt():
    """A request's variables replace those that its adapter was trained with."""
    suffix = "{% if brief is defined and brief %}{{ 'hello ' * brief }}{% endif %}"
    templated = copy(tokenizer())
    templated.chat_template = str(templated.chat_template) + suffix
    model = build(adapters=1)
    lora_configs(model).tokenizers[NAMES[0]] = {"chat_template_kwargs": {"brief": 2}}
    lengths = {}
    with serving(model) as server:
        server.worker.engine.tokenizer = templated
        for name, kwargs in [
            ("base", None),
            ("base", {"brief": 1}),
            (NAMES[0], None),
            (NAMES[0], {"brief": 1}),
        ]:
            body = CHAT | {"model": name, "max_tokens": 1, "chat_template_kwargs": kwargs}
            answer = http.post(f"{server.url}/v1/chat/completions", json=body).json()
            lengths[name, str(kwargs)] = answer["usage"]["prompt_tokens"]
        body = CHAT | {"chat_template_kwargs": {"brif": 1}}
        refused = http.post(f"{server.url}/v1/chat/completions", json=body)
    plain, one, two, replaced = lengths.values()
    assert plain < one == replaced < two
    assert refused.status_code == 400
    assert "'brif' is not a variable" in refused.json()["error"]["message"]
