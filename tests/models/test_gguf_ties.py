"""Tests of SentencePiece vocabularies in which tokens share a score, and of many added tokens.

Oracle: llama.cpp's merge rule in ten lines (test_gguf_sentencepiece.py), which is SentencePiece's:
the best score first, then the leftmost pair. benchmarks/quality/real_tokenizers.py compares real
vocabularies with the package sentencepiece. Property: for any tied scores, the reader either
refuses the vocabulary or gives these ids.
"""

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data import Tokenizer
from minilora.data.tokenizer import _add_tokens
from minilora.models.gguf.read import TokenizerFields
from minilora.models.gguf.tokenizer import BYTES, build
from tests.models.test_gguf_sentencepiece import as_llama_cpp

# Lengths of Mistral's runs of spaces in the order of their ids; all have the score -10^9
MISTRAL_RUNS = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)
TIED = -1e9


def fields_of(scores: dict[str, float], types: dict[str, int] | None = None) -> TokenizerFields:
    """Return the fields of a SentencePiece file with the bytes and `scores` as its tokens."""
    tokens = [*BYTES, *scores]
    return TokenizerFields(
        model="llama",
        pre="default",
        tokens=tokens,
        token_types=[6] * 256 + [(types or {}).get(token, 1) for token in scores],
        merges=[],
        scores=[0.0] * 256 + list(scores.values()),
        bos_token_id=None,
        eos_token_id=None,
        unk_token_id=None,
        pad_token_id=None,
        add_bos=False,
        add_eos=False,
        add_space_prefix=False,
        chat_template=None,
    )


def with_runs(lengths) -> dict[str, float]:
    """Return scores of a small vocabulary with tied runs of spaces."""
    scores = {"▁" * length: TIED for length in lengths}
    return scores | {"▁": TIED, "a": -9.0, "b": -9.0, "▁a": -1.0, "ab": -2.0, "▁ab": -3.0}


def test_runs_of_spaces_of_mistral_are_cut_from_left_to_right():
    fields = fields_of(with_runs(MISTRAL_RUNS))
    made = Tokenizer(*build(fields, "x"))
    for length in range(70):
        for text in (" " * length, " " * length + "ab", "b" + " " * length + "b a"):
            assert made.encode(text) == as_llama_cpp(fields, text), repr(text)
    fifteen = [len(token) for token in made.convert_ids_to_tokens(made.encode(" " * 15))]
    assert fifteen == [14, 1]  # there is no run of 15


@given(lengths=st.lists(st.integers(2, 9), unique=True, min_size=1))
def test_runs_of_any_lengths_in_any_order_agree_or_are_refused(lengths):
    fields = fields_of(with_runs(lengths))
    try:
        made = Tokenizer(*build(fields, "x"))
    except ValueError as error:
        assert "no list of merges" in str(error)
        assert 2 not in lengths or sorted(lengths) != list(range(2, len(lengths) + 2))
        return
    for length in range(2 * max(lengths) + 3):
        text = " " * length + "a" + " " * (length // 2) + "b"
        assert made.encode(text) == as_llama_cpp(fields, text), repr(text)


def test_tied_tokens_that_cannot_meet_have_the_order_of_their_ids():
    scores = dict.fromkeys(["a", "b", "c", "d"], -9.0) | {"ab": -1.0, "ac": -1.0, "ad": -1.0}
    fields = fields_of(scores)
    made = Tokenizer(*build(fields, "x"))
    for text in ("abacad", "aab", "dacab", "adadabac"):
        assert made.encode(text) == as_llama_cpp(fields, text)


def test_any_tied_scores_agree_or_are_refused():
    outcomes = {"refused": 0, "tied": 0}

    @settings(max_examples=300)
    @given(st.integers(0, 10**9))
    def holds(seed: int) -> None:
        rng = random.Random(seed)
        known = ["a", "b", "c", "d", "e"]
        for _ in range(rng.randint(2, 5)):
            known.append(rng.choice(known) + rng.choice(known))
        scores = dict.fromkeys(known[:5], -9.0)
        for i, token in enumerate(known[5:]):
            # Later tokens have lower scores, as in a trained vocabulary, or the same one.
            scores.setdefault(token, -float(i - rng.randint(0, 1)))
        fields = fields_of(scores)
        merged = list(scores.values())[5:]
        try:
            made = Tokenizer(*build(fields, "x"))
        except ValueError as error:
            assert "the same score" in str(error)
            outcomes["refused"] += 1
            return
        outcomes["tied"] += len(set(merged)) < len(merged)
        for _ in range(20):
            text = "".join(rng.choices("abcde", k=rng.randint(1, 20)))
            assert made.encode(text) == as_llama_cpp(fields, text), (scores, text)

    holds()
    assert outcomes["refused"] > 10
    assert outcomes["tied"] > 10


# ---- many added tokens


class Counted:
    """A `tokenizers.Tokenizer` that counts the calls of add_tokens."""

    calls = 0

    def __init__(self, *arguments) -> None:
        object.__setattr__(self, "inner", REAL(*arguments))

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value) -> None:
        setattr(self.inner, name, value)

    def add_tokens(self, tokens) -> int:
        Counted.calls += 1
        return self.inner.add_tokens(tokens)


REAL = tokenizers.Tokenizer


def test_added_tokens_are_added_in_one_call(monkeypatch, tmp_path):
    """Each call builds the index of all added tokens again: 6,414 calls took 13 s for Gemma."""
    monkeypatch.setattr(tokenizers, "Tokenizer", Counted)
    monkeypatch.setattr(Counted, "calls", 0)
    unused = {f"<unused{i}>": 3 for i in range(50)} | {"<table>": 4}
    scores = {"a": -9.0} | dict.fromkeys(unused, -1000.0)
    made = Tokenizer(*build(fields_of(scores, unused), "x"))
    assert Counted.calls == 1
    assert made.encode("a<unused7><table>") == [256, 264, 307]
    assert made.decode([256, 264, 307], skip_special_tokens=True) == "a<table>"

    backend = Counted(tokenizers.models.BPE({"a": 0}, []))
    listed = {str(i): {"content": f"<x{i}>", "special": True} for i in range(1, 40)}
    _add_tokens(backend, listed, tmp_path / "tokenizer.json")
    assert Counted.calls == 2
    assert backend.token_to_id("<x39>") == 39
    wrong = {"77": {"content": "<y>"}}
    with pytest.raises(
        ValueError, match="gives the added token '<y>' the id 77, the vocabulary 40"
    ):
        _add_tokens(backend, wrong, tmp_path / "tokenizer.json")
