"""Tests of tokenizers of gpt-oss, DeepSeek V3 and Gemma 3 that are written to a GGUF file.

Oracle: the tokenizer that was written; the ids are the same. The trained ones are small, with the
pre-tokenizer and normaliser that the real tokenizer.json files have.
benchmarks/quality/real_tokenizers.py compares the real ones.
"""

import json

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from helpers.tiny import oracle, twin
from minilora.data import Tokenizer, load_tokenizer
from minilora.models.gguf.tokenizer import build
from minilora.models.gguf.tokenizer_export import to_fields
from minilora.models.save import save_model
from tests.models.test_gguf_refused import changed
from tests.models.test_gguf_sentencepiece import texts, trained

# As in DeepSeek V3's tokenizer.json, with real line ends inside the expression
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    "\r\n"
    r"""]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SIZE = 700  # embeddings; the trained tokenizers have fewer tokens


def same(made: Tokenizer, again: Tokenizer, text: str) -> None:
    for special in (True, False):
        expected = made.encode(text, add_special_tokens=special)
        assert again.encode(text, add_special_tokens=special) == expected, repr(text)


def check_round_trip(made: Tokenizer, again: Tokenizer) -> None:
    """Check with many texts that two tokenizers give the same ids."""

    @settings(max_examples=100)
    @given(texts)
    def holds(text: str) -> None:
        same(made, again, text)

    holds()


def test_gpt_oss_tokenizer_with_ignore_merges_is_written():
    """llama.cpp does not ignore merges there; it makes no difference where merges make each token."""
    made = changed("gpt-4o", lambda state: state["model"].update(ignore_merges=True))
    fields = to_fields(made, len(made))
    assert (fields.model, fields.pre) == ("gpt2", "gpt-4o")
    check_round_trip(made, Tokenizer(*build(fields, "x")))


def test_deepseek_tokenizer_is_written():
    made = changed("deepseek-v3", lambda state: None)
    steps = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK]
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    made.backend.normalizer = normalizers.Sequence([])
    fields = to_fields(made, len(made))
    assert (fields.model, fields.pre) == ("gpt2", "deepseek-v3")
    check_round_trip(made, Tokenizer(*build(fields, "x")))


def gemma() -> Tokenizer:
    """Return a trained tokenizer in the form of Gemma's: runs of spaces are added tokens."""
    state = json.loads(trained("plain").backend.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    # As in Gemma's vocabulary, no other token has two spaces, and the first merges make the runs.
    model = state["model"]
    others = [pair for pair in model["merges"] if "▁▁" not in "".join(pair)]
    model["merges"] = [["▁", "▁"], *others]
    kept = {token: i for token, i in model["vocab"].items() if "▁▁" not in token}
    model["vocab"] = kept | {"▁▁": model["vocab"]["▁▁"]}
    backend = Backend.from_str(json.dumps(state))
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    return Tokenizer(backend, trained("plain").special_tokens)


def test_gemma_tokenizer_is_written_with_spaces_in_its_added_tokens():
    made = gemma()
    fields = to_fields(made, SIZE)
    number = made.backend.token_to_id("▁▁")
    assert (fields.model, fields.pre, fields.add_space_prefix) == ("llama", "default", False)
    assert (fields.tokens[number], fields.token_types[number]) == ("  ", 4)
    again = Tokenizer(*build(fields, "x"))

    @settings(max_examples=100)
    @given(texts)
    def holds(text: str) -> None:
        if "▁" not in text:  # only the original finds its added token in " ▁" and "▁▁"
            same(made, again, text)

    holds()


def test_added_tokens_beyond_the_embeddings_are_left_out_with_a_warning(tmp_path):
    made = changed("plain", lambda state: None)
    size = len(made)
    made.backend.add_tokens([AddedToken("<image>", normalized=False, special=True)])
    with pytest.warns(UserWarning, match=f"{size} embeddings.*'<image>'.*without them") as caught:
        save_model(
            twin(oracle(vocab_size=size)), tmp_path / "m.gguf", format="gguf", tokenizer=made
        )
    assert caught[0].filename == __file__
    again = load_tokenizer(tmp_path / "m.gguf")
    assert len(again) == size
    same(made, again, "the object </s> <tool>")
