"""Tests of the rules that change or restrict the next token.

Oracle: the logits processors of transformers on random logits, and OpenAI's formula of presence and
frequency. Property: neutral values change nothing, and `ml.generate` applies each rule. Error:
numbers out of range and unknown fields.
"""

import dataclasses
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import minilora as ml
from helpers.chats import ours
from helpers.served import build
from minilora.data import RawText
from minilora.generation.config import GenerationFields
from minilora.generation.penalties import TokenRules, adjusted
from minilora.generation.sampling import pick

VOCABULARY = 60
PROMPT = [3, 5, 5, 8]
ANSWER = [8, 9, 9, 9, 11]
ENDS = frozenset({2, 7})


@pytest.fixture
def logits():
    return 3 * torch.randn(VOCABULARY)


def change(logits: torch.Tensor, **rules: Any) -> torch.Tensor:
    return adjusted(logits, TokenRules(**rules), PROMPT, ANSWER, ENDS)


# ---- oracle


@pytest.mark.parametrize("penalty", [0.5, 1.3, 3.0])
def test_repetition_penalty_equals_that_of_transformers(logits, penalty):
    ids = torch.tensor([PROMPT + ANSWER])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None])[0]
    assert torch.equal(change(logits, repetition_penalty=penalty), expected)


@pytest.mark.parametrize("count", [0, 5, 6])
def test_min_tokens_equals_min_new_tokens_of_transformers(logits, count):
    ids = torch.tensor([PROMPT + ANSWER])
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), count, [*ENDS])
    assert torch.equal(change(logits, min_tokens=count), processor(ids, logits[None])[0])


def test_presence_and_frequency_follow_the_formula_of_openai(logits):
    counts = np.bincount(ANSWER, minlength=VOCABULARY)
    expected = logits.numpy() - counts * np.float32(0.7) - (counts > 0) * np.float32(0.3)
    found = change(logits, frequency_penalty=0.7, presence_penalty=0.3)
    # two fp32 operations in another order
    tolerance = 4 * np.finfo(np.float32).eps * (np.abs(expected).max() + 3)
    assert np.abs(found.numpy() - expected).max() <= tolerance


def test_top_k_top_p_and_min_p_leave_the_tokens_of_transformers():
    """Equally spaced numbers u draw every token that is left."""
    drawn_sizes = set()
    for seed in range(6):
        logits = 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        for top_k, top_p, min_p in [(0, 1.0, 0.1), (9, 0.8, 0.0), (9, 0.9, 0.3), (0, 0.7, 0.05)]:
            left = logits / 0.8
            for warper in (
                TopKLogitsWarper(top_k or VOCABULARY),
                TopPLogitsWarper(top_p),
                MinPLogitsWarper(min_p),
            ):
                left = warper(None, left)  # pyright: ignore[reportArgumentType] no ids
            expected = (left[0] > -torch.inf).nonzero().flatten().tolist()
            steps = 20000  # the smallest probability that is left is above 1 / 2000
            sweep = [(i + 0.5) / steps for i in range(steps)]
            drawn = pick(logits.expand(steps, -1), 0.8, top_p, sweep, top_k, min_p)
            assert sorted({*drawn}) == expected
            drawn_sizes.add(len(expected))
    assert len(drawn_sizes) > 3


# ---- property


def test_neutral_rules_change_nothing(logits):
    assert not TokenRules().changes_logits
    assert torch.equal(change(logits), logits)


def test_a_bias_is_added(logits):
    found = change(logits, logit_bias={4: -100.0, 6: 2.5})
    assert found[4] == logits[4] - 100 and found[6] == logits[6] + 2.5
    others = [token for token in range(VOCABULARY) if token not in (4, 6)]
    assert torch.equal(found[others], logits[others])


def test_generate_applies_the_rules():
    model = build(adapters=0)
    tokenizer = ours("chatml")

    def generate(config: Any = None, **fields: Any) -> str:
        return ml.generate(model, tokenizer, RawText("hello"), config, **fields)

    config = ml.GenerationConfig(max_new_tokens=10)
    assert generate(config) == generate(max_new_tokens=10)
    assert generate(config, max_new_tokens=3) == generate(max_new_tokens=3)
    letter = tokenizer.encode("b", add_special_tokens=False)[0]
    assert generate(config, logit_bias={letter: 1000.0}) == "b" * 10
    answer = generate(config, logit_bias={letter: 1000.0}, frequency_penalty=10000.0)
    assert answer.count("b") == 1
    rules = {"logit_bias": {letter: 1000.0}, "frequency_penalty": 10000.0}
    pieces = ml.stream_generate(model, tokenizer, RawText("hello"), config, **rules)
    assert "".join(pieces) == answer
    ended = {"logit_bias": {tokenizer.eos_token_id: 1000.0}}
    assert generate(config, **ended) == ""
    assert generate(config, **ended, min_new_tokens=3) == generate(max_new_tokens=3)
    assert generate(config, **ended, ignore_eos=True) == ""  # end tokens are not shown
    free = generate(config, temperature=2.0, seed=1)
    assert generate(config, temperature=2.0, seed=1, min_p=1.0) == generate(config) != free


def test_the_keywords_of_generate_are_the_fields_of_its_config():
    fields = [field.name for field in dataclasses.fields(ml.GenerationConfig)]
    assert [*get_type_hints(GenerationFields)] == fields


# ---- error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": -0.1}, "min_p must be 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must give token ids a finite number"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must give token ids a finite number"),
        ({"min_new_tokens": -1}, "min_new_tokens must be 0 or more"),
        ({"repetition_penaltie": 2}, "'repetition_penaltie' matches nothing. Nearest: 'repetition"),
    ],
)
def test_generate_refuses_wrong_rules(fields, message):
    with pytest.raises(ValueError, match=message):
        ml.generate(build(adapters=0), ours("chatml"), "hello", **fields)
