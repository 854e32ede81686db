"""Tests of silent failures: mistakes in a dataset are reported before the training run starts.

Each case is a mistake that users of TRL, Axolotl, unsloth or transformers have reported; its thread
is in brackets. A run that would learn nothing, or something else than its rows contain, raises an
error. If only the user can decide, the report or the preview has a line about it. A correct dataset
gives no such error or line, and training itself raises the same errors.
"""

import pytest

import minilora as ml
from helpers.chats import CHATML, QWEN3, chat, ours
from helpers.toy import lora
from minilora.data import Tokenizer, encode_dataset
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.training.config import TrainConfig
from minilora.training.loop import train

GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# A template that drops every thought.
R1 = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "clock"}}],
}


def templated(template: str, eos: str = "<|im_end|>", pad: str = "<|endoftext|>") -> Tokenizer:
    """Return the ChatML tokenizer with another template, EOS or padding token."""
    return Tokenizer(ours("chatml").backend, {"eos_token": eos, "pad_token": pad}, template)


def rows(*conversations: list) -> list[dict]:
    return [{"messages": messages} for messages in conversations]


def weighted(*weights: int) -> list[dict]:
    """Return a conversation whose answers have these weights."""
    return [
        turn | ({"weight": weights[i // 2]} if i % 2 else {})
        for i, turn in enumerate(chat(*[f"m{i}" for i in range(2 * len(weights))]))
    ]


ERRORS = {
    "response template not found [trl#1820, trl#1183]": (
        templated(CHATML.replace("'<|im_start|>' +", "'<|im_start|>' + loop.length | string +")),
        rows(chat("a", "b", "c", "d")),
        "row 0, turn 1: the prompt before this answer is not a prefix "
        "of the whole conversation: .*character",
    ),
    "the border merges into one token [trl#598]": (
        ours("chatml"),
        rows(chat("a", "\n\nb")),
        "row 0, turn 1: .* ends inside a token of the whole",
    ),
    "every label masked, by truncation [trl#6668, unsloth#3019]": (
        ours("chatml"),
        rows(chat("a" * 90, "b")),
        "none of 1 rows has an answer to learn.* 1 are cut at max_length",
    ),
    "every label masked, by weights [unsloth#2900]": (
        ours("chatml"),
        rows(weighted(0, 0)),
        "row 0: no assistant turn .* .role, weight. .*.assistant., 0",
    ),
    "labels off by the generation prompt [LlamaFactory#6987]": (
        templated(CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")),
        rows(chat("a", "b")),
        "row 0, turn 1: .* its generation prompt differs from the beginning of an answer",
    ),
    "history rewritten: earlier thoughts are dropped [gem#44, slime#330]": (
        templated(QWEN3),
        rows(chat("a", "<think>p</think>b", "c", "d")),
        "row 0, turn 1: .* rewrites earlier turns",
    ),
    "the thought of every answer is dropped [DeepSeek-R1#633]": (
        templated(R1),
        rows(chat("a", "<think>pah</think>b")),
        "row 0, turn 1: .* leaves out 'pah', of its reasoning",
    ),
    "reasoning_content is ignored [slime#330]": (
        ours("chatml"),
        rows([*chat("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}]),
        "row 0, turn 1: the chat template leaves out 'hm', of its reasoning",
    ),
    "tool calls are ignored [axolotl#3824]": (
        ours("chatml"),
        rows([*chat("a"), CALL]),
        "row 0, turn 1: the chat template leaves out 'clock'",
    ),
    "tools are ignored [fw-ai/cookbook#442]": (
        ours("chatml"),
        [
            {
                "messages": chat("a", "b"),
                "tools": [{"type": "function", "function": {"name": "clock"}}],
            }
        ],
        "row 0: the chat template leaves out 'clock'",
    ),
    "every answer is empty": (
        ours("chatml"),
        rows(chat("a", " "), chat("c", "")),
        "none of 2 rows has an answer to learn.* 2 have an empty",
    ),
}

NOTES = {
    "EOS never trained [axolotl#3754, unsloth#416]": (
        templated(CHATML, eos="<|endoftext|>"),
        rows(chat("a", "b")),
        [
            "1 rows do not train the EOS token: the model may not learn to stop",
            "answers end in: '<|im_end|>' 1",
        ],
    ),
    "a turn that the next one ends [trl#5988]": (
        templated(CHATML.replace("'<|im_end|>\\n'", "''")),
        rows(chat("a", "b")),
        ["1 rows do not train the EOS token", "answers end in: no end token 1"],
    ),
    "padding is EOS [llm-course#33]": (
        templated(CHATML, pad="<|im_end|>"),
        rows(chat("a", "b")),
        ["the padding token is EOS: this is harmless", "answers end in: '<|im_end|>' (EOS) 1"],
    ),
    "completions truncated away [trl#1053]": (
        ours("chatml"),
        rows(chat("a", "b"), chat("a" * 90, "b"), chat("a", "b" * 90)),
        [
            "2 rows cut at max_length 64: their end is not learned (rows 1, 2)",
            "1 rows left out",
            "in: '<|im_end|>' (EOS) 1\n",
        ],
    ),
    "two BOS tokens [sglang#888, unsloth#10312]": (
        ours("llama3"),
        [{"text": "<|begin_of_text|>ab"}],
        ["1 rows began with two BOS tokens: one removed (rows 0)"],
    ),
    "the header is learned: no generation prompt [instructlab/training#232]": (
        templated(CHATML.replace(GENERATION, "")),
        rows(chat("a", "b")),
        [
            "has no generation prompt: "
            "each answer is learned with its header, '<|im_start|>assistant\\n'"
        ],
    ),
    "only the last turn is trained, by weights [axolotl#2696]": (
        ours("chatml"),
        rows(weighted(0, 1), weighted(1, 1)),
        ["1 rows have answers that are not trained: of weight 0, or in the prompt (rows 0)"],
    ),
    "an empty answer": (
        ours("chatml"),
        rows(chat("a", "b"), chat("c", "d", "e", "")),
        ["1 rows have an empty answer: the model learns to answer nothing (rows 1)"],
    ),
    "the text of a special token ends the answer in its middle": (
        ours("chatml"),
        [
            {"messages": chat("a", "b")},
            {"messages": chat("a", "b<|im_end|>c")},
            {"messages": chat("<|im_start|>system", "b")},
            {"prompt": "a", "completion": "b<|im_end|>c<|im_end|>"},
            {"prompt": "a", "completion": "b<|im_end|>"},
        ],
        [
            "3 rows hold the text of special tokens in their content: <|im_end|>, <|im_start|>; "
            "it is read and trained as the tokens themselves (rows 1, 2, 3)"
        ],
    ),
    "equal rows": (
        ours("chatml"),
        rows(chat("a", "b"), chat("c", "d"), chat("a", "b")),
        ["1 rows equal an earlier row (rows 2)"],
    ),
    "the template writes the date [sglang#3296]": (
        templated("{{ strftime_now('%Y') }}" + CHATML),
        rows(chat("a", "b")),
        ["the chat template writes today's date (strftime_now)"],
    ),
}


@pytest.mark.parametrize("tokenizer, data, message", ERRORS.values(), ids=ERRORS)
def test_a_dataset_that_would_train_nothing_or_wrong_text_raises(tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        encode_dataset(data, tokenizer, 64)


@pytest.mark.parametrize("tokenizer, data, lines", NOTES.values(), ids=NOTES)
def test_a_mistake_that_only_the_user_can_judge_is_in_the_preview(tokenizer, data, lines):
    report, known = (
        str(encode_dataset(data, tokenizer, 64).report),
        ml.preview(data, tokenizer, rows=0, max_length=64),
    )
    assert str(known).startswith(report)
    for line in lines:
        assert line in str(known)


def test_a_correct_dataset_gives_three_lines_and_no_error():
    """Thoughts that the template keeps and tool calls that it writes raise no error either."""
    sound = ml.preview(
        rows(chat("a", "b"), chat("hello", "world", "c", "d")), ours("chatml"), rows=0
    )
    first, *rest = str(sound).splitlines()
    assert first == "2 rows, 70 tokens, 10 of them trained (14%), longest 48"
    assert rest[:-1] == [
        "  tokens a row: 1 up to 32, 1 up to 64",
        "  answers end in: '<|im_end|>' (EOS) 2",
    ]
    assert rest[-1].startswith("  chat template ") and len(rest) == 3
    # Mistral's template has no generation prompt and no header.
    assert "generation prompt" not in str(ml.preview(rows(chat("a", "b")), ours("mistral")))
    assert encode_dataset(rows(chat("a", "<think>\nhm\n</think>\n\nb")), templated(QWEN3))
    writes = CHATML.replace(
        "message['content']", "message['content'] + message['tool_calls'] | default('') | string"
    )
    assert encode_dataset(rows([*chat("a"), CALL]), templated(writes)).report.empty == ()


# ---- errors of training itself


def small(vocabulary: int):
    """Return a decoder with a vocabulary of this size, and an adapter."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return lora(CausalLM(DecoderConfig(vocabulary, tie_word_embeddings=True, **sizes)))


def test_a_token_without_a_row_in_the_embedding_is_named_before_training():
    """CUDA reports "device-side assert triggered" [transformers#24698, tokenizers#1609]."""
    tokenizer, data = ours("chatml"), rows(chat("a", "b"), chat("c", "d"))
    needed = len(tokenizer) - 1  # no row has the last token, <|endoftext|>
    config = TrainConfig(max_steps=1, save_steps=None)
    assert train(small(needed), tokenizer, data, config).steps == 1
    with pytest.raises(
        ValueError, match=r"train, row 0: '<\|im_end\|>' has id 265, .* embedding has 265 rows"
    ):
        train(small(needed - 1), tokenizer, data, config)
    plain = [{"text": "abc<|endoftext|>"}]
    with pytest.raises(ValueError, match=r"eval, row 0: '<\|endoftext\|>'"):
        train(small(needed), tokenizer, data, config, eval_dataset=plain)


def test_training_raises_the_same_error():
    with pytest.raises(ValueError, match="none of 1 rows has an answer to learn"):
        train(
            small(300),
            ours("chatml"),
            rows(chat("a" * 90, "b")),
            TrainConfig(max_steps=1, max_length=64),
        )


# ---- rows for another objective


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [False, "False", "false"])
def test_an_undesirable_answer_of_kto_is_not_trained(key, value):
    """A file of KTO has a row for each answer and marks the undesirable ones."""
    pairs = [
        {"prompt": "a", "completion": "b"},
        {"messages": chat("a", "b")},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    for row in pairs:
        with pytest.raises(ValueError, match=f"row 1: '{key}' is false.*Keep the rows whose"):
            encode_dataset([row | {key: True}, row | {key: value}], ours("chatml"))
        data = encode_dataset([row | {key: True}, row | {key: None}], ours("chatml"))
        assert len(data) == 2 and data.report.unused_keys == (key,)


def test_a_label_that_is_not_of_kto_stays_an_unused_key():
    for label in (0, 1, "positive", None):
        row = {"prompt": "a", "completion": "b", "label": label}
        assert len(encode_dataset([row], ours("chatml"))) == 1
