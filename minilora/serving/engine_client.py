"""Between the routes and the engine's thread: requests go in, pieces come out, names of models are known.

Everything here runs in the event loop's thread; the engine's own (engine_thread.py) hands pieces over by
call_soon_threadsafe.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from minilora.data.prompt import encode_prompt
from minilora.generation.engine import Full
from minilora.generation.sequence import Ask, Piece
from minilora.serving.config import ServeConfig
from minilora.serving.engine_thread import Ended, Worker
from minilora.serving.metrics import Metrics
from minilora.serving.middleware import Refused, inside


class Desk:
    """`names`: model name -> its adapter, None for the base, which comes first."""

    def __init__(self, worker: Worker, config: ServeConfig, name: str, metrics: Metrics) -> None:
        self.worker, self.config, self.metrics = worker, config, metrics
        self.names: dict[str, str | None] = {name: None} | {own: own for own in worker.engine.adapters}
        self.base = name
        self.created = int(time.time())

    def adapter(self, name: str) -> str | None:
        """The adapter of a model's name. Refused for an unknown one."""
        if name not in self.names:
            message = f"model {name!r} is not served here. Expected one of {', '.join(self.names)}."
            raise Refused(404, message, "model_not_found", "model")
        return self.names[name]

    async def ask(self, prompt: Any, adapter: str | None, body: Any, given: int | None, usual: int | None) -> Ask:
        """A request of `prompt` (token ids, or what encode_prompt takes) with the options of `body`; `given` tokens at
        most, `usual` (None: all that fit) if it does not say. Refused for what cannot be encoded, or asks too much."""
        ids = prompt if isinstance(prompt, list) and isinstance(prompt[0], int) else None
        try:
            tokenizer = self.worker.engine.tokenizer
            ids = ids or await asyncio.to_thread(encode_prompt, prompt, tokenizer)
            room = max(1, self.worker.engine.max_length - len(ids))
            most = given or min(self.config.max_tokens, room, usual or room)
            if most > self.config.max_tokens:
                raise ValueError(f"max_tokens: this server gives at most {self.config.max_tokens}, got {most}.")
            stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
            temperature = 1.0 if body.temperature is None else body.temperature
            top_p, top_k = 1.0 if body.top_p is None else body.top_p, max(0, body.top_k or 0)
            return Ask(ids, adapter, most, temperature, top_p, top_k, body.seed, tuple(stop), self.config.timeout)
        except ValueError as error:
            raise Refused(400, str(error)) from error

    async def begin(self, asks: Sequence[Ask]) -> "Pieces":
        """Hand requests to the engine. Refused with 429 if too many wait."""
        pieces = Pieces(self, asks)
        try:
            await self.call(self.worker.submit(asks, pieces.listener()))
        except Full as error:
            waiting = len(self.worker.engine.waiting) + 1
            refusal = Refused(429, str(error), "too_many_requests")
            refusal.headers["retry-after"] = str(math.ceil(self.metrics.pace * waiting / self.config.batch_size))
            raise refusal from error
        except asyncio.CancelledError:  # the request's time is over (middleware.py), and the engine may have accepted
            pieces.close()
            raise
        self.metrics.tokens["prompt"] += sum(len(ask.prompt) for ask in asks)
        return pieces

    async def call(self, future: Future[Any]) -> Any:
        """Wait for the engine's thread; what a client is to blame for comes as Refused."""
        try:
            return await asyncio.wrap_future(future)
        except (ValueError, OSError) as error:
            raise Refused(400, str(error)) from error
        except Ended as error:
            raise Refused(503, "the server has ended: ask again.", "ended") from error

    async def load(self, name: str, path: str) -> None:
        """An adapter from the allowed folder, from now on a model of its own."""
        folder = inside(self.config.adapter_folder, path)
        if name in self.names:
            raise Refused(400, f"lora_name: {name!r} is already served: unload it first.", param="lora_name")
        if len(self.names) > self.config.max_adapters:
            raise Refused(400, f"{self.config.max_adapters} adapters are served, as many as may: unload one.")
        await self.call(self.worker.call(self.worker.engine.load, name, folder))
        self.names[name] = name

    async def unload(self, name: str) -> None:
        """No new requests for an adapter; those that are under way are answered."""
        if self.adapter(name) is None:
            raise Refused(400, f"lora_name: {name!r} is the base itself.", param="lora_name")
        del self.names[name]
        await self.call(self.worker.call(self.worker.engine.unload, name))


class Pieces:
    """The pieces of several answers, (number of the request, piece), as they come; `close` forgets what is not done."""

    def __init__(self, desk: Desk, asks: Sequence[Ask]) -> None:
        self.desk, self.asks = desk, asks
        self.queue: asyncio.Queue[Piece] = asyncio.Queue()  # at most as long as the answers
        self.left, self.begun = {ask: number for number, ask in enumerate(asks)}, time.monotonic()
        self.quiet, self.generated = set(asks), 0

    def listener(self) -> Callable[[Piece], Any]:
        """What the engine's thread calls with each piece."""
        return partial(asyncio.get_running_loop().call_soon_threadsafe, self.queue.put_nowait)

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if not self.left:
            raise StopAsyncIteration
        piece, metrics = await self.queue.get(), self.desk.metrics
        number, seconds = self.left[piece.ask], time.monotonic() - self.begun
        self.generated += piece.tokens
        metrics.tokens["generated"] += piece.tokens
        if piece.ask in self.quiet and piece.finish not in ("timeout", "error"):
            self.quiet.remove(piece.ask)
            metrics.began(seconds)
        if piece.finish:
            del self.left[piece.ask]
            metrics.ended(piece.finish, seconds)
        return number, piece

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        read = sum(len(ask.prompt) for ask in self.asks)
        return {"prompt_tokens": read, "completion_tokens": self.generated, "total_tokens": read + self.generated}

    def close(self) -> None:
        """Nobody wants to hear more."""
        if self.left:
            self.desk.worker.cancel([*self.left])
            self.desk.metrics.finished["left"] += len(self.left)
            self.left = {}
