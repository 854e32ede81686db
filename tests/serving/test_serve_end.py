"""Proves that the server shuts down in order and reports an error that ends its engine."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import minilora as ml
from helpers import served
from helpers.chats import furnish
from helpers.served import LONG, PATIENCE, SHORT, endless, error, held, http, tokenizer, wait
from helpers.source import ROOT
from minilora.generation.engine import Engine
from minilora.lora.registry import lora_layers
from minilora.serving.server import run

model = served.model


@pytest.fixture(autouse=True)
def _given_back(model):
    """Check that the model's layers are restored, whatever ends the engine."""
    before = [layer.fused for layer in lora_layers(model).values()]
    yield
    assert before and before == [layer.fused for layer in lora_layers(model).values()]


def test_draining_finishes_what_runs_and_refuses_the_rest(model):
    with endless(model, drain=10 * PATIENCE) as server:  # draining ends with the last answer
        url, found = f"{server.url}/v1/completions", []
        running = threading.Thread(
            target=lambda: found.append(http.post(url, json=LONG, timeout=60))
        )
        running.start()
        wait(lambda: server.worker.engine.rows)
        server.handle_exit(signal.SIGTERM, None)
        refused = http.post(url, json=SHORT)
        assert refused.status_code == 503 and error(refused)["code"] == "stopping"
        assert refused.headers["retry-after"] == "1"
        assert http.get(f"{server.url}/healthz").json() == {"status": "stopping"}
        running.join()
        assert found[0].json()["usage"]["completion_tokens"] == LONG["max_tokens"]
        wait(lambda: not server.servers[0].is_serving())


@pytest.mark.parametrize(("drain", "signals"), [(0.1, 1), (10 * PATIENCE, 2)])
def test_draining_ends_at_its_time_limit_or_a_second_signal(model, drain, signals):
    with endless(model, drain=drain) as server, ThreadPoolExecutor() as pool, held(server):
        pool.submit(http.post, f"{server.url}/v1/completions", json=SHORT)
        wait(lambda: server.guard.open)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        wait(lambda: not server.servers[0].is_serving())


# ---- `run`, in this process's main thread


def ran(
    engine: Engine,
    port: int,
    found: list[httpx.Response],
    count: int,
    stop: Callable[[], None] | None,
) -> None:
    """Fill `found` with the answers of `run` to `count` requests at once.

    `stop` is called when all of them are being answered.
    """
    engine.ends = frozenset()

    def ask() -> None:
        wait(lambda: listens(port))
        with ThreadPoolExecutor(8) as pool:
            asked = [
                pool.submit(http.post, f"http://127.0.0.1:{port}/v1/completions", json=LONG)
                for _ in range(count)
            ]
            if stop is not None:
                wait(lambda: len(engine.rows) == count)
                stop()
                try:
                    wait(lambda: not listens(port))
                except AssertionError:  # raised below, once `run` is over
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise
        found.extend(one.result() for one in asked)

    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(ask)
        run(engine, ml.ServeConfig(port=port, drain=10 * PATIENCE), "base", None)
    asking.result()


def listens(port: int) -> bool:
    """Return whether a server listens at this port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


# To the process, so to its main thread; or to the thread of a client, which wakes no other thread.
SENT = {
    "process": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "thread": lambda: signal.raise_signal(signal.SIGTERM),
}


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("sent", SENT)
def test_a_signal_ends_the_server_when_all_requests_are_answered(model, port, count, sent):
    """Send it while three requests run or while the server is idle.

    In both cases the signal handlers are restored.
    """
    engine, handlers = (
        Engine(model, tokenizer()),
        [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)],
    )
    found: list[httpx.Response] = []
    ran(engine, port, found, count, SENT[sent])
    assert [answer.json()["usage"]["completion_tokens"] for answer in found] == [
        LONG["max_tokens"]
    ] * count
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_an_engine_error_is_sent_to_all_clients_printed_and_raised(model, port, capsys):
    engine, found = Engine(model, tokenizer()), []
    step = engine.step

    def broken() -> Any:
        if len(engine.rows) == 3:
            raise MemoryError("no room")
        return step()

    engine.step = broken  # pyright: ignore[reportAttributeAccessIssue] the fault
    with pytest.raises(MemoryError, match="no room"):
        ran(engine, port, found, 3, None)
    assert [answer.status_code for answer in found] == [503] * 3 and error(found[0])[
        "code"
    ] == "ended"
    assert not listens(port) and "in broken" in capsys.readouterr().err  # a traceback


def test_a_port_in_use_ends_the_server_at_once(model):
    engine = Engine(model, tokenizer())
    with socket.create_server(("127.0.0.1", 0)) as held, pytest.raises(SystemExit) as ended:
        run(engine, ml.ServeConfig(port=held.getsockname()[1]), "base", None)
    assert ended.value.code


@pytest.mark.slow
def test_sigterm_under_load_finishes_answers_and_exits_with_0(tmp_path):
    """In a separate process eight running answers are finished, and a ninth request is refused."""
    place = furnish(tmp_path)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "minilora",
        "serve",
        str(place / "model"),
        "--port=0",
        "--dtype=float32",
    ]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    url = next(line.split()[-1] for line in lines if "listens at" in line)
    given: Any = LONG | {"model": "model", "max_tokens": 1000}
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(http.post(f"{url}/v1/completions", json=given, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait(lambda: "minilora_requests_running 8" in http.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    wait(lambda: http.get(f"{url}/healthz").status_code == 503)
    assert http.post(f"{url}/v1/completions", json=given).status_code == 503
    for thread in threads:
        thread.join()
    assert process.wait(30) == 0, process.stderr.read()
    assert [answer.json()["usage"]["completion_tokens"] for answer in found] == [1000] * 8
