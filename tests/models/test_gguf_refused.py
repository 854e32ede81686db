"""Tests of tokenizers that GGUF or llama.cpp cannot express, and of damaged tokenizer fields.

They are refused before a file is written or a tokenizer is built.
"""

import json

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from helpers.tiny import oracle, twin
from minilora.data import Tokenizer
from minilora.models.gguf.read import TokenizerFields, read_tokenizer_fields
from minilora.models.gguf.tokenizer import BYTES, build
from minilora.models.save import save_model
from tests.models.test_gguf_sentencepiece import of_merges, trained


def changed(kind: str, change) -> Tokenizer:
    """Return the trained tokenizer with its tokenizer.json edited."""
    state = json.loads(trained(kind).backend.to_str())
    change(state)
    return Tokenizer(Backend.from_str(json.dumps(state)), trained(kind).special_tokens)


def added(**flags) -> Tokenizer:
    made = changed("prefix", lambda state: None)
    made.backend.add_tokens([AddedToken("<x>", **flags)])
    return made


def words(model) -> Tokenizer:
    made = Backend(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return Tokenizer(made)


def model_field(**fields):
    return lambda state: state["model"].update(fields)


def without_a_merge(state: dict) -> None:
    """Keep words that are tokens, one of which no merge makes any more."""
    state["model"].update(ignore_merges=True)
    state["model"]["merges"].pop()


def without_a_byte(state: dict) -> None:
    vocabulary = state["model"]["vocab"]
    vocabulary["<0x7G>"] = vocabulary.pop("<0x7F>")


def with_merged_bytes(state: dict) -> None:
    state["model"]["vocab"]["<0xC3><0xA9>"] = state["added_tokens"].pop()["id"]
    state["model"]["merges"].append(["<0xC3>", "<0xA9>"])


REFUSED = {
    "WordPiece": (
        lambda: words(models.WordPiece({"a": 0}, unk_token="a")),
        "got WordPiece cut by .*Metaspace",
    ),
    "Unigram": (lambda: words(models.Unigram([("a", 0.0)], 0)), "got Unigram"),
    "WordLevel": (lambda: words(models.WordLevel({"a": 0}, unk_token="a")), "got WordLevel"),
    "no byte fallback": (
        lambda: changed("prefix", model_field(byte_fallback=False)),
        "with byte_fallback .*got BPE",
    ),
    "ignore_merges": (lambda: changed("prefix", model_field(ignore_merges=True)), "got BPE"),
    "ignore_merges of bytes": (
        lambda: changed("gpt-4o", without_a_merge),
        "ignore_merges=True, and llama.cpp the opposite for pre-tokenizer 'gpt-4o'",
    ),
    "continuing prefix": (
        lambda: changed("gpt-2", model_field(continuing_subword_prefix="#", merges=[])),
        "got BPE cut by",
    ),
    "lower case": (
        lambda: changed(
            "prefix", lambda state: state["normalizer"]["normalizers"].append({"type": "Lowercase"})
        ),
        "after .*Lowercase",
    ),
    "normalised bytes": (
        lambda: changed("gpt-2", lambda s: s.update(normalizer={"type": "NFKC"})),
        "after .*NFKC",
    ),
    "words": (
        lambda: changed("first", lambda state: state["pre_tokenizer"].update(split=True)),
        "cut by .*true",
    ),
    "no byte": (lambda: changed("prefix", without_a_byte), "a token for each of the bytes"),
    "merged bytes": (lambda: changed("prefix", with_merged_bytes), "no merges of them"),
    "lstrip": (
        lambda: added(lstrip=True, normalized=False),
        r"'<x>' everywhere in a text.*\(lstrip\).*normalized=False",
    ),
    "normalized": (lambda: added(normalized=True), r"'<x>' everywhere in a text.*\(normalized\)"),
    "unlisted merge": (
        lambda: of_merges([("a", "b"), ("b", "c"), ("a", "bc")]),
        r"merge \['ab', 'c'\] to .*'abc'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_tokenizers_that_gguf_cannot_express_are_refused(tmp_path, what):
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"GGUF: .*{message}"):
        save_model(twin(oracle(vocab_size=700)), tmp_path, format="gguf", tokenizer=make())
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    """llama.cpp would use token 2 or 11 as EOS."""
    model = twin(oracle(vocab_size=700, eos_token_id=None))
    made = Tokenizer(trained("plain").backend, {"bos_token": "<s>"})
    with pytest.raises(ValueError, match="neither tokenizer nor config names an EOS"):
        save_model(model, tmp_path, format="gguf", tokenizer=made)
    assert not list(tmp_path.iterdir())
    save_model(
        twin(oracle(vocab_size=700, eos_token_id=7)), tmp_path, format="gguf", tokenizer=made
    )
    assert read_tokenizer_fields(tmp_path / "model.gguf").eos_token_id == 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": ["ab"] * 2}, "two of its tokens are the same"),
        ({"tokens": ["<0x00>", "x"]}, "without a token for each of the bytes"),
        (
            {"tokens": [*BYTES, "a", "b", "ab", "ba"], "scores": [0.0] * 260},
            r"tokens \('ab', 'ba'\) have the same score",
        ),
        ({"tokens": [*BYTES, "a", "ab"]}, "the token 'ab' has a character that is not a token"),
        ({"tokens": [*BYTES, "a" * 129]}, "damaged: a token of 129 characters"),
        ({"model": "t5"}, "expected a byte-level BPE tokenizer .* got 't5'"),
    ],
)
def test_build_from_damaged_fields_raises(changes, message):
    count = len(changes.get("tokens", BYTES))
    none = {f"{key}_token_id": None for key in ("bos", "eos", "unk", "pad")}
    known = {
        "model": "llama",
        "pre": None,
        "tokens": BYTES,
        "token_types": [1] * count,
        "merges": [],
    }
    known |= {"scores": [-float(i) for i in range(count)], "add_bos": False, "add_eos": False}
    with pytest.raises(ValueError, match=f"x.gguf.*{message}"):
        build(
            TokenizerFields(
                **known | none | {"add_space_prefix": True, "chat_template": None} | changes
            ),
            "x.gguf",
        )
