"""One request of the engine, its answer, and the answer's text as it grows."""

import random
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minilora.generation.sampling import Decoding, pick

HALF = "\ufffd"  # the decoded form of an incomplete character
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


@dataclass(eq=False, frozen=True)
class Ask:
    """A request. Two requests with equal fields are different: identity counts.

    Attributes:
        prompt: token ids.
        adapter: name of the adapter; None is the base.
        max_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        top_p: probability mass of the nucleus.
        top_k: number of likeliest tokens to sample from; 0 is all.
        seed: seed of the sampling; None draws one.
        stop: texts before which the answer ends.
        seconds: time limit; None is no limit.
    """

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
        Decoding(self.max_tokens, self.temperature, self.top_p)  # checks the ranges
        if self.top_k < 0 or "" in self.stop:
            raise ValueError(
                f"expected top_k >= 0 and no empty stop string, got {self.top_k}, "
                f"{list(self.stop)}."
            )


@dataclass(frozen=True)
class Piece:
    """The part of an answer that one step adds.

    Attributes:
        ask: the request.
        text: new text.
        tokens: number of new tokens.
        finish: None, or the reason for the end: stop, length, timeout (or error: engine_thread.py).
    """

    ask: Ask
    text: str = ""
    tokens: int = 0
    finish: str | None = None


class Row:
    """A request in the engine: its answer so far, its random numbers and its deadline.

    Args:
        ask: the request.
        tokenizer: the model's tokenizer.
        now: time of arrival, in seconds.

    Attributes:
        done: True when the answer is complete or cancelled.
    """

    def __init__(self, ask: Ask, tokenizer: Any, now: float) -> None:
        self.ask = ask
        self.text = Text(tokenizer, ask.stop)
        self.done = False
        seed = secrets.randbits(64) if ask.seed is None else ask.seed
        self.random = random.Random(f"{seed}, row 0")  # the generator of ml.generate's first row
        self.deadline = float("inf") if ask.seconds is None else now + ask.seconds

    def choose(self, logits: Tensor) -> int:
        """Return the next token.

        Args:
            logits: logits of this row, (V,).
        """
        uniform = [self.random.random()]
        if 0 < self.ask.top_k < len(logits):
            logits, tokens = logits.topk(self.ask.top_k)  # (k,) each
            place = pick(logits[None], self.ask.temperature, self.ask.top_p, uniform)[0]
            return int(tokens[place])
        return pick(logits[None], self.ask.temperature, self.ask.top_p, uniform)[0]

    def take(self, token: int, ends: frozenset[int]) -> Piece:
        """Append a token to the answer.

        Args:
            token: the token.
            ends: tokens that end an answer.

        Returns:
            The text that becomes visible, and the reason for the end if the answer ends.
        """
        if token in ends:
            self.done = True
            return Piece(self.ask, self.text.rest(), 0, "stop")
        text, stopped = self.text.push(token)
        finish = None
        if stopped:
            finish = "stop"
        elif len(self.text.ids) == self.ask.max_tokens:
            finish = "length"
        if finish is not None:
            self.done = True
            text += self.text.rest()
        return Piece(self.ask, text, 1, finish)


class Text:
    """The text of an answer, released once and only when no later token can change it.

    Three kinds of text wait: incomplete characters, an end that may begin a stop string, and a run
    of SentencePiece's byte tokens (`<0xE6>`), because one invalid byte makes the decoder show all
    bytes of the run as unknown characters. All released parts together are the text that
    `ml.generate` returns for the same tokens and stop strings.

    Args:
        tokenizer: the model's tokenizer.
        stops: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []
        self.settled = 0  # number of tokens before the byte tokens at the end
        self.released = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Append a token; return the released text, and True if a stop string is complete.

        Args:
            token: the token.
        """
        self.ids.append(token)
        if not _is_byte(self.tokenizer, token):
            self.settled = len(self.ids)
        if self.stops:  # special tokens can be stop strings although they are not shown
            shown = self.tokenizer.decode(self.ids, skip_special_tokens=False)
            if any(word in shown for word in self.stops):
                return self.rest(), True
        text = self._text(self.ids[: self.settled]).rstrip(HALF)
        waiting = _stop_prefix_length(text, self.stops)
        return self._release(text[: len(text) - waiting]), False

    def rest(self) -> str:
        """Return the text that still waits, when the answer is complete."""
        return self._release(self._text(self.ids))

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for word in self.stops:
            text = text.partition(word)[0]
        return text

    def _release(self, text: str) -> str:
        if not text.startswith(self.released):
            return ""
        new = text[len(self.released) :]
        self.released = text
        return new


def _is_byte(tokenizer: Any, token: int) -> bool:
    """Return True for a token that stands for one byte of a character, as Llama 2 has them."""
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    name = convert(token) if convert is not None else None
    return name is not None and BYTE_TOKEN.fullmatch(name) is not None


def _stop_prefix_length(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins a stop string."""
    longest = 0
    for word in stops:
        for length in range(1, len(word)):
            if text.endswith(word[:length]):
                longest = max(longest, length)
    return longest
