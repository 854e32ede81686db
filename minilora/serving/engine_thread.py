"""What runs the engine. What other threads ask of it is done between two steps, in the order in which it was asked.

    anybody -- call, submit, cancel -->  inbox  -->  engine.step()  -- pieces -->  the listener of each request

An exception that no request is to blame for (out of memory, a bug) ends the run, and every request is told so: what
the batch holds can no longer be trusted, and whoever supervises the process starts a new one.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from minilora.generation.engine import Engine, Full
from minilora.generation.sequence import Ask, Piece

Listener = Callable[[Piece], Any]
WAKE = 1.0  # seconds: a signal that another thread gets, or that comes just before a wait, does not end it
REFUSALS = (Full, ValueError, OSError)  # what callers are told; the engine is as it was


class Ended(Exception):
    """The engine answers nobody any more."""


class Worker:
    """`run` runs `engine` until `stop`; `failed` says whether it ended otherwise."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.listeners: dict[Ask, Listener] = {}
        self.stopping = self.over = False
        self.ending = threading.Lock()  # nothing is put in the inbox behind its last reader

    @property
    def failed(self) -> bool:
        """Whether an exception has ended the run."""
        return self.over and not self.stopping

    def call(self, function: Callable[..., Any], *given: Any) -> Future[Any]:
        """What `function(*given)` returns, or raises of REFUSALS, when it has run between two steps."""
        future: Future[Any] = Future()
        with self.ending:
            if self.over:
                future.set_exception(Ended("the engine has ended"))
            else:
                self.inbox.put((future, function, given))
        return future

    def submit(self, asks: Sequence[Ask], listener: Listener) -> Future[None]:
        """Engine.submit; from then on `listener` is called with each piece, in the thread of `run`."""

        def accept() -> None:
            self.engine.submit(asks)
            self.listeners.update(dict.fromkeys(asks, listener))

        return self.call(accept)

    def cancel(self, asks: Sequence[Ask]) -> None:
        """Forget requests, of which nobody wants to hear any more."""

        def forget() -> None:
            for ask in asks:
                if self.listeners.pop(ask, None) is not None:
                    self.engine.cancel(ask)

        self.call(forget)

    def stop(self) -> None:
        """End `run` after the step it is in. Requests that are left hear an error."""
        self.stopping = True
        self.call(lambda: None)

    def run(self) -> None:
        """Answer until `stop`, in the thread that calls; what the engine raises of itself is raised."""
        try:
            while not self.stopping:
                self._read()
                for piece in self.engine.step() if self.engine.busy else ():
                    self._tell(piece)
        finally:
            with self.ending:
                self.over = True
            while not self.inbox.empty():
                future = self.inbox.get()[0]
                if future.set_running_or_notify_cancel():
                    future.set_exception(Ended("the engine has ended"))
            for ask in [*self.listeners]:
                self._tell(Piece(ask, finish="error"))
            self.engine.close()

    def _read(self) -> None:
        """Do what is asked; with nobody to answer, wait for something."""
        while not self.inbox.empty() or not (self.engine.busy or self.stopping):
            try:
                future, function, given = self.inbox.get(timeout=WAKE)
            except queue.Empty:
                continue
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(function(*given))
            except REFUSALS as error:
                future.set_exception(error)

    def _tell(self, piece: Piece) -> None:
        listener = self.listeners.pop(piece.ask, None) if piece.finish else self.listeners.get(piece.ask)
        if listener is not None:
            listener(piece)
