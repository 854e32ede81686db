"""Proves that the server's log-probabilities are those of the model, in OpenAI's shapes.

Oracle: log_softmax of the logits of the same model in transformers, in fp32, for prompts (echo) and
answers. Property: the tokens together are the text, offsets point at them, a stream gives the same
as a whole answer. Error: fields that need another one.
"""

from typing import Any

import openai
import pytest
import torch

from helpers.chats import ours
from helpers.served import build, http, serving, tokenizer
from helpers.tiny import oracle, twin
from minilora.generation.engine import Engine
from minilora.generation.scores import TokenTexts, byte_letters

TOLERANCE = 1e-4  # nats; logits of this model differ by about 1e-6 between the two libraries
PROMPTS = ["hello world", "naïve 🙂 a", "b"]
IDS = [tokenizer().encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def models():
    sizes = {"vocab_size": len(ours("chatml")), "max_position_embeddings": 512}
    reference = oracle(**sizes, eos_token_id=None)
    return reference, twin(reference)


@pytest.fixture(scope="module")
def client(models):
    with serving(models[1]) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


def log_p(models: Any, ids: list[int]) -> torch.Tensor:
    """Return log p(next token) after each token of `ids`, (T, V)."""
    with torch.no_grad():
        return models[0](torch.tensor([ids])).logits[0].log_softmax(-1)


# ---- oracle


@pytest.mark.parametrize("prompts", [PROMPTS, IDS, PROMPTS[1], IDS[1]], ids=str)
def test_echo_gives_the_log_likelihood_of_transformers(client, models, prompts):
    answer = client.completions.create(
        model="base", prompt=prompts, max_tokens=0, echo=True, logprobs=3, temperature=0
    )
    expected = [(PROMPTS[1], IDS[1])]
    if len(answer.choices) == 3:
        expected = [*zip(PROMPTS, IDS, strict=True)]
    assert len(answer.choices) == len(expected)
    assert answer.usage.completion_tokens == 0
    for choice, (text, ids) in zip(answer.choices, expected, strict=True):
        assert choice.text == text and choice.finish_reason == "length"
        found = choice.logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        reference = log_p(models, ids)
        for place, token in enumerate(ids[1:]):
            wanted = reference[place, token].item()
            assert abs(found.token_logprobs[place + 1] - wanted) < TOLERANCE
            best = reference[place].topk(3).values.tolist()
            top = found.top_logprobs[place + 1]
            assert 3 <= len(top) <= 4
            assert torch.tensor([*top.values()][:3]).sub(torch.tensor(best)).abs().max() < TOLERANCE


def test_answers_have_the_log_probabilities_of_the_model(client, models):
    """Temperature and penalties change the choice, and not the log-probabilities."""
    answer = client.completions.create(
        model="base",
        prompt=IDS[0],
        max_tokens=6,
        logprobs=2,
        temperature=1.5,
        seed=1,
        presence_penalty=1.0,
        extra_body={"ignore_eos": True},
    )
    found = answer.choices[0].logprobs
    ids = [*IDS[0]]
    known = {TokenTexts(tokenizer()).text_of(token): token for token in range(len(tokenizer()))}
    for text, value in zip(found.tokens, found.token_logprobs, strict=True):
        token = known[text]
        assert abs(value - log_p(models, ids)[-1, token].item()) < TOLERANCE
        ids.append(token)
    assert len(ids) == len(IDS[0]) + 6


# ---- property


def test_offsets_point_at_the_tokens(client):
    text = "naïve 🙂 a<|im_end|>b"
    for prompt in (text, tokenizer().encode(text)):
        answer = client.completions.create(
            model="base", prompt=prompt, max_tokens=3, echo=True, logprobs=0, temperature=0
        )
        choice = answer.choices[0]
        found = choice.logprobs
        assert choice.text.startswith(text)
        assert [*found.tokens[-4:-3]] == ["b"] and "<|im_end|>" in found.tokens
        parts = 0
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            if token.startswith("bytes:"):
                parts += 1
                if offset < len(text):  # in the prompt, whose characters are complete
                    letter = choice.text[offset].encode()
                    assert bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) in letter
            else:
                assert choice.text[offset : offset + len(token)] == token
        assert parts >= 2, "no character has several tokens"


def test_a_bos_that_the_tokenizer_adds_is_a_token_without_text():
    bos = "<|begin_of_text|>"
    llama = ours("llama3")
    model = build(adapters=0, vocab_size=len(llama))
    body: Any = {"model": "base", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    with serving(model, engine=Engine(model, llama)) as server:
        for prompt, text, offsets in [
            ("hello wo", "hello wo", [0, 0, 5, 7, 8]),
            (llama.encode("hello wo"), f"{bos}hello wo", [0, 17, 22, 24, 25]),
        ]:
            answer = http.post(f"{server.url}/v1/completions", json=body | {"prompt": prompt})
            (choice,) = answer.json()["choices"]
            assert choice["text"].startswith(text) and not choice["text"].startswith(bos + bos)
            assert choice["logprobs"]["tokens"][:4] == [bos, "hello", " w", "o"]
            assert choice["logprobs"]["text_offset"] == offsets


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_has_the_log_probabilities_of_a_whole_answer(client, kind):
    given: Any = {"model": "base", "max_tokens": 12, "temperature": 1.0, "seed": 3}
    if kind == "chat":
        given |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
        given["top_logprobs"] = 2
        create = client.chat.completions.create
    else:
        given |= {"prompt": PROMPTS[1], "logprobs": 2, "echo": True}
        create = client.completions.create
    whole = create(**given).choices[0]
    chunks = [chunk.choices[0] for chunk in create(**given, stream=True)]
    wanted = whole.logprobs.model_dump()
    pieces = [chunk.logprobs.model_dump() for chunk in chunks if chunk.logprobs is not None]
    for name in wanted:
        if wanted[name] is not None:
            together = [entry for piece in pieces for entry in piece[name]]
            assert together == wanted[name]
    assert len(pieces) > 3
    if kind == "completion":
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert whole.text.startswith(PROMPTS[1])


def test_chat_tokens_together_are_the_content(client):
    answer = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=30,
        temperature=0.7,
        seed=2,
        logprobs=True,
        top_logprobs=3,
    )
    choice = answer.choices[0]
    content = choice.logprobs.content
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode(errors="replace") == choice.message.content
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3


def test_the_end_token_is_the_last_of_a_completion(client):
    """lm-eval takes the last token for the generated one, so there must be one."""
    end = tokenizer().eos_token_id
    given: Any = {"model": "base", "max_tokens": 1, "temperature": 0, "logit_bias": {str(end): 100}}
    answer = client.completions.create(prompt=IDS[0], echo=True, logprobs=1, **given)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(IDS[0]) + 1 and found.tokens[-1] == "<|im_end|>"
    assert answer.choices[0].text == PROMPTS[0]
    messages: Any = [{"role": "user", "content": "a"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, **given)
    assert chat.choices[0].logprobs.content == []


def test_tokens_of_a_stop_string_are_left_out(client):
    given: Any = {"model": "base", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    free = client.completions.create(logprobs=0, **given).choices[0]
    stop = free.text[3:5]
    cut = client.completions.create(logprobs=0, stop=stop, **given).choices[0]
    assert cut.text == free.text.partition(stop)[0]
    tokens = cut.logprobs.tokens
    assert tokens == free.logprobs.tokens[: len(tokens)]
    assert len(tokens) > 1 and max(cut.logprobs.text_offset) < len(cut.text)
    assert len(tokens) < len(free.logprobs.tokens)


def test_texts_of_tokens_are_their_bytes():
    assert sorted(byte_letters().values()) == [*range(256)]
    texts = TokenTexts(tokenizer())
    ids = tokenizer().encode("é🙂 a<|im_end|>", add_special_tokens=False)
    raw = b"".join(texts.bytes_of(token) for token in ids)
    assert raw.decode() == "é🙂 a<|im_end|>"


# ---- error


def test_fields_of_log_probabilities_are_checked():
    chat = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    complete = {"model": "base", "prompt": "a", "max_tokens": 1}
    cases = [
        (
            "chat/completions",
            chat | {"top_logprobs": 2},
            "top_logprobs: allowed only with logprobs",
        ),
        (
            "chat/completions",
            chat | {"logprobs": 2},
            "logprobs: expected true or false, got a number",
        ),
        ("completions", complete | {"logprobs": 21}, "logprobs: expected at most 20"),
        ("completions", complete | {"logprobs": True}, "logprobs: expected"),
    ]
    with serving(build(adapters=0)) as server:
        for route, body, message in cases:
            refused = http.post(f"{server.url}/v1/{route}", json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["message"].startswith(message)
