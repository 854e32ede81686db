"""The server process: HTTP has its own thread, the engine has the caller's, and both stop in order.

SIGTERM, Ctrl-C    new requests get 503, running answers finish within `drain` seconds; status 0
engine exception   every request gets an error, the exception is printed and raised; status not 0

The engine does not get the new thread, for a reason of speed. The caller's thread has loaded the
model and has used OpenMP. If a second thread uses OpenMP too, the process has more OpenMP threads
than cores, and GNU's threads then sleep between two operations and do not spin
(gomp_throttled_spin_count). A step of SmolLM2 on two cores took a quarter longer (docs/LOG.md).
"""

import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from minilora.common.notebook import note
from minilora.generation.engine import Engine
from minilora.serving.app import create_app
from minilora.serving.config import ServeConfig
from minilora.serving.engine_thread import Worker
from minilora.serving.middleware import Guard


class Server(uvicorn.Server):
    """uvicorn's server, which still listens while running answers finish.

    A new client then receives status 503, not a refused connection.

    Attributes:
        guard: the middleware.
        worker: the engine thread.
        drain_deadline: the time at which the server stops waiting for running answers.
    """

    guard: Guard
    worker: Worker
    drain_deadline = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one starts draining, the second one ends it.

        uvicorn's own method would raise the signal again at the end.

        Args:
            sig: the signal's number.
            frame: the interrupted frame, which is not used.
        """
        if self.guard.draining:
            self.drain_deadline = 0.0
        else:
            self.drain_deadline = time.monotonic() + self.guard.config.drain
        self.guard.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and print the address.

        Args:
            sockets: open sockets; None opens one at the configured address.
        """
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        address = f"[{host}]" if ":" in host else host  # IPv6 needs brackets
        note(f"minilora listens at http://{address}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server must stop; uvicorn calls it ten times a second.

        Args:
            counter: the number of the tick.

        Returns:
            True at the end of draining, after an engine's exception, or for uvicorn's reasons.
        """
        if await super().on_tick(counter):
            return True
        if self.worker.failed:
            return True
        deadline_is_over = time.monotonic() > self.drain_deadline
        return self.guard.draining and (self.guard.open == 0 or deadline_is_over)


def build(engine: Engine, config: ServeConfig, name: str, token: str | None) -> Server:
    """Return a server. It answers while its worker runs.

    Args:
        engine: the engine.
        config: the options of the server.
        name: the model name of the base.
        token: the token that clients must send; None accepts requests without one.

    Returns:
        The server.
    """
    worker = Worker(engine)
    guard: Any = create_app(worker, config, name, token)
    settings = uvicorn.Config(
        _with_cors(guard, config),
        host=config.host,
        port=config.port,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,  # seconds for requests still open at the end of draining
        limit_concurrency=4 * (config.batch_size + config.waiting) + 16,  # connections; more: 503
    )
    server = Server(settings)
    server.guard = guard
    server.worker = worker
    return server


def _with_cors(guard: Any, config: ServeConfig) -> Any:
    """Return the application with the headers that let pages of other origins read answers.

    The headers stand outside the middleware: a browser asks for them without the token, and a page
    must be able to read a refusal too.
    """
    if not config.origins:
        return guard
    return CORSMiddleware(
        guard, allow_origins=config.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )


def run(engine: Engine, config: ServeConfig, name: str, token: str | None) -> None:
    """Serve until a signal arrives. Only the main thread receives signals.

    Args:
        engine: the engine; it runs in the calling thread.
        config: the options of the server.
        name: the model name of the base.
        token: the token that clients must send; None accepts requests without one.

    Raises:
        Exception: an exception that ended the engine.
        SystemExit: the server cannot listen at its address.
    """
    server = build(engine, config, name, token)
    with server.capture_signals(), ThreadPoolExecutor(1, "minilora http") as pool:
        http_thread = pool.submit(server.run)
        http_thread.add_done_callback(lambda _: server.worker.stop())
        try:
            server.worker.run()
        except Exception:  # of any kind: its traceback is printed, and the exception goes on
            # The command line prints no traceback for some exceptions. The server stops at its
            # next tick.
            traceback.print_exc()
            raise
    http_thread.result()  # raises the error that kept the server from listening
