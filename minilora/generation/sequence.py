"""One request of the engine, its answer, and the answer's text as it grows."""

import random
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minilora.generation.penalties import TokenRules, adjusted
from minilora.generation.sampling import Decoding, pick
from minilora.generation.scores import HALF, TokenScore, token_scores

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


@dataclass(eq=False, frozen=True)
class Ask(TokenRules):
    """A request, with the rules of TokenRules. Requests with equal fields are different.

    Attributes:
        prompt: token ids.
        adapter: name of the adapter; None is the base.
        max_tokens: longest answer in tokens; 0 only reads the prompt.
        temperature: 0 is greedy.
        top_p: probability mass of the nucleus.
        seed: seed of the sampling; None draws one.
        row: number of this answer, if a client asks for several with one seed. The random numbers
            are those of this row of `ml.generate`.
        stop: texts before which the answer ends.
        stop_ids: tokens before which the answer ends, besides the model's own end tokens.
        ignore_eos: True gives the model's own end tokens no effect.
        logprobs: number of likeliest tokens to list with the score of each token of the answer;
            None computes no scores.
        score_prompt: True computes the scores of the prompt's tokens too.
        seconds: time limit; None is no limit.
        grammar: the grammar of structured.py that the answer follows, or None.
        shown: special tokens that the text has: the marks of tool calls.
    """

    prompt: list[int]
    adapter: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    row: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    score_prompt: bool = False
    seconds: float | None = None
    grammar: Any = None
    shown: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {self.max_tokens}")
        Decoding(1, self.temperature, self.top_p)  # checks the ranges
        self.check_rules()
        if "" in self.stop:
            raise ValueError(f"expected no empty stop string, got {list(self.stop)}.")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError(
                "a schema decides where the answer ends: leave out min_tokens and ignore_eos."
            )

    def ends(self, model_ends: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end this answer.

        Args:
            model_ends: the model's own end tokens.
        """
        return self.stop_ids if self.ignore_eos else model_ends | self.stop_ids


@dataclass(frozen=True)
class Piece:
    """The part of an answer that one step adds.

    Attributes:
        ask: the request.
        text: new text.
        tokens: number of new tokens.
        finish: None, or the reason for the end: stop, length, timeout, grammar if it allows no
            token (or error: engine_thread.py).
        scores: scores of the tokens of the text, if the request asks for them. The token that ends
            the answer has one too.
        prompt_scores: in the first piece, scores of the prompt's tokens.
    """

    ask: Ask
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()


class Row:
    """A request in the engine: its answer so far, its random numbers and its deadline.

    Args:
        ask: the request.
        tokenizer: the model's tokenizer.
        now: time of arrival, in seconds.

    Attributes:
        done: True when the answer is complete or cancelled.
        waiting: scores of tokens whose text waits.
        prompt_scores: scores of the prompt's tokens, until a piece takes them.
    """

    def __init__(self, ask: Ask, tokenizer: Any, now: float) -> None:
        self.ask = ask
        self.text = Text(tokenizer, ask.stop, ask.shown)
        self.done = False
        self.waiting: list[TokenScore] = []
        self.prompt_scores: tuple[TokenScore, ...] = ()
        self.constraint = None if ask.grammar is None else ask.grammar.start()
        seed = secrets.randbits(64) if ask.seed is None else ask.seed
        self.random = random.Random(f"{seed}, row {ask.row}")  # as in ml.generate
        self.deadline = float("inf") if ask.seconds is None else now + ask.seconds

    @property
    def is_plain(self) -> bool:
        """True if the next token is the arg-max of the model's own logits."""
        if self.constraint is not None:
            return False
        return not self.ask.temperature and not self.ask.changes_logits

    def choose(self, logits: Tensor, ends: frozenset[int] = frozenset()) -> int:
        """Return the next token.

        Args:
            logits: logits of this row, (V,).
            ends: the model's own end tokens.

        Raises:
            BrokenGrammar: the grammar of the request allows no token.
        """
        ask = self.ask
        if ask.changes_logits:
            logits = adjusted(logits, ask, ask.prompt, self.text.ids, ask.ends(ends))
        if self.constraint is not None:
            logits = self.constraint.masked(logits)
        uniform = [self.random.random()] if ask.temperature else []
        return pick(logits[None], ask.temperature, ask.top_p, uniform, ask.top_k, ask.min_p)[0]

    def score(self, logits: Tensor, token: int) -> None:
        """Compute the score of the next token, if the request asks for scores.

        Args:
            logits: logits of this row, (V,).
            token: the chosen token.
        """
        if self.ask.logprobs is not None:
            (score,) = token_scores(logits[None], [token], self.ask.logprobs)
            self.waiting.append(score._replace(start=self.text.length))

    def take(self, token: int, ends: frozenset[int]) -> Piece:
        """Append a token to the answer.

        Args:
            token: the token.
            ends: the model's own end tokens.

        Returns:
            The text that becomes visible, and the reason for the end if the answer ends.
        """
        if token in self.ask.ends(ends):
            if self.waiting:
                self.waiting[-1] = self.waiting[-1]._replace(is_end=True)
            return self.end("stop")
        text, stopped = self.text.push(token)
        if self.constraint is not None:
            self.constraint.push(token)
            if self.constraint.is_finished:
                return self.end("stop", text, 1)
        if stopped:
            # The tokens of the stop string do not belong to the answer.
            self.waiting = [score for score in self.waiting if score.start < self.text.length]
            return self.end("stop", text, 1)
        if len(self.text.ids) == self.ask.max_tokens:
            return self.end("length", text, 1)
        return self._piece(text, 1)

    def end(self, reason: str, text: str = "", tokens: int = 0) -> Piece:
        """End the answer.

        Args:
            reason: the reason.
            text: text that has just become visible.
            tokens: number of new tokens.

        Returns:
            The last piece.
        """
        self.done = True
        return self._piece(text + self.text.rest(), tokens, reason)

    def _piece(self, text: str, tokens: int, finish: str | None = None) -> Piece:
        """Return a piece with the scores of its text; the last one takes all that wait."""
        released = len(self.text.released)
        scores = []
        kept = []
        for score in self.waiting:
            if finish is not None or score.start < released:
                scores.append(score)
            else:
                kept.append(score)
        self.waiting = kept
        of_prompt = self.prompt_scores
        self.prompt_scores = ()
        return Piece(self.ask, text, tokens, finish, tuple(scores), of_prompt)


class Text:
    """The text of an answer, released once and only when no later token can change it.

    Three kinds of text wait: incomplete characters, an end that may begin a stop string, and a run
    of SentencePiece's byte tokens (`<0xE6>`), because one invalid byte makes the decoder show all
    bytes of the run as unknown characters. All released parts together are the text that
    `ml.generate` returns for the same tokens and stop strings.

    Args:
        tokenizer: the model's tokenizer.
        stops: texts before which the answer ends.
        shown: special tokens that the text has.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], shown: frozenset[int] = frozenset()
    ) -> None:
        self.shown = shown
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

    @property
    def length(self) -> int:
        """Number of complete characters of the text, also of those that wait."""
        return len(self._text(self.ids).rstrip(HALF))

    def rest(self) -> str:
        """Return the text that still waits, when the answer is complete."""
        return self._release(self._text(self.ids))

    def _text(self, ids: list[int]) -> str:
        text = ""
        start = 0  # of the tokens after the last special token that is shown
        for place, token in enumerate(ids if self.shown else ()):
            if token in self.shown:
                text += self.tokenizer.decode(ids[start:place], skip_special_tokens=True)
                text += self.tokenizer.decode([token], skip_special_tokens=False)
                start = place + 1
        text += self.tokenizer.decode(ids[start:], skip_special_tokens=True)
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
