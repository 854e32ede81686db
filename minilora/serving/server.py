"""The server as a process: HTTP has a thread of its own, the engine the caller's, and both stop in good order.

SIGTERM, Ctrl-C     new requests get 503, answers under way are finished, for `drain` seconds at most; status 0
the engine fails    every request is told, its error is printed and raised, so a status that is not 0

Not the other way round: the thread that read the model has used OpenMP, and GNU's waits between two operations by
sleeping, not spinning, when a second one uses it too, because the process then has more of its threads than cores
(gomp_throttled_spin_count). That made a step of SmolLM2 on two cores a quarter longer (docs/LOG.md).
"""

import socket
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn

from minilora.generation.engine import Engine
from minilora.serving.app import create_app
from minilora.serving.config import ServeConfig
from minilora.serving.engine_thread import Worker
from minilora.serving.middleware import Guard


class Server(uvicorn.Server):
    """uvicorn's, which goes on listening while it drains: a client is told 503 and not refused a connection."""

    guard: Guard
    worker: Worker
    until = float("inf")  # when draining is over

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins to drain, the second ends it. uvicorn would raise it again at the end."""
        self.until = 0.0 if self.guard.draining else time.monotonic() + self.guard.config.drain
        self.guard.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        address = f"[{host}]" if ":" in host else host
        print(f"minilora listens at http://{address}:{port}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        drained = self.guard.draining and (not self.guard.open or time.monotonic() > self.until)
        return await super().on_tick(counter) or drained or self.worker.failed


def build(engine: Engine, config: ServeConfig, name: str, token: str | None) -> Server:
    """A server, which answers while its worker runs."""
    worker = Worker(engine)
    guard: Any = create_app(worker, config, name, token)
    settings = uvicorn.Config(
        guard,
        host=config.host,
        port=config.port,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,  # for what is still open when draining is over
        limit_concurrency=4 * (config.batch_size + config.waiting) + 16,  # connections; beyond: 503
    )
    server = Server(settings)
    server.guard, server.worker = guard, worker
    return server


def run(engine: Engine, config: ServeConfig, name: str, token: str | None) -> None:
    """Serve until told to stop, by a signal if this is the main thread. Raises what the engine failed with."""
    server = build(engine, config, name, token)
    with server.capture_signals(), ThreadPoolExecutor(1, "minilora http") as pool:
        listening = pool.submit(server.run)
        listening.add_done_callback(lambda _: server.worker.stop())
        try:
            server.worker.run()
        except Exception:  # which the server's next tick sees; a command line shows no traceback of some
            traceback.print_exc()
            raise
    listening.result()  # raises what kept it from listening
