"""Tests of prompts: a prompt has the tokens that training puts before the answer.

Also the token that ends an answer.
"""

import json

import pytest

from helpers.chats import END, FAMILIES, chat, ours, real, theirs
from minilora.data import (
    IGNORE,
    RawText,
    Tokenizer,
    encode_prompt,
    encode_row,
    end_of_turn,
    split_prompt,
)
from minilora.data.prompt import is_special
from minilora.losses.classification import Classify
from minilora.losses.dpo import DPO

KINDS = pytest.mark.parametrize("tokenizer_of", [ours, theirs], ids=["minilora", "transformers"])


@KINDS
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prompt_is_encoded_as_it_was_trained(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    rows = [{"messages": chat("hello", "world")}, {"prompt": "hello", "completion": " world"}]
    for row in rows:
        example = encode_row(row, tokenizer)
        prompt, answer = split_prompt(row)
        ids = encode_prompt(prompt, tokenizer)
        assert example.input_ids[: len(ids)] == ids
        assert (
            example.labels[: len(ids)] == [IGNORE] * len(ids) and IGNORE != example.labels[len(ids)]
        )
        assert answer.strip() == "world"


@KINDS
@pytest.mark.parametrize("family", list(FAMILIES))
def test_end_of_turn_is_the_token_that_ends_an_answer(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    assert tokenizer.decode([end_of_turn(tokenizer)], skip_special_tokens=False) == END[family]


def test_a_single_space_token_of_sentencepiece_is_not_special():
    """The decoder strips the first space, so the token decodes to nothing, as special tokens do."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordLevel({"\u2581": 0, "a": 1, "</s>": 2}, unk_token="a"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    assert [is_special(tokenizer, token) for token in range(3)] == [False, False, True]


def test_a_str_is_a_user_message_only_if_there_is_a_chat_template():
    tokenizer = ours("llama3")
    as_chat = tokenizer.apply_chat_template(chat("hello"), add_generation_prompt=True)
    assert encode_prompt("hello", tokenizer) == encode_prompt(chat("hello"), tokenizer) == as_chat
    base = Tokenizer(tokenizer.backend, tokenizer.special_tokens)
    assert (
        encode_prompt("hello", base)
        == encode_prompt(RawText("hello"), tokenizer)
        == tokenizer.encode("hello")
    )
    assert end_of_turn(base) is None
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompt(RawText(""), ours("chatml"))


@KINDS
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_form_of_a_prompt_gives_the_same_tokens(tokenizer_of, family):
    """Qwen3 would ask an empty question for a list of parts, and Llama-3 write it as Python does."""
    tokenizer = tokenizer_of(family)
    ids = encode_prompt(chat("hello"), tokenizer)
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert encode_prompt([{"role": "user", "content": parts}], tokenizer) == ids
    assert encode_prompt([{"from": "human", "value": "hello"}], tokenizer) == ids
    assert encode_prompt([{"role": "user", "content": "hello", "name": None}], tokenizer) == ids


def test_every_objective_reads_its_conversations_as_rows_are_read():
    tokenizer = ours("chatml")
    parts = [{"type": "text", "text": "hello"}]
    question = chat("hello")
    others = [[{"from": "human", "value": "hello"}], [{"role": "user", "content": parts}]]
    labelled = {"messages": question, "label": "a"}
    classify = Classify(["a", "b"])
    pair = {"chosen": chat("", "b")[1:], "rejected": chat("", "c")[1:]}
    for other in [*others, json.dumps(question)]:
        given = classify.encode([labelled | {"messages": other}], tokenizer, None)
        assert given[0].input_ids == classify.encode([labelled], tokenizer, None)[0].input_ids
    for other in others:
        given = DPO().encode([pair | {"prompt": other}], tokenizer, None)
        assert given == DPO().encode([pair | {"prompt": question}], tokenizer, None)
    with pytest.raises(ValueError, match=r"row 0, prompt\[0\]: unknown role 'usr'"):
        DPO().encode([pair | {"prompt": [{"role": "usr", "content": "a"}]}], tokenizer, None)


@pytest.mark.parametrize(
    "prompt, problem",
    [
        ([{"role": "usr", "content": "a"}], r"prompt, messages\[0\]: unknown role 'usr'. Expected"),
        ([{"role": "human", "content": "a"}], r"messages\[0\]: unknown role 'human'"),
        ([{"from": "robot", "value": "a"}], "unknown role 'robot'. Expected one of human"),
        ([{"role": "user", "value": "a"}], "content must be a text, got NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part 0 has the type 'image'"),
        ([{"role": "user", "content": {"text": "a"}}], "content must be a text, got dict"),
        ([], "'messages' must be a list of messages, got an empty one"),
        ([{"role": "developer", "content": "a"}, *chat("b")], "prompt, turn 0: .* leaves out 'a'"),
    ],
)
def test_a_prompt_is_checked_as_a_row_is(prompt, problem):
    with pytest.raises(ValueError, match=problem):
        encode_prompt(prompt, real("qwen3"))


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": "a"}, "row 3: a plain text has no prompt"),
        ({"messages": chat("a")}, "row 3: no assistant turn"),
        ({"messages": chat("a", "b"), "tools": [{}]}, "row 3: tools"),
    ],
)
def test_split_prompt_refuses_rows_without_an_answer(row, problem):
    with pytest.raises(ValueError, match=problem):
        split_prompt(row, 3)
