"""The connection between the HTTP routes and the engine thread.

Requests go to the engine thread, pieces of answers come back, and model names become adapters.
Everything in this file runs in the thread of the event loop. The engine thread
(engine_thread.py) hands pieces over with `call_soon_threadsafe`.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

from minilora.data.chat_template import as_trained
from minilora.data.prompt import encode_prompt
from minilora.generation.engine import Full
from minilora.generation.scores import TokenTexts
from minilora.generation.sequence import Ask, Piece
from minilora.serving.config import ServeConfig
from minilora.serving.engine_thread import Ended, Worker
from minilora.serving.metrics import Metrics
from minilora.serving.middleware import Refused, adapter_path


class Echo(NamedTuple):
    """A prompt as a part of its answer.

    Attributes:
        text: its text.
        hidden: number of tokens at its beginning that the text does not show, such as BOS.
    """

    text: str
    hidden: int


class Desk:
    """The client of the engine thread.

    Args:
        worker: the engine thread.
        config: the options of the server.
        name: the model name of the base.
        metrics: the counters of the server.

    Attributes:
        names: model name -> its adapter; the base comes first and has None.
        base: the model name of the base.
        created: Unix time of the start, in seconds.
    """

    def __init__(self, worker: Worker, config: ServeConfig, name: str, metrics: Metrics) -> None:
        self.worker = worker
        self.config = config
        self.metrics = metrics
        self.names: dict[str, str | None] = {name: None}
        for adapter in worker.engine.adapters:
            self.names[adapter] = adapter
        self.base = name
        self.created = int(time.time())
        self._token_texts: TokenTexts | None = None  # made when a client needs it

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter of a model name.

        Args:
            model: the model name.

        Returns:
            The name of the adapter; None for the base.

        Raises:
            Refused: the name is unknown (status 404).
        """
        if model not in self.names:
            names = ", ".join(self.names)
            message = f"model {model!r} is not served here. Expected one of {names}."
            raise Refused(404, message, "model_not_found", "model")
        return self.names[model]

    async def prepare(
        self,
        prompt: Any,
        adapter: str | None,
        body: Any,
        max_tokens: int | None,
        default_tokens: int | None = None,
        **scores: Any,
    ) -> Ask:
        """Return the engine's request for a prompt.

        Args:
            prompt: token ids, or a prompt of `encode_prompt`.
            adapter: the name of the adapter; None is the base.
            body: the client's sampling options, a model of schema.py.
            max_tokens: the client's limit of the answer; None takes the default.
            default_tokens: the default of that limit; None is all that fits.
            **scores: the fields `logprobs` and `score_prompt` of the request.

        Returns:
            The request.

        Raises:
            Refused: the prompt has no encoding, an option is out of range, or the client wants
                more tokens than the server allows (status 400).
        """
        try:
            kwargs = getattr(body, "chat_template_kwargs", None)
            token_ids = await self._encode(prompt, adapter, kwargs)
            limit = self._token_limit(len(token_ids), max_tokens, default_tokens)
            return Ask(
                token_ids,
                adapter,
                limit,
                temperature=1.0 if body.temperature is None else body.temperature,
                seconds=self.config.timeout,
                **body.rules(),
                **scores,
            )
        except ValueError as error:
            raise Refused(400, str(error)) from error

    def token_texts(self) -> TokenTexts:
        """Return the texts of single tokens."""
        if self._token_texts is None:
            self._token_texts = TokenTexts(self.worker.engine.tokenizer)
        return self._token_texts

    def echoes(self, prompts: Sequence[Any], asks: Sequence[Ask]) -> list[Echo]:
        """Return the prompts as parts of the answers.

        Args:
            prompts: texts or lists of token ids.
            asks: their requests.
        """
        tokenizer = self.worker.engine.tokenizer
        echoes = []
        for prompt, ask in zip(prompts, asks, strict=True):
            if isinstance(prompt, str):
                added = len(ask.prompt) - len(tokenizer.encode(prompt, add_special_tokens=False))
                echoes.append(Echo(str(prompt), max(0, added)))
            else:
                echoes.append(Echo(tokenizer.decode(prompt, skip_special_tokens=False), 0))
        return echoes

    async def _encode(
        self, prompt: Any, adapter: str | None, chat_template_kwargs: dict[str, Any] | None
    ) -> list[int]:
        """Return the token ids of a prompt; a long text does not block the event loop."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return prompt
        engine = self.worker.engine
        tokenizer = as_trained(engine.tokenizer, chat_template_kwargs, engine.model, [adapter])
        return await asyncio.to_thread(encode_prompt, prompt, tokenizer)

    def _token_limit(
        self, prompt_length: int, max_tokens: int | None, default_tokens: int | None
    ) -> int:
        """Return the limit of an answer, in tokens."""
        if max_tokens is None:
            remaining = max(1, self.worker.engine.max_length - prompt_length)
            return min(self.config.max_tokens, remaining, default_tokens or remaining)
        if max_tokens > self.config.max_tokens:
            limit = self.config.max_tokens
            message = f"max_tokens: this server gives at most {limit}, got {max_tokens}."
            raise Refused(400, message, param="max_tokens")
        return max_tokens

    async def begin(self, asks: Sequence[Ask]) -> "Pieces":
        """Hand requests to the engine.

        Args:
            asks: the requests; the engine accepts all of them or none.

        Returns:
            The pieces of the answers as they come.

        Raises:
            Refused: the queue is full (status 429), the engine does not accept a request (400),
                or the engine has ended (503).
        """
        most = self.worker.engine.most
        if len(asks) > most:
            message = f"n: expected at most {most} answers to all prompts, got {len(asks)}."
            raise Refused(400, message, param="n")
        pieces = Pieces(self, asks)
        try:
            await self.call(self.worker.submit(asks, pieces.listener()))
        except Full as error:
            raise self._queue_full(error) from error
        except asyncio.CancelledError:
            # The time limit of middleware.py has ended, and the engine may have accepted.
            pieces.close()
            raise
        self.metrics.tokens["prompt"] += pieces.prompt_tokens
        return pieces

    def _queue_full(self, error: Full) -> Refused:
        """Return a refusal with an estimate of the time until the queue has a free place."""
        position = len(self.worker.engine.waiting) + 1
        seconds = math.ceil(self.metrics.pace * position / self.config.batch_size)
        refusal = Refused(429, str(error), "too_many_requests")
        refusal.headers["retry-after"] = str(seconds)
        return refusal

    async def call(self, future: Future[Any]) -> Any:
        """Wait for the engine thread.

        Args:
            future: a result of the engine thread.

        Returns:
            The value of the future.

        Raises:
            Refused: the client caused the error (status 400), or the engine has ended (503).
            Full: the queue is full.
        """
        try:
            return await asyncio.wrap_future(future)
        except (ValueError, OSError) as error:
            raise Refused(400, str(error)) from error
        except Ended as error:
            message = "the server has stopped: send the request again."
            raise Refused(503, message, "ended") from error

    async def load(self, name: str, path: str) -> None:
        """Load an adapter and serve it as a model.

        Args:
            name: the name of the adapter and of the model.
            path: the adapter's folder inside the server's `adapter_folder`.

        Raises:
            Refused: the folder is not allowed, the name is in use, the server has its largest
                number of adapters, or the files are not an adapter of this base.
        """
        folder = adapter_path(self.config.adapter_folder, path)
        if name in self.names:
            message = f"lora_name: {name!r} is already served: unload it first."
            raise Refused(400, message, param="lora_name")
        limit = self.config.max_adapters
        if len(self.names) > limit:  # `names` has the base too
            raise Refused(400, f"{limit} adapters are served, which is the limit: unload one.")
        await self.call(self.worker.call(self.worker.engine.load, name, folder))
        self.names[name] = name

    async def unload(self, name: str) -> None:
        """Accept no new requests for an adapter; running answers finish.

        Args:
            name: the name of the adapter.

        Raises:
            Refused: the name is unknown (status 404), or is the base's (400).
        """
        if self.adapter_of(name) is None:
            message = f"lora_name: {name!r} is the base itself, which stays loaded."
            raise Refused(400, message, param="lora_name")
        del self.names[name]
        await self.call(self.worker.call(self.worker.engine.unload, name))


class Pieces:
    """The pieces of several answers, as an asynchronous iterator.

    It yields pairs: the index of the request and its next piece.

    Args:
        desk: the client that makes the requests.
        asks: the requests.

    Attributes:
        unfinished: request -> its index, for requests whose answer is not complete.
        generated: number of tokens generated so far.
        prompt_tokens: number of tokens of the prompts; a prompt with several answers counts once.
    """

    def __init__(self, desk: Desk, asks: Sequence[Ask]) -> None:
        self.desk = desk
        self.asks = asks
        self.queue: asyncio.Queue[Piece] = asyncio.Queue()  # the answers' lengths limit its size
        self.unfinished = {ask: index for index, ask in enumerate(asks)}
        self.without_token = set(asks)
        self.start_time = time.monotonic()
        self.generated = 0
        self.prompt_tokens = sum(len(ask.prompt) for ask in asks if ask.row == 0)

    def listener(self) -> Callable[[Piece], Any]:
        """Return the function that the engine thread calls with each piece."""
        loop = asyncio.get_running_loop()
        return partial(loop.call_soon_threadsafe, self.queue.put_nowait)

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if not self.unfinished:
            raise StopAsyncIteration
        piece = await self.queue.get()
        index = self.unfinished[piece.ask]
        self._count(piece)
        if piece.finish:
            del self.unfinished[piece.ask]
        return index, piece

    def _count(self, piece: Piece) -> None:
        """Add a piece to the metrics."""
        metrics = self.desk.metrics
        seconds = time.monotonic() - self.start_time
        self.generated += piece.tokens
        metrics.tokens["generated"] += piece.tokens
        if piece.ask in self.without_token and piece.finish not in ("timeout", "error"):
            self.without_token.remove(piece.ask)
            metrics.record_first_token(seconds)
        if piece.finish:
            metrics.record_end(piece.finish, seconds)

    @property
    def usage(self) -> dict[str, int]:
        """The number of tokens so far, in OpenAI's fields."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
        }

    def close(self) -> None:
        """Cancel the requests whose answers are not complete, because the client has left."""
        if not self.unfinished:
            return
        self.desk.worker.cancel([*self.unfinished])
        self.desk.metrics.finished["left"] += len(self.unfinished)
        self.unfinished = {}
