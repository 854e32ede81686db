"""Proves that the server is not moved by who must not ask, by what nobody should send, and by clients that leave, stall
or come too many at a time; that it stops in good order, and loudly where it cannot go on.

Each refusal is one of OpenAI's errors, and after each the server answers the next request as if nothing had been.
"""

import asyncio
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from importlib import import_module
from typing import Any

import httpx
import openai
import pytest

import minilora as ml
from chats import furnish
from minilora.cli import main
from minilora.serve import base_name, guard
from minilora.serve.config import ServeConfig
from minilora.serve.engine import Engine
from served import NAMES, alone, asks, build, run, tokenizer
from served import serving as serve_until
from source import ROOT

JSON = {"content-type": "application/json"}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"model": "base", "prompt": [5], "max_tokens": 200, "temperature": 0}
SHORT = {"model": "base", "prompt": [5, 6], "max_tokens": 2, "temperature": 0}


serving = partial(serve_until, ends=False)


@pytest.fixture(scope="module")
def model():
    return build(adapters=2)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, max_body=2000) as server:
        yield server


@pytest.fixture
def url(server):
    """And afterwards all is as before: nobody is left, and the next one is answered."""
    yield f"{server.url}/v1/completions"
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT).status_code == 200
    wait(lambda: not server.worker.engine.busy and not server.worker.listeners and not server.guard.open)


def wait(until: Any, seconds: float = 20) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def error(answer: httpx.Response) -> dict[str, Any]:
    (name, found), *more = answer.json().items()
    assert name == "error" and not more and {*found} == {"message", "type", "param", "code"}
    return found


# ---- who may ask


def test_without_the_token_nothing_is_told(model, monkeypatch):
    compared = []
    same = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or same(a, b))
    with serving(model, token="s3cret-s3cret") as server:
        for headers in ({}, {"authorization": "Bearer s3cret"}, {"authorization": "Basic s3cret-s3cret"}):
            for method, path in [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/x")]:
                refused = httpx.request(method, f"{server.url}{path}", headers=headers)
                assert refused.status_code == 401 and error(refused)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
            assert httpx.post(f"{server.url}/v1/completions", json=SHORT, headers=headers).status_code == 401
        assert compared and all(len(a) == len(b) == 32 for a, b in compared)  # hashes: not even its length shows
        for path in ("/", "/healthz"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret-s3cret", max_retries=0) as client:
            assert client.completions.create(**SHORT).choices[0].text
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_a_page_under_another_name_is_refused(server, url):
    """DNS rebinding: a stranger's page whose name leads to this machine. And what its forms could send."""
    for host in ("evil.example", "evil.example:80", ""):
        refused = httpx.post(url, json=SHORT, headers={"host": host})
        assert refused.status_code == 403 and error(refused)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000"):
        assert httpx.post(url, json=SHORT, headers={"host": host}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = httpx.post(url, content=json.dumps(SHORT), headers={"content-type": kind})
        assert refused.status_code == 415 and "application/json" in error(refused)["message"]


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({"host": "0.0.0.0"}, {}, "host 0.0.0.0: others could ask without a token. Set MINILORA_API_KEY"),
        ({"host": "example.org"}, {}, "others could ask"),
        ({}, {"MINILORA_API_KEY": ""}, "is set, to 0 characters: expected 8 or more"),
        ({}, {"MINILORA_API_KEY": " short "}, "to 5 characters"),
        ({"adapter_folder": "nowhere"}, {}, "adapter_folder: nowhere is no folder"),
        ({"port": 70000}, {}, "port: expected >= 0 and <= 65535"),
        ({"timeout": 0.0}, {}, "timeout: expected > 0"),
    ],
)
def test_a_server_that_should_not_start_does_not(model, monkeypatch, capsys, given, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ml.serve(model, tokenizer(), config=ServeConfig(**given))
    options = [f"--{name}={value}" for name, value in given.items()]
    assert main(["serve", "./nowhere", *options]) == 1 and message.split(":")[0] in capsys.readouterr().err


def test_what_is_missing_is_named(model, monkeypatch, capsys):
    monkeypatch.setattr(import_module("minilora.serve"), "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fastapi and uvicorn: pip install 'minilora\[serve\]'"):
        ml.serve(model, tokenizer())
    assert main(["serve", "./nowhere"]) == 1 and "pip install 'minilora[serve]'" in capsys.readouterr().err
    assert main(["serve", "./nowhere", "--adapter", "a"]) == 1 and "expected NAME=PATH" in capsys.readouterr().err


def test_names_of_bases_say_nothing_of_the_machine(tmp_path):
    for source, name in {str(tmp_path): tmp_path.name, "org/model": "org/model", "": "base"}.items():
        assert base_name(source) == name


def test_two_of_one_name_are_refused(model):
    with pytest.raises(ValueError, match="'adapter0' is the base's and an adapter's"):
        ml.serve(model, tokenizer(), config=ServeConfig(name=NAMES[0]))
    assert not any("forward" in vars(module) for module in model.modules())


# ---- what nobody should send


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe", b"[" * 1900, b'{"a":' * 300),
        *(b'{"model": "base", "prompt": "\\ud800"}', b'{"model": "base\\udfff", "prompt": "a"}'),
        *(b'{"model": "base", "prompt": "a", "temperature": NaN}', b'{"model":"base","prompt":"a","seed":1e999}'),
        *(b'{"model": "base", "prompt": "a", "seed": ' + b"9" * 1900 + b"}", b'{"model": "base", "prompt": [1.5]}'),
        *(b'{"model": "base", "prompt": [true]}', b'{"model": "base", "prompt": "a", "\\u0000": 1}'),
    ],
)
def test_what_is_no_request_is_a_400(url, body):
    refused = httpx.post(url, content=body, headers=JSON)
    assert refused.status_code in (400, 404) and error(refused)["message"]


def test_other_ways_and_places_are_refused(server, url):
    assert error(httpx.get(url))["message"] == "Method Not Allowed"
    assert error(httpx.get(f"{server.url}/v2"))["type"] == "not_found_error"
    assert error(httpx.get(f"{server.url}/v1/models/none"))["code"] == "model_not_found"


def test_bodies_are_small_and_quick(server, url, monkeypatch):
    fits = json.dumps(SHORT).encode()
    for size, status in ((2000, 200), (2001, 413)):
        body = fits + b" " * (size - len(fits))
        for content in (body, iter([body[:50], body[50:]])):  # with its length, and in chunks without
            answer = httpx.post(url, content=content, headers=JSON)
            assert answer.status_code == status
            assert status == 200 or error(answer)["code"] == "too_large"
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    with closing(socket.create_connection(server.servers[0].sockets[0].getsockname())) as stalls:
        stalls.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in stalls.recv(1000).split(b"\r\n")[0]


@pytest.fixture
def folders(tmp_path, model):
    """An allowed folder with an adapter, links out of it, and what lies outside."""
    allowed = tmp_path / "allowed"
    ml.save_adapter(model, allowed / "inside", name=NAMES[0])
    ml.save_adapter(model, tmp_path / "outside", name=NAMES[0])
    (allowed / "link").symlink_to(tmp_path / "outside")
    (allowed / "hollow").mkdir()
    for file in (tmp_path / "outside").iterdir():
        (allowed / "hollow" / file.name).symlink_to(file)
    (allowed / "good_link").symlink_to(allowed / "inside")
    (allowed / "file").write_text("{}")
    return allowed


def test_adapters_come_from_the_allowed_folder_alone(model, folders):
    outside = [f"{folders.parent}/outside", "../outside", "inside/../../outside", "link", "hollow"]
    nowhere = ["", "missing", "file", "a" * 5000, "a\0b", "~", "org/repository", "/"]
    with serving(build(adapters=0), adapter_folder=str(folders)) as server:
        for path in outside + nowhere:
            refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": path})
            assert refused.status_code == 400
            message = f"lora_path: {path!r} is no adapter's folder inside the server's."
            assert not path or error(refused)["message"] == message
        for name in ("", "a.b", "../a", "a" * 65, "keys"):
            refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "inside"})
            assert refused.status_code == 400, name
        for name, path in {"one": "inside", "two": "good_link", "three": f"{folders}/inside"}.items():
            answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
            assert answer.status_code == 200, answer.text
        assert server.worker.engine.adapters == ["one", "two", "three"]


def test_without_an_allowed_folder_nothing_is_loaded(server, url):
    refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"})
    assert refused.status_code == 403 and "--adapter_folder" in error(refused)["message"]


# ---- too many, too long, gone


def test_too_many_at_a_time_are_told_when_to_come_again(model):
    with serving(model, batch_size=1, waiting=1) as server:
        url, statuses = f"{server.url}/v1/completions", []
        threads = [
            threading.Thread(target=lambda: statuses.append(httpx.post(url, json=LONG, timeout=60).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait(lambda: len(server.worker.engine.rows) + len(server.worker.engine.waiting) == 2)
        refused = httpx.post(url, json=SHORT)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert error(refused)["type"] == "rate_limit_error"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=10) as client:
            assert client.completions.create(**SHORT).choices[0].finish_reason == "length"  # it waits and comes again
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]


def test_an_answer_ends_when_its_time_is_over(model):
    with serving(model, timeout=0.2) as server:
        url = f"{server.url}/v1/completions"
        late = httpx.post(url, json=LONG)
        assert late.status_code == 504 and error(late)["code"] == "timeout"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            said = []
            with pytest.raises(openai.APIError, match="not complete when its time was over"):
                for chunk in client.completions.create(stream=True, **LONG):
                    said.append(chunk.choices[0].text)
        assert "".join(said)
        assert 'minilora_answers_total{reason="timeout"} 2' in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place(server, url, stream):
    engine = server.worker.engine
    with closing(socket.create_connection(server.servers[0].sockets[0].getsockname())) as leaves:
        body = json.dumps(LONG | {"stream": stream}).encode()
        leaves.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait(lambda: engine.rows)
        (row,) = engine.rows
    wait(lambda: not engine.rows)
    assert row.done and len(row.text.ids) < LONG["max_tokens"]


def test_who_reads_slowly_keeps_nobody_waiting(server, url, monkeypatch):
    """A client that takes the first event and then nothing, as the server sees it: `send` does not return."""
    monkeypatch.setattr(guard, "GRACE", 0.5 - server.guard.config.timeout)
    body, sent, asked = json.dumps(LONG | {"stream": True}).encode(), [], []
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}

    async def stalled() -> None:
        async def receive() -> Any:
            if asked:
                await asyncio.Event().wait()
            asked.append(1)
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 1:
                await asyncio.Event().wait()

        begun = time.monotonic()
        await server.guard(scope | {"asgi": {"spec_version": "2.3"}, "raw_path": b"", "root_path": ""}, receive, send)
        assert 0.4 < time.monotonic() - begun < 10

    future = asyncio.run_coroutine_threadsafe(stalled(), server.servers[0].get_loop())
    wait(lambda: len(sent) == 2)
    assert httpx.post(url, json=SHORT).status_code == 200
    future.result()
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


# ---- the end


def test_draining_finishes_what_runs_and_refuses_the_rest(model):
    with serving(model) as server:
        url, found = f"{server.url}/v1/completions", []
        running = threading.Thread(target=lambda: found.append(httpx.post(url, json=LONG, timeout=60)))
        running.start()
        wait(lambda: server.worker.engine.rows)
        server.handle_exit(signal.SIGTERM, None)
        refused = httpx.post(url, json=SHORT)
        assert refused.status_code == 503 and error(refused)["code"] == "stopping"
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/healthz").json() == {"status": "stopping"}
        running.join()
        assert found[0].json()["usage"]["completion_tokens"] == LONG["max_tokens"]
        wait(lambda: not server.servers[0].is_serving())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_tells_everybody_and_ends_the_server(model):
    engine = Engine(model, tokenizer())
    step, count = engine.step, []

    def broken() -> Any:
        count.append(1)
        if len(count) > 3:
            raise MemoryError("no room")
        return step()

    engine.step = broken  # pyright: ignore[reportAttributeAccessIssue] the fault
    with serving(model, engine=engine) as server:
        url = f"{server.url}/v1/completions"
        found: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: found.append(httpx.post(url, json=LONG))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in found] == [503] * 3 and error(found[0])["code"] == "ended"
        wait(lambda: not server.servers[0].is_serving())
        assert server.worker.failed
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.slow
def test_sigterm_under_load_ends_well(tmp_path):
    """A process of its own: eight answers are under way, all are finished, a ninth is refused, the status is 0."""
    place = furnish(tmp_path)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minilora", "serve", str(place / "model"), "--port=0", "--dtype=float32"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    url = next(line.split()[-1] for line in lines if "listens at" in line)
    given: Any = LONG | {"model": "model", "max_tokens": 1000}
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(httpx.post(f"{url}/v1/completions", json=given, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait(lambda: "minilora_requests_running 8" in httpx.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    wait(lambda: httpx.get(f"{url}/healthz").status_code == 503)
    assert httpx.post(f"{url}/v1/completions", json=given).status_code == 503
    for thread in threads:
        thread.join()
    assert process.wait(30) == 0, process.stderr.read()
    assert [answer.json()["usage"]["completion_tokens"] for answer in found] == [1000] * 8


@pytest.mark.slow
def test_clients_that_come_and_go_for_a_while(model):
    """Hundreds of requests, a third of which leave under way; who stays gets the answer it would get alone."""
    wanted = [ask for ask in asks(150, seed=2) if ask.adapter in (None, *NAMES[:2])]
    twin = build(adapters=2)
    expected = [alone(twin, ask) for ask in wanted]
    with serve_until(model, batch_size=6, waiting=200) as server:

        async def one(client: Any, number: int) -> str | None:
            ask = wanted[number]
            given: Any = {"model": ask.adapter or "base", "prompt": ask.prompt, "max_tokens": ask.max_tokens}
            given |= {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
            await asyncio.sleep(0.01 * (number % 17))
            if number % 3 == 0:
                try:
                    await asyncio.wait_for(client.completions.create(**given | {"max_tokens": 300}), 0.05)
                except TimeoutError:
                    return None
            if number % 3 == 1:
                return (await client.completions.create(**given)).choices[0].text
            return "".join(
                [chunk.choices[0].text async for chunk in await client.completions.create(stream=True, **given)]
            )

        async def everybody() -> list[str | None]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(one(client, number) for number in range(len(wanted))))

        found = asyncio.run(everybody())
        wait(lambda: not server.worker.engine.busy and not server.worker.listeners and not server.guard.open)
    stayed = [number for number in range(len(wanted)) if number % 3]
    assert [found[number] for number in stayed] == [expected[number] for number in stayed]
    assert found.count(None) > 10
    assert run(server.worker.engine) == {}
