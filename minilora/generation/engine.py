"""Continuous batching: requests with different adapters in one running batch.

    step:   one token for every row of the batch      one forward pass, row b through adapter b
            read the waiting prompts that fit         one forward pass, which gives the first token
            finished rows leave, new rows join        the caches become one (decoding_batch.py)

There is no HTTP and there are no threads here: `submit`, `step`, `cancel`, `load` and `unload` are
called from one thread, and `step` returns everything that a server sends (engine_thread.py). An
answer depends on its own request alone, up to rounding: the same prompt, adapter, seed and stops
give `ml.generate`'s text. Per-row adapters: lora/batched.py.

Adapters that are more than linear LoRA (DoRA, embeddings, whole modules) cannot differ from row to
row. They are answered one at a time: the batch has rows of one such adapter only, and requests for
others wait until it is empty, in the order of their arrival.

Simplified: unlike vLLM, the cache is dense, as wide as its longest row (no pages), a long prompt is
read in one pass while the others wait, and a common beginning of prompts is read again each time.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.generation.decoding_batch import joined
from minilora.generation.generate import end_tokens
from minilora.generation.scores import prompt_scores
from minilora.generation.sequence import Ask, Piece, Row
from minilora.generation.single_token import matrix_vector
from minilora.generation.structured import BrokenGrammar
from minilora.lora.active import delete_adapter, list_adapters, set_adapter
from minilora.lora.batched import per_row_adapters, per_row_obstacle
from minilora.lora.files.save_load import load_adapter
from minilora.models.padded_batch import Context

READ = 512  # most prompt tokens of a step, padding included, unless one prompt alone is longer


class Full(Exception):
    """The queue is full: the client should ask again later."""


class Engine:
    """A running batch of requests. Adapters that the model has already are available at once.

    Args:
        model: a model of ml.load_model; it is put into eval mode.
        tokenizer: its tokenizer.
        batch_size: largest number of requests answered at a time.
        waiting: largest number of requests that wait.
        max_length: tokens of prompt and answer together; None is the model's context.
        clock: a function that returns seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        waiting: int = 64,
        max_length: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not hasattr(model, "hidden"):
            raise ValueError(
                f"expected a model of ml.load_model, got {type(model).__name__}: "
                "rows join its cache."
            )
        self.model: Any = model.eval()
        context: int = self.model.config.max_position_embeddings
        if not 2 <= (max_length or context) <= context:
            raise ValueError(
                f"max_length: expected 2 to the model's context of {context}, got {max_length}."
            )
        if batch_size < 1 or waiting < 0:
            raise ValueError(
                f"expected batch_size >= 1 and waiting >= 0, got {batch_size}, {waiting}."
            )
        self.tokenizer = tokenizer
        self.clock = clock
        self.batch_size = batch_size
        self.most = batch_size + waiting
        self.max_length = max_length or context
        self.ends = end_tokens(model, tokenizer)
        self.rows: list[Row] = []  # the rows of the batch, in the order of `context`
        self.waiting: deque[Row] = deque()
        self.context: Context | None = None
        self.alone: str | None = None  # the adapter of all rows, if it cannot share a batch
        self.leaving: set[str] = set()  # adapters that finish their answers and accept nothing new
        self._open()

    @property
    def adapters(self) -> list[str]:
        """Names that a request may give."""
        return [name for name in self.loaded if name not in self.leaving]

    @property
    def busy(self) -> bool:
        """True if a step has work."""
        return bool(self.rows or self.waiting)

    def submit(self, asks: Sequence[Ask]) -> None:
        """Add requests to the queue, all or none.

        Args:
            asks: the requests.

        Raises:
            Full: the queue has no room.
            ValueError: a request is invalid (`check`).
        """
        for ask in asks:
            self.check(ask)
        number = len(self.rows) + len(self.waiting) + len(asks)
        if number > self.most:
            raise Full(
                f"{len(self.rows)} requests are being answered and {len(self.waiting)} wait: "
                "ask again later."
            )
        rows = []
        for ask in asks:
            rows.append(Row(ask, self.tokenizer, self.clock()))
        self.waiting += rows

    def check(self, ask: Ask) -> None:
        """Raise ValueError for a request that cannot be answered.

        Args:
            ask: the request.

        Raises:
            ValueError: the adapter is unknown, a token is out of range, or the request is too long.
        """
        if ask.adapter is not None and ask.adapter not in self.adapters:
            raise ValueError(
                f"adapter: expected one of {self.adapters} or None, got {ask.adapter!r}."
            )
        size = len(ask.prompt)
        vocabulary = self.model.config.vocab_size
        unknown_ids = [token for token in ask.prompt if not 0 <= token < vocabulary]
        unknown_bias = [token for token in ask.logit_bias if token >= vocabulary]
        if unknown_bias:
            raise ValueError(
                f"logit_bias: expected token ids from 0 to {vocabulary - 1}, got {unknown_bias[0]}."
            )
        if not ask.prompt or unknown_ids:
            raise ValueError(
                f"prompt: expected at least one token, each from 0 to {vocabulary - 1}."
            )
        if size + ask.max_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {size} tokens, which with {ask.max_tokens} new ones exceed the "
                f"{self.max_length} of this server: shorten it, or ask for fewer."
            )

    def cancel(self, ask: Ask) -> None:
        """Drop a request, in the batch or in the queue; a finished one is not an error.

        Args:
            ask: the request.
        """
        for row in (*self.rows, *self.waiting):
            if row.ask is ask:
                row.done = True

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Generate one token for every row, and the first token for those that join.

        Returns:
            The new parts of the answers.
        """
        pieces = self._time_out()
        if self.context is not None and _count_unfinished(self.rows):
            last_tokens = [[row.text.ids[-1]] for row in self.rows]
            pieces += self._advance(self.rows, self.context.extend(last_tokens))
        joining = self._admit()
        if joining:
            read = Context(self.model)
            read.adapters = self._adapters_of(joining)
            pieces += self._advance(joining, _read_prompts(read, joining))
            self._regroup([(self.context, self.rows), (read, joining)])
        elif _count_unfinished(self.rows) < len(self.rows):
            self._regroup([(self.context, self.rows)])
        for name in list(self.leaving):
            if not self._used(name):
                self._remove(name)
        return pieces

    def _time_out(self) -> list[Piece]:
        """End the requests whose deadline has passed."""
        now = self.clock()
        pieces = []
        for row in (*self.rows, *self.waiting):
            if not row.done and now >= row.deadline:
                row.done = True
                pieces.append(Piece(row.ask, row.text.rest(), 0, "timeout"))
        return pieces

    def _admit(self) -> list[Row]:
        """Take the requests that this step reads from the queue."""
        self.waiting = deque(row for row in self.waiting if not row.done)
        active = _count_unfinished(self.rows)
        joining: list[Row] = []
        longest = 0
        while self.waiting and len(joining) < self.batch_size - active:
            alone = self._alone(self.waiting[0])
            if alone != self.alone:
                if active or joining:
                    break
                self._change(lambda: None, alone)
            longest = max(longest, len(self.waiting[0].ask.prompt))
            padded_size = longest * (len(joining) + 1)
            if joining and padded_size > READ:
                break
            joining.append(self.waiting.popleft())
        return joining

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> list[Piece]:
        """Choose the next token of each unfinished row by its logits (B, V)."""
        likeliest = logits.argmax(-1).tolist()
        pieces = []
        for i, row in enumerate(rows):
            if row.done:
                continue
            if not row.ask.max_tokens:
                pieces.append(row.end("length"))
                continue
            try:
                token = likeliest[i]
                if not row.is_plain:
                    token = row.choose(logits[i], self.ends)
                row.score(logits[i], token)
                pieces.append(row.take(token, self.ends))
            except BrokenGrammar:
                pieces.append(row.end("grammar"))
        return pieces

    def _regroup(self, parts: Sequence[tuple[Context | None, list[Row]]]) -> None:
        """Make one batch of the unfinished rows of several."""
        staying = []
        self.rows = []
        for context, rows in parts:
            unfinished = [i for i, row in enumerate(rows) if not row.done]
            self.rows += [rows[i] for i in unfinished]
            if context:
                staying.append((context, unfinished))
        self.context = joined(staying)
        self._assign_adapters()

    def _assign_adapters(self) -> None:
        if self.context is not None:
            self.context.adapters = self._adapters_of(self.rows)

    def _adapters_of(self, rows: Sequence[Row]) -> Any:
        """Return the per-row adapters of some rows, or None if one adapter is active for all."""
        if self.alone is not None:
            return None
        names = [row.ask.adapter for row in rows]
        return self.own, names

    def _alone(self, row: Row) -> str | None:
        """Return the adapter of a request if it cannot share a batch, else None."""
        adapter = row.ask.adapter
        return adapter if adapter in self.exclusive else None

    # ---- adapters

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter between two steps; an error changes nothing.

        Args:
            name: name for requests.
            folder: the adapter.

        Raises:
            ValueError: the name is taken, or load_adapter refuses the folder.
        """
        if name in self.loaded:
            state = "is still answering" if name in self.leaving else "is already loaded"
            raise ValueError(
                f"adapter {name!r} {state}: unload it first, and wait for its last answer."
            )

        def read() -> None:
            load_adapter(self.model, folder, name, tokenizer=self.tokenizer)
            set_adapter(self.model, [])

        self._change(read, self.alone)

    def unload(self, name: str) -> None:
        """Refuse new requests for an adapter; remove it after its last answer.

        Args:
            name: name of the adapter.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in self.adapters:
            raise ValueError(f"adapter: expected one of {self.adapters}, got {name!r}.")
        self.leaving.add(name)
        if not self._used(name):
            self._remove(name)

    def _used(self, name: str) -> bool:
        for row in (*self.rows, *self.waiting):
            if row.ask.adapter == name and not row.done:
                return True
        return False

    def _remove(self, name: str) -> None:
        self.leaving.remove(name)
        alone = None if self.alone == name else self.alone
        self._change(lambda: delete_adapter(self.model, name), alone)

    def _change(self, change: Callable[[], Any], alone: str | None) -> None:
        """Run `change` on the model without the per-row forward of its layers.

        Afterwards all rows have the adapter `alone`, or each has its own.
        """
        self.close()
        try:
            change()
        finally:
            self.alone = alone
            self._open()
            self._assign_adapters()

    def _open(self) -> None:
        """Prepare the model for steps."""
        self.loaded = list_adapters(self.model)  # kept, because listing walks the whole model
        # adapters that cannot share a batch with others
        self.exclusive: list[str] = []
        shared = []
        for name in self.loaded:
            if per_row_obstacle(self.model, name):
                self.exclusive.append(name)
            else:
                shared.append(name)
        if self.exclusive:
            active = [] if self.alone is None else self.alone
            set_adapter(self.model, active)
        self.stack = ExitStack()
        self.stack.enter_context(matrix_vector(self.model))
        if self.alone is None:
            self.own = self.stack.enter_context(per_row_adapters(self.model, shared))

    def close(self) -> None:
        """Give the layers their own forward back."""
        self.stack.close()


def _count_unfinished(rows: Sequence[Row]) -> int:
    count = 0
    for row in rows:
        if not row.done:
            count += 1
    return count


def _read_prompts(context: Context, rows: Sequence[Row]) -> Tensor:
    """Read the prompts of new rows; return the logits (B, V) of the first token of each answer."""
    prompts = [row.ask.prompt for row in rows]
    scored = [number for number, row in enumerate(rows) if row.ask.score_prompt]
    if not scored:
        return context.extend(prompts)
    read = context.extend_all(prompts)  # (B, T, D)
    for number in scored:
        ask = rows[number].ask
        top = ask.logprobs or 0
        scores = prompt_scores(context, read[number], ask.prompt, top)
        rows[number].prompt_scores = tuple(scores)
    # Only a contiguous tensor keeps the head from copying its weight for each row.
    last = read[:, -1:].clone(memory_format=torch.contiguous_format)  # (B, 1, D)
    return context.logits(last)[:, 0]
