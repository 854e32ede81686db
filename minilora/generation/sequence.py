"""One request: what is asked, what has been said, and the text of it as it grows."""

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minilora.generation.generate import Decoding, pick

HALF = "\ufffd"  # what the bytes of a character decode to before all of them are there


@dataclass(eq=False, frozen=True)
class Ask:
    """A request; it is known by identity. `adapter` None is the base, `top_k` 0 all tokens, `seconds` None no limit."""

    prompt: list[int]
    adapter: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float | None = None

    def __post_init__(self) -> None:
        Decoding(self.max_tokens, self.temperature, self.top_p)  # checks their ranges
        if self.top_k < 0 or "" in self.stop:
            raise ValueError(f"expected top_k >= 0 and no empty stop string, got {self.top_k}, {list(self.stop)}.")


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer. finish: None, or why it is over: stop, length, timeout (error:
    engine_thread.py)."""

    ask: Ask
    text: str = ""
    tokens: int = 0
    finish: str | None = None


class Row:
    """A request on its way: what it has said, and until when it may."""

    def __init__(self, ask: Ask, tokenizer: Any, now: float) -> None:
        self.ask, self.text, self.done = ask, Text(tokenizer, ask.stop), False
        seed = secrets.randbits(64) if ask.seed is None else ask.seed
        self.random = random.Random(f"{seed}, row 0")  # that of ml.generate's first row
        self.deadline = float("inf") if ask.seconds is None else now + ask.seconds

    def choose(self, logits: Tensor) -> int:
        """The next token, by logits (V,)."""
        ask, uniform = self.ask, [self.random.random()]
        if 0 < ask.top_k < len(logits):
            logits, tokens = logits.topk(ask.top_k)  # (k,)
            return int(tokens[pick(logits[None], ask.temperature, ask.top_p, uniform)[0]])
        return pick(logits[None], ask.temperature, ask.top_p, uniform)[0]

    def take(self, token: int, ends: frozenset[int]) -> Piece:
        """Say one more token."""
        if token in ends:
            self.done = True
            return Piece(self.ask, self.text.rest(), 0, "stop")
        text, stopped = self.text.push(token)
        finish = "stop" if stopped else "length" if len(self.text.ids) == self.ask.max_tokens else None
        self.done = finish is not None
        return Piece(self.ask, text + self.text.rest() if self.done else text, 1, finish)


class Text:
    """The text of an answer, given out once and only when no later token can change it.

    Held back are half characters, and an end that may be the beginning of a stop string. All pieces together are what
    `ml.generate` returns of the same tokens and stop strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.given = ""

    def push(self, token: int) -> tuple[str, bool]:
        """What one more token lets out, and whether a stop string is complete."""
        self.ids.append(token)
        if self.stops:  # special tokens may be asked to stop, though they are not shown
            shown = self.tokenizer.decode(self.ids, skip_special_tokens=False)
            if any(word in shown for word in self.stops):
                return self.rest(), True
        text = self._text().rstrip(HALF)
        held = max((n for word in self.stops for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        return self._give(text[: len(text) - held]), False

    def rest(self) -> str:
        """What was held back, when the answer is over."""
        return self._give(self._text())

    def _text(self) -> str:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        for word in self.stops:
            text = text.partition(word)[0]
        return text

    def _give(self, text: str) -> str:
        if not text.startswith(self.given):
            return ""
        new = text[len(self.given) :]
        self.given = text
        return new
