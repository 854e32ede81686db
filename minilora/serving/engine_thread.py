"""The thread that runs the engine.

Other threads send calls. The engine thread runs them between two steps, in the order of arrival.

    other threads -- call, submit, cancel -->  inbox  -->  engine.step()  -- pieces -->  listeners

An exception that no single request has caused (out of memory, a bug) ends the run, and every
request receives an error. The state of the batch is not reliable after such an exception, so the
supervisor of the process must start a new one.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from minilora.generation.engine import Engine, Full
from minilora.generation.sequence import Ask, Piece

Listener = Callable[[Piece], Any]

# Seconds. A signal does not end a wait if another thread receives it, or if it arrives just before
# the wait, so a wait has a limit.
WAIT_SECONDS = 1.0

# Exceptions that go back to the caller. The engine is then unchanged.
REFUSALS = (Full, ValueError, OSError)


class Ended(Exception):
    """The engine has ended and answers no more requests."""


class Worker:
    """The engine thread: `run` runs the engine until `stop`.

    Args:
        engine: the engine.

    Attributes:
        listeners: request -> the function that receives its pieces.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.listeners: dict[Ask, Listener] = {}
        self.stopping = False
        self.has_ended = False
        self.end_lock = threading.Lock()  # no call enters the inbox after its last reading

    @property
    def failed(self) -> bool:
        """True if an exception has ended the run."""
        return self.has_ended and not self.stopping

    def call(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a function in the engine thread, between two steps.

        Args:
            function: the function.
            *arguments: its arguments.

        Returns:
            A future of the function's result. It raises the exceptions of REFUSALS that the
            function raises, and `Ended` if the engine has ended.
        """
        future: Future[Any] = Future()
        with self.end_lock:
            if self.has_ended:
                future.set_exception(Ended("the engine has ended"))
            else:
                self.inbox.put((future, function, arguments))
        return future

    def submit(self, asks: Sequence[Ask], listener: Listener) -> Future[None]:
        """Add requests to the engine's queue, all or none.

        Args:
            asks: the requests.
            listener: the function that receives each piece, in the engine thread.

        Returns:
            A future that ends when the engine has accepted the requests.
        """

        def accept() -> None:
            self.engine.submit(asks)
            self.listeners.update(dict.fromkeys(asks, listener))

        return self.call(accept)

    def cancel(self, asks: Sequence[Ask]) -> None:
        """Remove requests whose clients have left.

        Args:
            asks: the requests; those that are complete are ignored.
        """

        def remove() -> None:
            for ask in asks:
                if self.listeners.pop(ask, None) is not None:
                    self.engine.cancel(ask)

        self.call(remove)

    def stop(self) -> None:
        """End `run` after the current step. The remaining requests receive an error."""
        self.stopping = True
        self.call(lambda: None)  # ends the wait for a call

    def run(self) -> None:
        """Run the engine in the calling thread until `stop`. An engine's exception is raised."""
        try:
            while not self.stopping:
                self._run_calls()
                if self.engine.busy:
                    for piece in self.engine.step():
                        self._deliver(piece)
        finally:
            self._end()

    def _run_calls(self) -> None:
        """Run the calls of the inbox; an idle engine waits for one."""
        while not self.inbox.empty() or not (self.engine.busy or self.stopping):
            try:
                future, function, arguments = self.inbox.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                continue
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(function(*arguments))
            except REFUSALS as error:
                future.set_exception(error)

    def _end(self) -> None:
        """Refuse the calls of the inbox, send an error to every listener, close the engine."""
        with self.end_lock:
            self.has_ended = True
        while not self.inbox.empty():
            future, _, _ = self.inbox.get()
            if future.set_running_or_notify_cancel():
                future.set_exception(Ended("the engine has ended"))
        for ask in [*self.listeners]:
            self._deliver(Piece(ask, finish="error"))
        self.engine.close()

    def _deliver(self, piece: Piece) -> None:
        """Call the listener of a piece; the last piece of an answer removes the listener."""
        listener = self.listeners.get(piece.ask)
        if piece.finish:
            self.listeners.pop(piece.ask, None)
        if listener is not None:
            listener(piece)
