"""Proves training on sampled answers: exact ratios, an honest comparison, bitwise resume, learning.

Oracles: log p of the whole text without a cache; a run that was never stopped.
"""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import minilora as ml
from helpers.chats import chat, ours
from helpers.objective_laws import check_resume, stirred
from helpers.tiny import oracle
from helpers.toy import Letters, llama, lora
from minilora.data.prompt import encode_prompt
from minilora.losses.on_policy import answer_tensor, token_logprobs
from minilora.losses.sft import labelled_positions
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.on_policy import rollouts
from minilora.training.on_policy.rollouts import Rollouts

ROWS = [
    {"prompt": f"{word}=", "wanted": word} for word in ("ab", "defabc", "f", "bbbb", "caf", "d")
]
FIELDS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "save_steps": None,
    "per_device_train_batch_size": 6,
}


def share_of_early_letters(prompt, answer, row) -> float:
    """Reward letters of the first half of the ASCII letters."""
    return sum("a" <= letter <= "m" for letter in answer) / 8


def grpo(**fields) -> ml.GRPO:
    values: dict[str, Any] = {"num_generations": 6, "max_completion_length": 8}
    values |= {"log_completions_steps": None}
    return ml.GRPO(reward=share_of_early_letters, **values | fields)


def sampler(model, goal: ml.GRPO, **fields) -> Rollouts:
    config = TrainConfig(**FIELDS | fields)
    return Rollouts(model, Letters(), goal, config, nullcontext())


# ---- oracle


def test_old_log_p_is_the_models_and_the_ratio_is_exactly_one():
    model = stirred(lora())
    goal = grpo(beta=0.1)
    prompts = goal.encode(ROWS[:4], Letters(), 64)
    rollout = sampler(model, goal).collect(prompts, step=1)
    assert sum(map(len, rollout.samples)) == 4 * 6 and len(rollout.samples) == 4
    for answers in rollout.samples:
        batch = goal.collate(answers)
        new = token_logprobs(labelled_positions(model, batch), 1.0)
        assert torch.equal(
            (new - answer_tensor(answers, "old_logprobs")).exp(), torch.ones(len(new))
        )
        assert new.requires_grad
        for answer in answers:
            size = len(answer.old_logprobs)
            ids = torch.tensor([answer.input_ids])
            expected = model(ids)[0, -size - 1 : -1].double().log_softmax(-1)
            expected = expected[range(size), answer.input_ids[-size:]]
            old = torch.tensor(answer.old_logprobs).double()
            torch.testing.assert_close(old, expected, rtol=0, atol=1e-5)
            with ml.disable_adapters(model):
                base = model(ids)[0, -size - 1 : -1].double().log_softmax(-1)
            base = base[range(size), answer.input_ids[-size:]]
            kept = torch.tensor(answer.base_logprobs).double()
            torch.testing.assert_close(kept, base, rtol=0, atol=1e-5)
            assert answer.reward == share_of_early_letters("", answer.text, {})


def test_figures_are_those_of_the_answers():
    model = stirred(lora())
    goal = grpo()
    rollout = sampler(model, goal).collect(goal.encode(ROWS[:4], Letters(), 64), step=1)
    answers = [answer for group in rollout.groups for answer in group]
    rewards = torch.tensor([answer.reward for answer in answers], dtype=torch.float64)
    figures = rollout.figures
    assert figures["reward"] == pytest.approx(rewards.mean().item())
    assert figures["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    equal = [len({answer.reward for answer in group}) == 1 for group in rollout.groups]
    assert figures["zero_variance"] == sum(equal) / 4
    assert figures["truncated"] == sum(answer.truncated for answer in answers) / 24
    assert figures["length"] == sum(len(answer.old_logprobs) for answer in answers) / 24
    ids = {answer.row for group in rollout.groups for answer in group}
    assert ids == {0, 1, 2, 3} and all(len({a.row for a in group}) == 1 for group in rollout.groups)
    assert figures["kl"] > 0 and 0 < figures["entropy"] < 4.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5])
def test_sampler_and_trainer_differ_by_rounding_only(dtype, size):
    """The bound holds, and is not larger than needed by orders of magnitude."""
    model = llama(num_hidden_layers=4)
    model.get_input_embeddings().weight.data.mul_(size)
    model = stirred(lora(model.to(dtype)))
    goal = grpo()
    prompts = goal.encode(ROWS, Letters(), 64)
    figures = [sampler(model, goal).collect(prompts, step=step).figures for step in range(3)]
    largest = max(values["sampler_max"] for values in figures)
    assert all(values["sampler_max"] <= values["sampler_bound"] for values in figures)
    assert 0 < figures[0]["sampler_bound"] < 20 * largest


# ---- properties


def test_a_sampler_of_another_policy_is_above_the_bound(monkeypatch):
    """The sampler runs without the adapter: a silent failure of the field."""
    model = stirred(lora())
    goal = grpo()
    sample = rollouts.sample_groups

    def without_adapter(*arguments):
        with ml.disable_adapters(model):
            return sample(*arguments)

    monkeypatch.setattr(rollouts, "sample_groups", without_adapter)
    with pytest.warns(UserWarning, match="do not compute the same policy"):
        sampler(model, goal).collect(goal.encode(ROWS[:2], Letters(), 64), step=1)


def test_each_step_has_other_answers_and_the_same_again():
    goal = grpo()
    prompts = goal.encode(ROWS[:2], Letters(), 64)
    found = [sampler(lora(), goal).sample(prompts, step) for step in (1, 2, 1)]
    assert found[0] == found[2] and found[0] != found[1]
    assert sampler(lora(), goal, seed=7).sample(prompts, 1) != found[0]


def test_the_reward_rises_and_the_figures_are_logged(tmp_path, capsys):
    model = llama()
    model.get_input_embeddings().weight.data.mul_(4)  # tied: logits large enough to learn with
    lora(model)
    config = TrainConfig(
        output_dir=tmp_path / "out",
        max_steps=25,
        logging_steps=5,
        **FIELDS | {"learning_rate": 0.03},
    )
    goal = grpo(loss_type="dr_grpo", log_completions_steps=10)
    result = train(model, Letters(), ROWS, config, objective=goal, eval_dataset=ROWS[:2])
    rewards = result.metrics["reward"]
    assert sum(rewards[-5:]) > 3 * sum(rewards[:5])
    shown = capsys.readouterr().out
    assert "step 25: reward" in shown and "of groups without variance" in shown
    assert "step 7: reward" in shown and shown.count("reward  advantage  answer") == 2
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert {"reward", "zero_variance", "truncated", "sampler_max"} <= lines[1].keys()
    assert result.evals[-1]["eval_loss"] == -result.evals[-1]["eval_reward"]
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["objective"]["reward_name"] == "share_of_early_letters"


def test_further_updates_on_the_same_answers_clip():
    model = lora()
    goal = grpo(num_iterations=4, epsilon=1e-3)
    config = TrainConfig(max_steps=2, **FIELDS | {"learning_rate": 0.03})
    result = train(model, Letters(), ROWS, config, objective=goal)
    assert result.steps == 2 and result.metrics["clip_ratio"][-1] > 0.1
    once = train(lora(), Letters(), ROWS, config, objective=grpo(epsilon=1e-3))
    assert once.metrics["clip_ratio"] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["transformers", "nf4", "gradient checkpointing"])
def test_other_models_have_a_ratio_of_exactly_one(kind):
    if kind == "transformers":
        model = oracle(vocab_size=len(Letters()), max_position_embeddings=64)
    else:
        model = llama()
    if kind == "nf4":
        ml.quantize_model(model)
    model = stirred(lora(model))
    config = TrainConfig(
        max_steps=2, gradient_checkpointing=kind == "gradient checkpointing", **FIELDS
    )
    goal = grpo(epsilon=1e-7)  # a ratio that is not exactly 1 is clipped
    result = train(model, Letters(), ROWS, config, objective=goal)
    assert result.metrics["clip_ratio"] == [0.0, 0.0]
    assert result.metrics["sampler_max"] < result.metrics["sampler_bound"]


def test_a_conversation_is_answered_behind_its_template():
    tokenizer = ours("chatml")
    asked = chat("What?", system="Be brief.")
    rows = [
        {"messages": [*asked, {"role": "assistant", "content": "That."}], "note": 1},
        {"messages": asked},
        {"prompt": asked},
    ]
    prompts = grpo().encode(rows, tokenizer, None)
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.input_ids == encode_prompt(asked, tokenizer)
        assert prompt.prompt == asked and prompt.source == row


# ---- round trip


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_resumed_run_equals_one_that_was_never_stopped(iterations, tmp_path):
    goal = grpo(num_generations=3, num_iterations=iterations, beta=0.1)
    check_resume(lora, goal, ROWS, tmp_path)


# ---- errors


@pytest.mark.parametrize(
    ("fields", "goal", "message"),
    [
        ({}, {"num_generations": 4}, "6 · 1 = 6 answers .* not a whole number of groups of 4"),
        ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha: noise changes the policy"),
        ({"max_length": 12}, {}, "row 1: the prompt has 8 tokens, .* exceed max_length 12"),
        ({"packing": True}, {}, "packing"),
    ],
)
def test_options_without_a_meaning_are_refused(fields, goal, message):
    with pytest.raises(ValueError, match=message):
        train(lora(), Letters(), ROWS, TrainConfig(**FIELDS | fields), objective=grpo(**goal))


def test_dropout_and_a_missing_base_are_refused():
    with pytest.raises(ValueError, match="dropout of 0.1 changes the policy"):
        train(lora(dropout=0.1), Letters(), ROWS, TrainConfig(**FIELDS), objective=grpo())
    full = TrainConfig(method="full", **FIELDS)
    with pytest.raises(ValueError, match="this model has no adapter"):
        train(llama(), Letters(), ROWS, full, objective=grpo(beta=0.1))


def test_an_error_in_a_reward_ends_the_run_and_names_the_row():
    def reward(prompt, answer, row):
        return float("nan") if row["wanted"] == "caf" else 0.0

    goal = ml.GRPO(reward=reward, num_generations=6, max_completion_length=4)
    with pytest.raises(ValueError, match="returned nan for row 4"):
        train(lora(), Letters(), ROWS, TrainConfig(**FIELDS), objective=goal)


def test_rows_without_a_prompt_are_refused():
    with pytest.raises(ValueError, match="row 0: expected a prompt"):
        grpo().encode([{"text": "plain"}], Letters(), None)
