"""Tests of the labels: only the assistant's answers and their end-of-turn tokens are trained.

Oracle: transformers' mask of assistant tokens. Property: for random conversations the decoded
labels are the answers. Then plain texts, BOS, truncation, the report and errors.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chats import CHATML, END, chat, ours, theirs
from minilora.data import (
    ALPACA_TEMPLATE,
    IGNORE,
    RawText,
    Tokenizer,
    encode_dataset,
    encode_prompt,
    encode_row,
    loss_mask,
)
from minilora.data.report import numbers

KINDS = pytest.mark.parametrize("tokenizer_of", [ours, theirs], ids=["minilora", "transformers"])


def trained(example, tokenizer) -> str:
    """Decode the labels that are trained."""
    return tokenizer.decode([t for t in example.labels if t != IGNORE], skip_special_tokens=False)


def text_of(example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids, skip_special_tokens=False)


# ---- oracle


@pytest.mark.parametrize(
    "contents",
    [("hello", "world"), ("a", "b", "c d", "hello hello"), ("x", "y", "z", "", "u", "v")],
)
def test_labels_are_the_mask_of_transformers(contents):
    """transformers marks the text between {% generation %} tags.

    minilora must find the same tokens without these tags.
    """
    marked = CHATML.replace(
        "message['content'] + '<|im_end|>\\n' }}",
        "'' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )
    messages = chat(*contents, system="be brief")
    theirs_out = theirs("chatml").apply_chat_template(
        messages,
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = encode_row({"messages": messages}, ours("chatml"))
    assert example.input_ids == theirs_out["input_ids"]
    assert [label != IGNORE for label in example.labels] == [
        bool(m) for m in theirs_out["assistant_masks"]
    ]
    assert encode_row({"messages": messages}, theirs("chatml")) == example


# ---- property

words = st.text("helo was.,é中\n ", max_size=12).map(str.strip)


@KINDS
@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_decoded_labels_are_the_answers(tokenizer_of, family, pairs):
    tokenizer = tokenizer_of(family)
    messages = chat(*(content for pair in pairs for content in pair))
    example = encode_row({"messages": messages}, tokenizer)
    space = " " if family == "mistral" else ""
    assert trained(example, tokenizer) == "".join(
        f"{space}{answer}{END[family]}" for _, answer in pairs
    )
    assert text_of(example, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert all(
        label in (IGNORE, token)
        for label, token in zip(example.labels, example.input_ids, strict=True)
    )


SPECIAL = st.sampled_from(["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<|eot_id|>", "\n\n"])


@KINDS
@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
@given(st.lists(st.tuples(words, words | SPECIAL), min_size=2, max_size=5))
def test_borders_found_from_special_tokens_equal_borders_of_whole_prefixes(
    tokenizer_of, family, pairs
):
    """The oracle encodes each prefix of the conversation whole."""
    tokenizer = tokenizer_of(family)
    row = {"messages": chat(*(content for pair in pairs for content in pair))}

    def encoded():
        try:
            return encode_row(row, tokenizer)
        except ValueError as error:
            return str(error)

    fast = encoded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_mask._Whole, "_count_from_anchor", lambda self, part: None)
        assert encoded() == fast


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_the_cost_of_a_conversation_is_linear_in_its_turns(family):
    """512 turns: all calls of the tokenizer together encode less than three times the text."""
    tokenizer = Counting(ours(family))
    example = encode_row({"messages": chat(*["he was.", "hello hello"] * 256)}, tokenizer)
    assert example.trained_tokens > 256 and tokenizer.encoded <= 3 * len(example)


class Counting:
    """A tokenizer that counts the tokens that it encodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, *arguments, **options):
        ids = self.tokenizer.encode(*arguments, **options)
        self.encoded += len(ids)
        return ids


@given(words, words)
def test_qwen3_trains_the_empty_thought_that_it_generates(question, answer):
    tokenizer = ours("qwen3")
    example = encode_row({"messages": chat(question, answer)}, tokenizer)
    assert trained(example, tokenizer) == f"<think>\n\n</think>\n\n{answer}<|im_end|>"


# ---- trained turns


def test_answers_of_weight_zero_and_in_the_prompt_are_not_trained():
    tokenizer = ours("chatml")
    messages = chat("a", "b", "c", "d")
    messages[1]["weight"] = 0
    assert trained(encode_row({"messages": messages}, tokenizer), tokenizer) == "d<|im_end|>"
    split = {"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    assert trained(encode_row(split, tokenizer), tokenizer) == "d<|im_end|>"


def test_qwen3_trains_the_last_answer_if_earlier_ones_have_weight_zero():
    messages = chat("a", "b", "c", "d")
    messages[1]["weight"] = 0
    example = encode_row({"messages": messages}, ours("qwen3"))
    assert trained(example, ours("qwen3")) == "<think>\n\n</think>\n\nd<|im_end|>"


def test_turns_after_the_last_answer_are_dropped_and_reported():
    data = encode_dataset(
        [{"messages": chat("a", "b", "c")}, {"messages": chat("a", "b")}], ours("chatml")
    )
    assert data[0].input_ids == data[1].input_ids and data[0].dropped_turns == 1
    assert data.report.dropped_turns == (0,) and "after the last trained answer" in str(data.report)


def test_tools_reach_the_template():
    tools = [{"name": "clock"}]
    example = encode_row({"messages": chat("a", "b"), "tools": tools}, ours("qwen3"))
    assert '{"name": "clock"}' in text_of(example, ours("qwen3"))


def test_the_alpaca_template_works_for_a_base_model():
    tokenizer = Tokenizer(
        ours("llama3").backend, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    )
    tokenizer.chat_template = ALPACA_TEMPLATE
    data = encode_dataset([{"instruction": "say", "input": "hello", "output": "world"}], tokenizer)
    assert text_of(data[0], tokenizer) == (
        "<|begin_of_text|>### Instruction:\nsay\n\nhello\n\n### Response:\nworld<|eot_id|>\n\n"
    )
    assert trained(data[0], tokenizer) == "world<|eot_id|>" and not data.report.eos_missing


# ---- plain texts, BOS, EOS


@KINDS
@pytest.mark.parametrize(
    "family, row, text, learned",
    [
        ("chatml", {"text": "hello"}, "hello<|im_end|>", "ello<|im_end|>"),
        ("mistral", {"text": "hello"}, "<s>hello</s>", "hello</s>"),
        ("mistral", {"text": "<s>hello</s>"}, "<s>hello</s>", "hello</s>"),
        ("mistral", {"prompt": "he", "completion": " was"}, "<s>he was</s>", " was</s>"),
        ("mistral", {"prompt": "", "completion": "was"}, "<s>was</s>", "was</s>"),
        ("chatml", {"text": "a<|im_end|>\n"}, "a<|im_end|>\n", "<|im_end|>\n"),
    ],
)
def test_plain_texts_get_bos_and_eos_once(tokenizer_of, family, row, text, learned):
    tokenizer = tokenizer_of(family)
    example = encode_row(row, tokenizer)
    assert text_of(example, tokenizer) == text
    if row.get("text") == "hello" and family == "chatml":
        learned = "<|im_end|>"  # "hello" is one token, and the first token has no prediction
    assert trained(example, tokenizer) == learned
    assert example.labels[0] == IGNORE


@KINDS
def test_a_template_that_writes_bos_gets_no_second_one(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id  # the tokenizer adds BOS itself
    data = encode_dataset(
        [{"messages": chat("a", "b")}, {"text": "<|begin_of_text|>ab"}], tokenizer
    )
    assert all(example.input_ids.count(tokenizer.bos_token_id) == 1 for example in data)
    assert data.report.double_bos == (1,) and "two BOS" in str(data.report)
    assert encode_prompt(RawText("<|begin_of_text|>ab"), tokenizer) == tokenizer.encode("ab")


def test_an_eos_that_is_never_trained_is_reported():
    tokenizer = Tokenizer(ours("chatml").backend, {"eos_token": "<|endoftext|>"}, CHATML)
    data = encode_dataset([{"messages": chat("a", "b")}, {"text": "ab"}], tokenizer)
    # The template's end-of-turn token is trained, although it is not the EOS.
    assert trained(data[0], tokenizer) == "b<|im_end|>"
    assert data.report.eos_missing == (0,) and "do not train the EOS" in str(data.report)
    nameless = Tokenizer(ours("chatml").backend, {})
    assert encode_dataset([{"text": "ab"}], nameless).report.eos_missing == (0,)


# ---- truncation and the report


def test_truncation_keeps_the_beginning_and_is_reported():
    tokenizer = ours("chatml")
    rows = [{"messages": chat("a", "b" * n)} for n in (1, 9)]
    whole = [encode_row(row, tokenizer) for row in rows]
    limit = len(whole[1].input_ids) - 3
    data = encode_dataset(rows, tokenizer, max_length=limit)
    assert (
        data[1].input_ids == whole[1].input_ids[:limit]
        and data[1].labels == whole[1].labels[:limit]
    )
    assert data.report.truncated == (1,) and "cut at max_length" in str(data.report)
    assert data.report.eos_missing == ()  # reported once, as truncation
    only_newline = encode_row(rows[1], tokenizer, len(whole[1].input_ids) - 1)
    assert not only_newline.truncated  # no trained token is lost


def test_rows_without_trained_tokens_are_left_out_and_only_such_rows_raise():
    tokenizer = ours("chatml")
    rows = [{"messages": chat("a" * 50, "b")}, {"messages": chat("a", "b")}]
    data = encode_dataset(rows, tokenizer, max_length=40)
    assert [example.row for example in data] == [
        1
    ] and data.report.untrained == data.report.truncated == (0,)
    assert data.report.rows == 2 and "left out" in str(data.report)
    with pytest.raises(
        ValueError,
        match="none of 2 rows has an answer to learn .rows 0, 1.: 0 have .* 2 are cut at max_l",
    ):
        encode_dataset(rows, tokenizer, max_length=10)
    with pytest.raises(ValueError, match="max_length"):
        encode_dataset(rows, tokenizer, max_length=0)


def test_the_report_counts_and_names_unused_keys():
    tokenizer = ours("chatml")
    rows = [{"messages": chat("a", "b"), "id": 7, "none": None}, {"text": "abc", "source": "x"}]
    data = encode_dataset(rows, tokenizer)
    assert data.report.tokens == sum(len(e.input_ids) for e in data) and len(data) == 2
    assert (
        data.report.trained_tokens
        == sum(label != IGNORE for e in data for label in e.labels)
        == 2 + 3
    )
    assert data.report.longest == len(data[0].input_ids)
    assert data.report.unused_keys == ("id", "source")
    assert str(data.report).splitlines()[-1] == "  keys not used: id, source"
    assert numbers(range(10)) == "rows 0, 1, 2, 3, 4, 5, 6, 7, …"


# ---- errors


def test_a_template_that_rewrites_history_names_the_turn():
    with pytest.raises(
        ValueError, match="row 5, turn 1: .*not a prefix.*rewrites earlier turns.*weight"
    ):
        encode_row({"messages": chat("a", "b", "c", "d")}, ours("qwen3"), index=5)


def test_a_generation_prompt_that_does_not_begin_the_answer_raises():
    template = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    tokenizer = Tokenizer(ours("chatml").backend, {"eos_token": "<|im_end|>"}, template)
    with pytest.raises(ValueError, match="row 2, turn 1: .*generation prompt"):
        encode_row({"messages": chat("a", "b")}, tokenizer, index=2)


@KINDS
def test_a_token_across_the_border_of_prompt_and_answer_raises(tokenizer_of):
    r"""The header ends with a newline, the answer begins with two, and "\n\n" is one token."""
    with pytest.raises(
        ValueError,
        match=r"row 0, turn 3: .*ends inside a token of the whole: '\\n' becomes '\\n\\n'",
    ):
        encode_row({"messages": chat("a", "b", "c", "\n\nd")}, tokenizer_of("chatml"))
    with pytest.raises(ValueError, match="row 4: the prompt ends inside a token.*a space"):
        # " w" is one token
        encode_row({"prompt": "he ", "completion": "was"}, tokenizer_of("mistral"), index=4)
    assert encode_row({"prompt": "he", "completion": " was"}, tokenizer_of("mistral"))


@KINDS
@pytest.mark.parametrize(
    "family, messages, problem",
    [
        ("mistral", chat("a", "b", system="s"), "row 0, .*roles must alternate"),
        ("mistral", [{"role": "user", "content": "a"}] * 2, "row 0: no assistant turn to train on"),
    ],
)
def test_an_error_of_the_template_names_the_row(tokenizer_of, family, messages, problem):
    with pytest.raises(ValueError, match=problem):
        encode_row({"messages": messages}, tokenizer_of(family))


def test_a_missing_template_raises_with_the_remedy():
    base = Tokenizer(ours("mistral").backend, {"eos_token": "</s>"})
    with pytest.raises(
        ValueError, match="row 0, .*no chat template.*tokenizer.chat_template = .*ALPACA_TEMPLATE"
    ):
        encode_dataset([{"messages": chat("a", "b")}], base)
