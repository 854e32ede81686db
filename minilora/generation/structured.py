"""Answers that follow a JSON schema: tokens that would break it are forbidden at each step.

    logits (V,)      the model's, for one row
    allowed (V,)     token t is allowed if text + t begins a document of the schema
    logits[~allowed] = -inf, then the token is chosen as always

The package llguidance compiles the schema and computes `allowed`. An end token is allowed only
after a complete document. So an answer that ends is valid, and only an answer that reaches its
largest length can be incomplete. JSON is written with one space after each comma and colon, as
json.dumps writes it, and no other space between its parts.

Rows without a schema do not pass through this file. A schema that llguidance cannot enforce
exactly (`uniqueItems`, `not`, `if`) is refused.

Source: llguidance, https://github.com/guidance-ai/llguidance
"""

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.common.extras import require
from minilora.data.chat_template import WithTemplateKwargs
from minilora.generation.config import GenerationConfig
from minilora.generation.json_schema import schema_of
from minilora.generation.sampling import Decoding

SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
KEPT = 32  # compiled grammars that are kept
KEPT_TOKENIZERS = 2


class BrokenGrammar(ValueError):
    """An answer that its grammar does not let continue."""


class Grammar:
    """A compiled JSON schema for one tokenizer.

    Args:
        matcher: the matcher of llguidance, at the beginning of a document.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> "Constraint":
        """Return the constraint of a new answer."""
        return Constraint(self._matcher.deep_copy())

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Return True if an answer is a complete document.

        Args:
            ids: token ids of the answer, without end tokens.
        """
        matcher = self._matcher.deep_copy()
        for token in ids:
            if not matcher.consume_token(token):
                return False
        return matcher.is_accepting()


class Constraint:
    """The state of one answer that follows a grammar.

    Args:
        matcher: the matcher of llguidance; it belongs to this answer.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """True if the document is complete and no token can follow."""
        return self._matcher.is_stopped()

    def masked(self, logits: Tensor) -> Tensor:
        """Return logits in which forbidden tokens have -inf.

        Args:
            logits: logits of this row, (V,).

        Raises:
            BrokenGrammar: no token is allowed, because the schema exceeds a limit of llguidance, or
                no token of the vocabulary can continue the document.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: len(logits)]
        allowed = torch.zeros(len(logits), dtype=torch.bool)  # (V,)
        allowed[: len(bits)] = torch.from_numpy(bits).bool()
        if self._matcher.is_error() or not allowed.any():
            reason = self._matcher.get_error() or "no token can continue the document"
            raise BrokenGrammar(f"schema: the answer cannot be continued: {reason:.200}")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def push(self, token: int) -> None:
        """Append a token of the answer.

        Args:
            token: the token; `masked` allowed it.

        Raises:
            BrokenGrammar: the token is not allowed.
        """
        if not self._matcher.consume_token(token):
            raise BrokenGrammar(f"schema: token {token} is not allowed here.")


_lock = Lock()
_tables: OrderedDict[Any, Any] = OrderedDict()  # (tokenizer, size, ends) -> its table
_grammars: OrderedDict[Any, Grammar] = OrderedDict()  # (…, schema) -> grammar


def compile_schema(schema: Any, tokenizer: Any, ends: Collection[int]) -> Grammar:
    """Return the grammar of a JSON schema; the most recent ones are kept.

    Args:
        schema: "json" for any JSON object, a JSON schema (a dict), or a pydantic class.
        tokenizer: the model's tokenizer, of minilora or transformers.
        ends: tokens that end an answer.

    Raises:
        ValueError: the schema is not valid or uses a keyword that cannot be enforced exactly, or
            the tokenizer is of a kind that llguidance does not know.
        ImportError: llguidance is not installed.
    """
    require("an answer that follows a schema", "llguidance")
    import llguidance

    text = json.dumps(schema_of(schema))
    if not ends:
        raise ValueError("schema: the model has no end token, which must follow the document.")
    base = _unwrapped(tokenizer)
    key = (base, len(base), frozenset(ends))
    with _lock:
        grammar = _grammars.get((*key, text))
        if grammar is None:
            table = _table(llguidance, base, key)
            grammar = Grammar(_compile(llguidance, text, table))
            _keep(_grammars, (*key, text), grammar, KEPT)
        _grammars.move_to_end((*key, text))
    return grammar


def grammar_of(config: GenerationConfig, tokenizer: Any, ends: frozenset[int]) -> Grammar | None:
    """Return the grammar of a config's schema, or None without a schema.

    Args:
        config: the options of the generation.
        tokenizer: the model's tokenizer.
        ends: the model's own end tokens.
    """
    if config.schema is None:
        return None
    return compile_schema(config.schema, tokenizer, ends)


def check_complete(answers: Sequence[Sequence[int]], rule: Decoding) -> None:
    """Raise ValueError for answers that ended before their JSON document.

    Args:
        answers: token ids of each answer, without end tokens.
        rule: the rules of the generation; without a grammar every answer is complete.

    Raises:
        ValueError: answers are incomplete.
    """
    if rule.grammar is None:
        return
    numbers = []
    for number, answer in enumerate(answers):
        if not rule.grammar.is_complete(answer):
            numbers.append(number)
    if numbers:
        raise ValueError(
            f"schema: the answers to prompts {numbers[:8]} are not complete after max_new_tokens = "
            f"{rule.max_new_tokens}: raise it, or limit the schema (maxLength, maxItems)."
        )


def _unwrapped(tokenizer: Any) -> Any:
    """Return the tokenizer inside a wrapper that only sets variables of the chat template."""
    return tokenizer.tokenizer if isinstance(tokenizer, WithTemplateKwargs) else tokenizer


def _table(llguidance: Any, tokenizer: Any, key: tuple[Any, int, frozenset[int]]) -> Any:
    """Return llguidance's form of a tokenizer; it takes seconds to build, so it is kept."""
    if key in _tables:
        return _tables[key]
    backend = getattr(tokenizer, "backend", None)
    backend = getattr(tokenizer, "backend_tokenizer", backend)
    if backend is None:
        raise ValueError(
            f"schema: {type(tokenizer).__name__} has no tokenizer.json: use ml.load_tokenizer, or "
            "a fast tokenizer of transformers."
        )
    try:
        table = llguidance.LLTokenizer(backend.to_str(), eos_token=sorted(key[2]))
    except ValueError as error:
        raise ValueError(
            f"schema: llguidance cannot read this tokenizer, whose tokens must be bytes or "
            f"characters of the text: {error}"
        ) from error
    _keep(_tables, key, table, KEPT_TOKENIZERS)
    return table


def _compile(llguidance: Any, schema: str, table: Any) -> Any:
    """Return a matcher, or raise ValueError with llguidance's reason."""
    matcher = llguidance.LLMatcher
    try:
        grammar = matcher.grammar_from_json_schema(schema, defaults=SPACES)
    except ValueError as error:
        raise ValueError(f"schema: {error}") from error
    limits = llguidance.LLParserLimits(verbose_errors=False)
    made = matcher(table, grammar, log_level=0, limits=limits)
    if made.is_error():
        reason = made.get_error().strip().splitlines()[0]
        raise ValueError(f"schema: it cannot be enforced: {reason}.")
    return made


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add an entry; the one that was not used for the longest time leaves a full cache."""
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)
