"""Proves that clients that disconnect, stall or come too many at a time affect no other client.

Oracle of the load test: `ml.generate` for each request alone.
"""

import asyncio
import json
import socket
import threading
import time
from contextlib import closing
from typing import Any

import openai
import pytest

from helpers import served
from helpers.served import (
    HEAD,
    LONG,
    NAMES,
    SHORT,
    alone,
    asks,
    build,
    endless,
    error,
    held,
    http,
    run,
    serving,
    wait,
)
from minilora.generation.sequence import Ask
from minilora.serving import middleware
from minilora.serving.engine_client import Desk
from minilora.serving.metrics import Metrics

model, url = served.model, served.url


@pytest.fixture(scope="module")
def server(model):
    with endless(model) as server:
        yield server


def test_the_address_is_printed_once(model, capsys):
    """uvicorn's tick counter returns to 0 once a day, and then the address is not printed again."""
    with endless(model) as server:
        asyncio.run_coroutine_threadsafe(server.on_tick(0), server.servers[0].get_loop()).result()
    assert capsys.readouterr().err.count(f"minilora listens at {server.url}\n") == 1


# ---- too many requests, time limits, disconnected clients


def test_too_many_requests_are_refused_with_a_time_to_retry(model):
    with endless(model, batch_size=1, waiting=1) as server:
        url, statuses = f"{server.url}/v1/completions", []
        threads = [
            threading.Thread(
                target=lambda: statuses.append(http.post(url, json=LONG, timeout=60).status_code)
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait(lambda: len(server.worker.engine.rows) + len(server.worker.engine.waiting) == 2)
        refused = http.post(url, json=SHORT)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert error(refused)["type"] == "rate_limit_error"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=10) as client:
            # the client waits and tries again
            assert client.completions.create(**SHORT).choices[0].finish_reason == "length"
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]


def test_an_answer_ends_at_its_time_limit(model):
    with endless(model, timeout=0.2) as server:
        url = f"{server.url}/v1/completions"
        late = http.post(url, json=LONG)
        assert late.status_code == 504 and error(late)["code"] == "timeout"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            said = []
            with pytest.raises(openai.APIError, match="not complete at the time limit"):
                for chunk in client.completions.create(stream=True, **LONG):
                    said.append(chunk.choices[0].text)
        assert "".join(said)
        assert (
            'minilora_answers_total{reason="timeout"} 2' in http.get(f"{server.url}/metrics").text
        )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_place(server, url, stream):
    engine = server.worker.engine
    with closing(socket.create_connection(server.servers[0].sockets[0].getsockname())) as leaves:
        body = json.dumps(LONG | {"stream": stream}).encode()
        leaves.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait(lambda: engine.rows)
        (row,) = engine.rows
    wait(lambda: not engine.rows)
    assert row.done and len(row.text.ids) < LONG["max_tokens"]


def test_a_slow_reader_does_not_delay_other_clients(server, url, monkeypatch):
    """After the first event the client reads nothing, so `send` in the server does not return."""
    monkeypatch.setattr(middleware, "GRACE", 0.5 - server.guard.config.timeout)
    body, sent, asked = json.dumps(LONG | {"stream": True}).encode(), [], []
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": headers,
        "query_string": b"",
    }

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
        await server.guard(
            scope | {"asgi": {"spec_version": "2.3"}, "raw_path": b"", "root_path": ""},
            receive,
            send,
        )
        assert 0.4 < time.monotonic() - begun < 10

    future = asyncio.run_coroutine_threadsafe(stalled(), server.servers[0].get_loop())
    wait(lambda: len(sent) == 2)
    assert http.post(url, json=SHORT).status_code == 200
    future.result()
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_a_request_to_an_engine_that_hangs_ends_at_its_time_limit(server, url, monkeypatch):
    monkeypatch.setattr(middleware, "GRACE", 0.2 - server.guard.config.timeout)
    with held(server):
        late = http.post(url, json=LONG)
        assert late.status_code == 504 and error(late)["code"] == "timeout"


def test_a_request_cancelled_while_it_is_accepted_frees_its_place(server, url, monkeypatch):
    engine, ask, rows = server.worker.engine, Ask([5], max_tokens=200), []
    entered, go_on = threading.Event(), threading.Event()
    accept = engine.submit

    def slow(asks: Any) -> None:
        entered.set()
        go_on.wait()
        accept(asks)
        rows.extend(engine.waiting)

    async def leave() -> None:
        begun = asyncio.create_task(
            Desk(server.worker, server.guard.config, "base", Metrics()).begin([ask])
        )
        await asyncio.to_thread(entered.wait)
        begun.cancel()
        with pytest.raises(asyncio.CancelledError):
            await begun

    monkeypatch.setattr(engine, "submit", slow)
    asyncio.run(leave())
    go_on.set()
    wait(lambda: rows and rows[0].done)
    assert not rows[0].text.ids


@pytest.mark.slow
def test_clients_that_come_and_go_for_a_while(model):
    """A third of the clients disconnect early; the others get the answers of single requests."""
    wanted = [ask for ask in asks(150, seed=2) if ask.adapter in (None, *NAMES[:2])]
    twin = build(adapters=2)
    expected = [alone(twin, ask) for ask in wanted]
    with serving(model, batch_size=6, waiting=200) as server:

        async def one(client: Any, number: int) -> str | None:
            ask = wanted[number]
            given: Any = {
                "model": ask.adapter or "base",
                "prompt": ask.prompt,
                "max_tokens": ask.max_tokens,
            }
            given |= {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
            await asyncio.sleep(0.01 * (number % 17))
            if number % 3 == 0:
                try:
                    await asyncio.wait_for(
                        client.completions.create(**given | {"max_tokens": 300}), 0.05
                    )
                except TimeoutError:
                    return None
            if number % 3 == 1:
                return (await client.completions.create(**given)).choices[0].text
            return "".join(
                [
                    chunk.choices[0].text
                    async for chunk in await client.completions.create(stream=True, **given)
                ]
            )

        async def everybody() -> list[str | None]:
            async with openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0
            ) as client:
                return await asyncio.gather(*(one(client, number) for number in range(len(wanted))))

        found = asyncio.run(everybody())
        wait(
            lambda: (
                not server.worker.engine.busy
                and not server.worker.listeners
                and not server.guard.open
            )
        )
    stayed = [number for number in range(len(wanted)) if number % 3]
    assert [found[number] for number in stayed] == [expected[number] for number in stayed]
    assert found.count(None) > 10
    assert run(server.worker.engine) == {}
