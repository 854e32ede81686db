"""Requests with different adapters in one running batch: each joins at the next token and leaves when it is done.

    step:   one token for every row of the batch            one forward pass, row b through adapter b (lora/batched.py)
            the prompts that wait and fit are read          one forward pass, and with it their first token
            who is done leaves, who is new joins            the caches become one (decoding_batch.py)

No HTTP and no threads: `submit`, `step`, `cancel`, `load`, `unload`, all from one thread, and `step` returns all that
a server has to pass on (engine_thread.py). An answer depends on its own request alone, rounding aside: the same prompt,
adapter, seed and stops give `ml.generate`'s text. Simplified against vLLM: the cache is dense, as wide as its longest
row (no pages), a long prompt is read in one go while the others wait, and a common beginning is read again each time.
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
from minilora.generation.generate import end_tokens, matrix_vector
from minilora.generation.sequence import Ask, Piece, Row
from minilora.lora.active import delete_adapter, list_adapters, set_adapter
from minilora.lora.batched import per_row_adapters
from minilora.lora.files.save_load import load_adapter
from minilora.models.padded_batch import Context

READ = 512  # tokens of new prompts in a step, padding included, unless a single one is longer: who runs waits meanwhile


class Full(Exception):
    """As many requests wait as may: ask again later."""


class Engine:
    """`model` (ml.load_model's; put in eval mode) answers `batch_size` requests at a time; `waiting` more may wait.

    max_length: tokens of prompt and answer together, at most the model's context, which is the default.
    The adapters that the model has are served at once. `close` gives the model back as it was, less its mode.
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
            raise ValueError(f"expected a model of ml.load_model, got {type(model).__name__}: rows join its cache.")
        self.model: Any = model.eval()
        context: int = self.model.config.max_position_embeddings
        if not 2 <= (max_length or context) <= context:
            raise ValueError(f"max_length: expected 2 to the model's context of {context}, got {max_length}.")
        if batch_size < 1 or waiting < 0:
            raise ValueError(f"expected batch_size >= 1 and waiting >= 0, got {batch_size}, {waiting}.")
        self.tokenizer, self.clock = tokenizer, clock
        self.batch_size, self.most, self.max_length = batch_size, batch_size + waiting, max_length or context
        self.ends = end_tokens(model, tokenizer)
        self.rows: list[Row] = []  # those of the batch, in the order of `context`
        self.waiting: deque[Row] = deque()
        self.context: Context | None = None
        self.leaving: set[str] = set()  # adapters that answer what they have begun, and nothing new
        self._open()

    @property
    def adapters(self) -> list[str]:
        """The names that a request may give."""
        return [name for name in self.loaded if name not in self.leaving]

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.rows or self.waiting)

    def submit(self, asks: Sequence[Ask]) -> None:
        """Let requests wait for the next step, all or none. Full; ValueError: an unknown adapter, too many tokens."""
        for ask in asks:
            self.check(ask)
        if len(self.rows) + len(self.waiting) + len(asks) > self.most:
            raise Full(f"{len(self.rows)} requests are being answered and {len(self.waiting)} wait: ask again later.")
        self.waiting += [Row(ask, self.tokenizer, self.clock()) for ask in asks]

    def check(self, ask: Ask) -> None:
        """ValueError for what could not be answered."""
        if ask.adapter is not None and ask.adapter not in self.adapters:
            raise ValueError(f"adapter: expected one of {self.adapters} or None, got {ask.adapter!r}.")
        size, vocabulary = len(ask.prompt), self.model.config.vocab_size
        if not ask.prompt or not all(0 <= token < vocabulary for token in ask.prompt):
            raise ValueError(f"prompt: expected at least one token, each from 0 to {vocabulary - 1}.")
        if size + ask.max_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {size} tokens, which with {ask.max_tokens} new ones exceed the {self.max_length} of "
                "this server: shorten it, or ask for fewer."
            )

    def cancel(self, ask: Ask) -> None:
        """Forget a request, wherever it is; one that is over is no error."""
        for row in (*self.rows, *self.waiting):
            row.done = row.done or row.ask is ask

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """One token for every row, and the first one for those that join now."""
        now, pieces = self.clock(), []
        for row in (*self.rows, *self.waiting):
            if not row.done and now >= row.deadline:
                row.done = True
                pieces.append(Piece(row.ask, row.text.rest(), 0, "timeout"))
        if self.context is not None and not all(row.done for row in self.rows):
            last = [[row.text.ids[-1]] for row in self.rows]
            pieces += self._say(self.rows, self.context.extend(last))
        if fresh := self._admit():
            read = Context(self.model)
            read.adapters = self.own, [row.ask.adapter for row in fresh]
            pieces += self._say(fresh, read.extend([row.ask.prompt for row in fresh]))
            self._regroup([(self.context, self.rows), (read, fresh)])
        elif any(row.done for row in self.rows):
            self._regroup([(self.context, self.rows)])
        for name in [name for name in self.leaving if not self._used(name)]:
            self.leaving.remove(name)
            self._change(lambda name=name: delete_adapter(self.model, name))
        return pieces

    def _admit(self) -> list[Row]:
        """The requests that are read in this step."""
        self.waiting = deque(row for row in self.waiting if not row.done)
        room, fresh, longest = self.batch_size - sum(not row.done for row in self.rows), [], 0
        while self.waiting and len(fresh) < room:
            longest = max(longest, len(self.waiting[0].ask.prompt))
            if fresh and longest * (len(fresh) + 1) > READ:
                break
            fresh.append(self.waiting.popleft())
        return fresh

    def _say(self, rows: Sequence[Row], logits: Tensor) -> list[Piece]:
        """The next token of each row that goes on, by logits (B, V)."""
        likeliest = logits.argmax(-1).tolist()
        tokens = [row.choose(logits[i]) if row.ask.temperature else likeliest[i] for i, row in enumerate(rows)]
        return [row.take(token, self.ends) for row, token in zip(rows, tokens, strict=True) if not row.done]

    def _regroup(self, parts: Sequence[tuple[Context | None, list[Row]]]) -> None:
        staying = [(context, [i for i, row in enumerate(rows) if not row.done]) for context, rows in parts if context]
        self.rows = [row for _, rows in parts for row in rows if not row.done]
        self.context = joined(staying)
        self._name_rows()

    def _name_rows(self) -> None:
        if self.context is not None:
            self.context.adapters = self.own, [row.ask.adapter for row in self.rows]

    # ---- adapters

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter between two steps. ValueError, with nothing changed: the name is taken, load_adapter refuses
        the folder, or it is not plain linear LoRA, which alone can be chosen row by row."""
        if name in self.loaded:
            state = "is still answering" if name in self.leaving else "is already loaded"
            raise ValueError(f"adapter {name!r} {state}: unload it first, and wait for its last answer.")
        self._change(lambda: self._load(name, folder))

    def _load(self, name: str, folder: str | Path) -> None:
        load_adapter(self.model, folder, name, tokenizer=self.tokenizer)
        try:
            with per_row_adapters(self.model, [name]):
                pass
        except ValueError:
            delete_adapter(self.model, name)
            raise
        set_adapter(self.model, [])

    def unload(self, name: str) -> None:
        """Refuse new requests for an adapter, and remove it when none is left. ValueError for an unknown name."""
        if name not in self.adapters:
            raise ValueError(f"adapter: expected one of {self.adapters}, got {name!r}.")
        self.leaving.add(name)
        if not self._used(name):
            self.leaving.remove(name)
            self._change(lambda: delete_adapter(self.model, name))

    def _used(self, name: str) -> bool:
        return any(row.ask.adapter == name and not row.done for row in (*self.rows, *self.waiting))

    def _change(self, change: Callable[[], Any]) -> None:
        """Run `change` on the model as it is outside."""
        self.close()
        try:
            change()
        finally:
            self._open()
            self._name_rows()

    def _open(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(matrix_vector(self.model))
        self.loaded = list_adapters(self.model)  # which walks the model, and requests are checked between two tokens
        self.own = self.stack.enter_context(per_row_adapters(self.model, self.loaded))

    def close(self) -> None:
        """Take from the model's layers what answers row by row."""
        self.stack.close()
