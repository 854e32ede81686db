"""Tests of trained tokenizers, byte-level and SentencePiece, that are read from a GGUF file.

The ids are the same. Oracles: the original tokenizer, transformers' GGUF reader if it knows the
kind, and llama.cpp's merge algorithm in ten lines (test_llama_cpp.py runs llama.cpp itself).
Property: for any list of merges, the writer either refuses, with a text that llama.cpp would encode
differently, or both agree. Errors: test_gguf_refused.py.
"""

import json
import random
import warnings
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from helpers.chats import CHATML
from helpers.tiny import oracle, twin
from minilora.data import Tokenizer, load_tokenizer
from minilora.models.gguf.read import TokenizerFields, read_tokenizer_fields
from minilora.models.gguf.tokenizer import BYTES, WORDS, build, cut_words, escape_spaces
from minilora.models.gguf.tokenizer_export import to_fields
from minilora.models.save import save_model

FORMS = ("prefix", "plain", "never", "first", "always")  # of SentencePiece: how ▁ is added
SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def trained(kind: str) -> Tokenizer:
    """Return a tokenizer of 600 tokens, trained on Python's manual; `kind` is in WORDS or FORMS."""
    made = Backend(
        models.BPE(byte_fallback=kind in FORMS, unk_token="<unk>" if kind in FORMS else None)
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in WORDS:
        made.model.ignore_merges = kind == "llama-bpe"
        cut_words(made, kind)
    else:
        alphabet = []
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence(
            steps + [decoders.Strip(" ", 1, 0)] * (kind not in ("plain", "never"))
        )
        if kind in ("prefix", "plain"):
            escape_spaces(made, kind == "prefix")
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    size, limit, special = (600, 80, SPECIAL + BYTES) if kind in FORMS else (560, 256, SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        limit_alphabet=limit,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    lines = "\n".join(topics.values())[:40_000].split("\n")
    made.train_from_iterator([*lines, *["  é 日本  \n\n"] * 9], trainer)
    state = json.loads(made.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in SPECIAL
    ]
    made = Backend.from_str(json.dumps(state))
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return Tokenizer(made, named, CHATML)


def file_of(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tested below
        save_model(
            twin(oracle(vocab_size=len(trained(kind)) + 3)),
            path,
            format="gguf",
            tokenizer=trained(kind),
        )
    return path


@pytest.fixture(scope="module", params=[*FORMS, *WORDS])
def files(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, file_of(request.param, tmp_path_factory.mktemp("gguf"))


WRITTEN = [
    "the",
    "of ",
    " print",
    "object",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "12",
    "3.14",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "▁",
    "\0",
]
texts = st.text(max_size=20) | st.lists(st.sampled_from(WRITTEN), max_size=12).map("".join)


def as_llama_cpp(fields: TokenizerFields, text: str) -> list[int]:
    """Return the ids of a text without special tokens, as llama.cpp computes them."""
    ids = {token: number for number, token in enumerate(fields.tokens)}
    parts = list((" " * (fields.add_space_prefix and bool(text)) + text).replace(" ", "▁"))
    while True:
        pairs = [
            (a + b, i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in ids
        ]
        if not pairs:
            break
        joined, i = max(pairs, key=lambda pair: (fields.scores[ids[pair[0]]], -pair[1]))
        parts[i : i + 2] = [joined]
    split = [
        [part] if part in ids else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts
    ]
    return [ids[part] for part in sum(split, [])]


# ---- oracles and round trip


def test_ids_are_those_of_the_original_of_transformers_and_of_llama_cpp(files):
    kind, path = files
    made, again, fields = trained(kind), load_tokenizer(path), read_tokenizer_fields(path)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    @settings(max_examples=150)
    @given(texts)
    def holds(text: str) -> None:
        ids = again.encode(text, add_special_tokens=False)
        if kind in FORMS:
            assert ids == as_llama_cpp(fields, text)
        if kind not in ("first", "always") or not text.startswith((" ", "▁")):
            assert ids == made.encode(text, add_special_tokens=False)
            assert again.encode(text) == made.encode(text) == [1, *ids]
            assert again.decode(ids) == made.decode(ids)
        # transformers rebuilds only the kind "first" of SentencePiece. It omits SmolLM2's digit
        # rule and, in a llama file, Qwen2's normaliser.
        if kind in ("first", "gpt-2", "llama-bpe"):
            assert reference.encode(text, add_special_tokens=False) == made.encode(
                text, add_special_tokens=False
            )

    holds()


def test_written_fields_match_the_tokenizer(files):
    kind, path = files
    fields, size = read_tokenizer_fields(path), len(trained(kind))
    spm = kind in FORMS
    assert (fields.model, fields.pre) == (("llama", "default") if spm else ("gpt2", kind))
    assert (fields.bos_token_id, fields.eos_token_id, fields.unk_token_id, fields.pad_token_id) == (
        1,
        2,
        0,
        0,
    )
    assert (fields.add_bos, fields.add_eos, fields.chat_template) == (True, False, CHATML)
    assert fields.add_space_prefix == (kind in ("prefix", "first", "always"))
    assert fields.token_types[:3] == [2 if spm else 3, 3, 3]
    assert fields.token_types[size - 1 :] == [4, 5, 5, 5]
    if spm:
        assert fields.token_types[3:259] == [6] * 256
        state = json.loads(trained(kind).backend.to_str())["model"]
        ranked = sorted(range(3, size - 1), key=lambda i: -fields.scores[i])
        assert [fields.tokens[i] for i in ranked[: len(state["merges"])]] == [
            "".join(m) for m in state["merges"]
        ]


def test_special_tokens_split_a_text(tmp_path):
    again = load_tokenizer(file_of("prefix", tmp_path))
    for text in ("a</s>b <tool>  c<unk>", "<s>", " </s> ", "<0x41>"):
        assert again.encode(text) == trained("prefix").encode(text)
    assert again.decode(again.encode("a b"), skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("kind", ["first", "always"])
def test_saving_a_metaspace_tokenizer_warns(tmp_path, kind):
    with pytest.warns(UserWarning, match=f"llama.cpp puts ▁ before every text.*{kind}") as caught:
        save_model(
            twin(oracle(vocab_size=700)),
            tmp_path / "m.gguf",
            format="gguf",
            tokenizer=trained(kind),
        )
    assert caught[0].filename == __file__
    again = load_tokenizer(tmp_path / "m.gguf")
    assert (
        trained(kind).encode(" x")
        == trained(kind).encode("x")
        == again.encode("x")
        != again.encode(" x")
    )


def test_transformers_llama_tokenizers_are_taken(tmp_path):
    from transformers import LlamaTokenizer

    state = json.loads(trained("first").backend.to_str())["model"]
    made = LlamaTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])
    with pytest.warns(UserWarning, match="first"):
        fields = to_fields(made, len(made))
    assert (fields.model, fields.unk_token_id, fields.token_types[0]) == ("llama", 0, 2)
    again = Tokenizer(*build(fields, "x"))
    assert again.encode("the object") == made.encode("the object")
    # transformers ignores a leading space; sentencepiece and the file read again do not.
    assert made.encode(" the object") == made.encode("the object")
    assert again.encode(" the object") != again.encode("the object")


# ---- property


def of_merges(merges: list[tuple[str, str]], letters: str = "abc") -> Tokenizer:
    vocabulary = dict.fromkeys([*SPECIAL, *BYTES, "▁", *letters, *map("".join, merges)])
    made = Backend(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, byte_fallback=True)
    )
    escape_spaces(made, False)
    return Tokenizer(made, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})


def test_any_merges_agree_or_are_refused():
    refused = []

    @settings(max_examples=200)
    @given(st.integers(0, 10**9))
    def holds(seed: int) -> None:
        rng, known, merges = random.Random(seed), ["a", "b", "c"], []
        for _ in range(rng.randint(1, 9)):
            pair = rng.choice(known), rng.choice(known)
            if pair not in merges:
                merges.append(pair)
                known.append("".join(pair))
        rng.shuffle(merges)
        made = of_merges(merges)
        try:
            fields = to_fields(made, len(made))
        except ValueError as error:
            token = str(error).split("to the token '")[1].partition("'")[0]
            assert len(made.encode(token)) == 2  # llama.cpp's rule joins the two
            refused.append(token)
            return
        again = Tokenizer(*build(fields, "x"))
        for _ in range(20):
            text = "".join(rng.choices("abc", k=rng.randint(1, 30)))
            assert as_llama_cpp(fields, text) == made.encode(text) == again.encode(text), (
                merges,
                text,
            )

    holds()
    assert 10 < len(refused) < 190


def test_a_token_with_two_merges_has_the_score_of_the_possible_one():
    """a·bc has rank 0 but never happens, because a·b comes before b·c; so c·a comes before ab·c."""
    made = of_merges([("a", "bc"), ("a", "b"), ("c", "a"), ("b", "c"), ("ab", "c")])
    fields = to_fields(made, len(made))
    again = Tokenizer(*build(fields, "x"))
    assert made.convert_ids_to_tokens(made.encode("abca")) == ["ab", "ca"]
    assert as_llama_cpp(fields, "abca") == again.encode("abca") == made.encode("abca")
