"""Tests of `stream_generate`.

Oracle and property: the pieces together are the text of `generate` for the same arguments, byte for
byte, with tokenizers of bytes and with byte tokens of SentencePiece. No piece ends within a
character or holds a part of a stop string. Then the state of the model between two pieces, and
errors.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from helpers.chats import ours
from helpers.served import build, tokenizer
from minilora.data import Tokenizer
from minilora.generation.sequence import Text

WORDS = ["▁", "a", "b", "c", "▁a", "ab"]


@cache
def byte_fallback() -> Tokenizer:
    """Return a tokenizer as Llama 2 has it: words, and the 256 bytes for all other characters."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend)


@cache
def model():
    return build(adapters=1)


# ---- oracle


stops = st.lists(
    st.sampled_from(["a", "e t", "\ufffd", "\ufffd\ufffd", "hello", 70, 101]), max_size=2
)


@settings(max_examples=20)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.7, 3.0]),
    st.integers(1, 16),
    stops,
    st.booleans(),
)
def test_pieces_together_are_the_text_of_generate(seed, temperature, count, stop, bytes_of_llama):
    """A hot model answers with random bytes, most of which are no characters."""
    text = byte_fallback() if bytes_of_llama else tokenizer()
    options = {"max_new_tokens": count, "temperature": temperature, "seed": seed, "stop": stop}
    pieces = list(ml.stream_generate(model(), text, "a b", **options))
    expected = ml.generate(model(), text, "a b", **options)
    assert "".join(pieces) == expected
    assert all(pieces)
    assert not any(word in piece for piece in pieces for word in stop if isinstance(word, str))


parts = st.sampled_from(["ab", " ", "a", "é", "🙂", "漢", "b", "\u0301", "ab a", "é🙂"])
texts = st.lists(parts, max_size=8).map("".join)
words = st.lists(st.sampled_from(["ab a", "é🙂", "a ", "bb"]), max_size=2)


@given(st.lists(st.integers(1, 260), max_size=8), texts, st.integers(0, 3), words)
def test_released_text_is_never_taken_back(noise, said, cut, stops):
    """An incomplete end makes the decoder show a run of byte tokens as unknown characters."""
    text = byte_fallback()
    ids = text.encode(said, add_special_tokens=False)
    ids = ids[: len(ids) - cut] + noise
    grown = Text(text, stops)
    released = ""
    for token in ids:
        piece, stopped = grown.push(token)
        released += piece
        assert not any(word in released for word in stops)
        if stopped:
            break
    expected = text.decode(grown.ids, skip_special_tokens=True)
    for word in stops:
        expected = expected.partition(word)[0]
    assert released + grown.rest() == expected


# ---- property


def test_pieces_come_before_the_answer_is_complete():
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Name three colours."},
    ]
    pieces = list(ml.stream_generate(model(), tokenizer(), messages, max_new_tokens=16))
    assert "".join(pieces) == ml.generate(model(), tokenizer(), messages, max_new_tokens=16)
    assert len(pieces) > 5


def test_gradients_are_on_between_two_pieces_and_the_mode_comes_back():
    made = build(adapters=1).train()
    pieces = ml.stream_generate(made, tokenizer(), "hello", max_new_tokens=20)
    assert torch.is_grad_enabled() and made.training
    next(pieces)
    assert torch.is_grad_enabled() and not made.training
    pieces.close()
    assert made.training and not any("forward" in vars(module) for module in made.modules())


# ---- error


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (["one", "two"], {}, "answers one prompt, .* got .'one', 'two'."),
        ("", {}, "empty"),
        ("a", {"stop": ""}, "stop contains an empty string"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("a", {"max_new_tokens": 600}, "exceed the model's context of 512"),
        ([{"role": "user"}], {}, "content"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_first_piece(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        ml.stream_generate(model(), ours("chatml"), prompt, **options)
