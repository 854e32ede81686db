"""Proves the sampling of groups: log p of the model's own distribution, and one read of a prompt.

Oracle: the model's logits over the whole text, without a KV cache. Property: the share of each
first token is its probability.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from helpers.objective_laws import stirred
from helpers.toy import VOCABULARY, llama, lora
from minilora.generation.rollouts import sample_groups
from minilora.generation.sampling import Decoding
from minilora.models.padded_batch import Context

PROMPTS = [[5, 9, 31], [5, 9, 40, 77, 8], [6]]
END = frozenset({2})


def rule(**fields) -> Decoding:
    values: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "ends": END}
    return Decoding(**values | fields)


# ---- oracle


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_p_is_that_of_the_model_without_a_cache(temperature):
    model = stirred(lora(llama()))
    groups = sample_groups(model, PROMPTS, 4, rule(temperature=temperature))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 4
        for answer in group:
            ids = torch.tensor([prompt + answer.tokens])
            logits = model(ids)[0, len(prompt) - 1 : -1].double() / temperature
            expected = logits.log_softmax(-1)[range(len(answer.tokens)), answer.tokens]
            # fp32 in another order: the logits are of size 3
            torch.testing.assert_close(
                torch.tensor(answer.logprobs).double(), expected, rtol=0, atol=1e-5
            )


def test_greedy_answers_are_those_of_the_arg_max():
    model = llama()
    (group,) = sample_groups(model, PROMPTS[:1], 2, rule(temperature=0.0))
    ids = list(PROMPTS[0])
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert group[0].tokens == group[1].tokens == ids[3:] and not group[0].ended


def test_first_tokens_have_the_probability_of_the_model():
    """The squared error of n draws over K cells is (1 − Σ p²) / n on average; 4 sd are allowed."""
    model = llama(seed=1)
    model.get_output_embeddings().weight.data.mul_(4)  # a distribution with a few likely tokens
    count = 2000
    (group,) = sample_groups(model, PROMPTS[:1], count, rule(max_new_tokens=1, batch_size=count))
    p = model(torch.tensor([PROMPTS[0]]))[0, -1].double().softmax(-1)
    found = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token, number in Counter(answer.tokens[0] for answer in group).items():
        found[token] = number / count
    deviation = (p * (1 - p) / count).sqrt()
    assert ((found - p).abs() <= 5 * deviation + 1 / count).all()
    assert p.max() > 0.05


# ---- properties


def test_an_answer_does_not_depend_on_the_batch():
    model = llama()
    found = [sample_groups(model, PROMPTS, 4, rule(batch_size=size)) for size in (1, 8, 100)]
    for groups in found[1:]:
        for group, expected in zip(groups, found[0], strict=True):
            assert [answer.tokens for answer in group] == [answer.tokens for answer in expected]
    tokens = {tuple(answer.tokens) for group in found[0] for answer in group}
    assert len(tokens) == 12  # every answer has its own random numbers


def test_an_answer_keeps_its_end_token_and_a_truncated_one_has_none():
    model = llama()
    model.get_output_embeddings().weight.data.zero_()  # every token is as likely
    ends = frozenset(range(0, VOCABULARY, 4))
    (group,) = sample_groups(model, PROMPTS[:1], 60, rule(ends=ends, max_new_tokens=4))
    assert {answer.ended for answer in group} == {True, False}
    for answer in group:
        assert [token in ends for token in answer.tokens[:-1]] == [False] * (len(answer.tokens) - 1)
        assert (answer.tokens[-1] in ends) == answer.ended
        assert answer.ended or len(answer.tokens) == 4
        assert answer.logprobs == pytest.approx([-math.log(VOCABULARY)] * len(answer.tokens))


def test_a_prompt_is_read_once_for_its_group(monkeypatch):
    read = []
    extend = Context.extend

    def counted(self, rows):
        read.append(sum(map(len, rows)))
        return extend(self, rows)

    monkeypatch.setattr(Context, "extend", counted)
    sample_groups(llama(), PROMPTS, 5, rule(max_new_tokens=1))
    assert sum(read) == sum(map(len, PROMPTS))
