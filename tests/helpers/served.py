"""A small model with adapters, requests and expected answers for the tests of the server."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

import minilora as ml
from helpers.chats import ours
from helpers.kinds import shake
from helpers.tiny import oracle, twin
from minilora.data import RawText, encode_prompt
from minilora.generation.engine import Engine
from minilora.generation.sequence import Ask, Piece
from minilora.models.padded_batch import inference
from minilora.serving.config import ServeConfig

NAMES = [f"adapter{number}" for number in range(8)]
# Smallest difference of the two largest logits: five times the change of a logit by batching
# (test_serve_engine.py).
MARGIN = 1e-4
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"model": "base", "prompt": [5], "max_tokens": 200, "temperature": 0}
SHORT = {"model": "base", "prompt": [5, 6], "max_tokens": 2, "temperature": 0}
PATIENCE = 120.0  # time limit in seconds; machines are shared
CALLS = ("get", "post", "request", "stream")
http = SimpleNamespace(**{name: partial(getattr(httpx, name), timeout=PATIENCE) for name in CALLS})
TARGETS = (["q_proj", "down_proj"], ["v_proj", "o_proj"], "all-linear")


def build(adapters: int = len(NAMES), **fields: Any) -> Any:
    """Return a model with the vocabulary of `ours("chatml")` and adapters.

    The adapters differ in rank, layers and answers.
    """
    sizes = {
        "vocab_size": len(ours("chatml")),
        "max_position_embeddings": 512,
        "eos_token_id": None,
    }
    model = twin(oracle(**(sizes | fields)))
    for number, name in enumerate(NAMES[:adapters]):
        config = ml.LoRAConfig(r=2 + number % 3, lora_alpha=8, target_modules=TARGETS[number % 3])
        ml.inject(model, config, name=name, seed=number)
        shake(model, number)
    return model


@cache
def tokenizer() -> Any:
    """Return a byte-level tokenizer with a chat template."""
    return ours("chatml")


def asks(count: int, seed: int = 0, **fields: Any) -> list[Ask]:
    """Return requests with prompts of many lengths, with an adapter or the base.

    One in three is sampled, the others are greedy.
    """
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt = f"canary {number}: " + "".join(rng.choices("abc de", k=rng.randint(0, 40)))
        sampled = {"temperature": 0.9, "top_p": 0.95} if number % 3 == 2 else {}
        given = {"max_tokens": rng.randint(1, 16), "seed": number} | sampled | fields
        ids = encode_prompt(RawText(prompt), tokenizer())
        made.append(Ask(ids, rng.choice([None, *NAMES]), **given))
    return made


def alone(model: Any, ask: Ask) -> str:
    """Return the text of `ml.generate` for a single request.

    Also assert that rounding cannot change an arg-max.
    """
    text = tokenizer().decode(ask.prompt)
    ml.set_adapter(model, [] if ask.adapter is None else ask.adapter)
    options = {
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "seed": ask.seed,
        "stop": list(ask.stop),
    }
    answer = ml.generate(
        model, tokenizer(), RawText(text), max_new_tokens=ask.max_tokens, **options
    )
    if not ask.temperature:
        ids = ask.prompt + tokenizer().encode(answer, add_special_tokens=False)
        with inference(model):
            top = model(torch.tensor([ids]))[0, len(ask.prompt) - 1 :].topk(2).values  # (T, 2)
        assert (top[:, 0] - top[:, 1]).min() > MARGIN, (
            "two tokens are equal but for rounding: choose other weights"
        )
    return answer


@contextmanager
def serving(
    model: Any,
    token: str | None = None,
    engine: Engine | None = None,
    ends: bool = True,
    **options: Any,
) -> Iterator[Any]:
    """Serve `model` under the name "base" in two threads of this process, at a free port.

    Yields the server with its `url`, `guard` and `worker`. With ends=False no token ends an answer,
    so every answer has the largest length.
    """
    from minilora.serving.server import build as build_server

    config = ServeConfig(port=0, **options)
    limits = {
        "batch_size": config.batch_size,
        "waiting": config.waiting,
        "max_length": config.max_length,
    }
    server: Any = build_server(
        engine or Engine(model, tokenizer(), **limits), config, "base", token
    )
    server.worker.engine.ends = server.worker.engine.ends if ends else frozenset()
    threads = [threading.Thread(target=server.run), threading.Thread(target=server.worker.run)]
    for thread in threads:
        thread.start()
    try:
        while not server.started:
            assert threads[0].is_alive()
            time.sleep(0.005)
        server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield server
    finally:
        server.should_exit = True
        threads[0].join()
        server.worker.stop()
        threads[1].join()


@contextmanager
def held(server: Any) -> Iterator[None]:
    """Block the engine's thread inside the context."""
    go_on = threading.Event()
    server.worker.call(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


def run(engine: Engine, pieces: list[Piece] | None = None) -> dict[Ask, tuple[str, str]]:
    """Step until no request is left; return the text and the finish reason of each request."""
    pieces = [] if pieces is None else pieces
    while engine.busy:
        pieces += engine.step()
    found: dict[Ask, tuple[str, str]] = {}
    for piece in pieces:
        text, finish = found.get(piece.ask, ("", ""))
        assert not finish, "a piece came after the end of the answer"
        found[piece.ask] = (text + piece.text, piece.finish or "")
    return found


def wait(until: Any, seconds: float = PATIENCE) -> None:
    """Wait until the function `until` returns True."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"the condition is not true after {seconds} seconds"
        time.sleep(0.005)


def error(answer: httpx.Response) -> dict[str, Any]:
    """Return the error in an answer, which must be an error in OpenAI's format and nothing else."""
    (name, found), *more = answer.json().items()
    assert name == "error" and not more and {*found} == {"message", "type", "param", "code"}
    return found


endless = partial(serving, ends=False)  # every answer has the largest length


@pytest.fixture(scope="module")
def model() -> Any:
    """Model that several servers of a module share."""
    return build(adapters=2)


@pytest.fixture
def url(server: Any) -> Iterator[str]:
    """Address for completions.

    After the test the server must answer another request and have no open request.
    """
    yield f"{server.url}/v1/completions"
    assert http.post(f"{server.url}/v1/completions", json=SHORT).status_code == 200
    wait(
        lambda: (
            not server.worker.engine.busy and not server.worker.listeners and not server.guard.open
        )
    )
