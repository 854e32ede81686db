"""Proves the loss of GRPO by enumeration, and against TRL.

Oracles: on a policy with seven answers, all groups are enumerated, and the mean gradient of the
code is autograd's of an independent enumeration of the same objective in fp64; the unnormalised
form has the gradient of the expected reward. TRL's GRPOTrainer computes the same loss on the same
answers.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora as ml
from helpers.tiny import VOCAB, oracle, twin
from minilora.losses.grpo import group_advantages
from minilora.losses.on_policy import Answer, PromptRow, token_logprobs, with_answer
from minilora.losses.sft import labelled_positions

END = 2
# Every answer of at most two tokens: those that end with END, and the truncated ones.
SEQUENCES = [(END,)]
SEQUENCES += [(first, END) for first in (0, 1)]
SEQUENCES += [(first, second) for first in (0, 1) for second in (0, 1)]
REWARDS = dict(zip(SEQUENCES, (0.3, 1.0, -0.4, 0.1, 0.0, 0.7, 0.2), strict=True))
PROMPT = PromptRow([0], [-100], prompt="p", source={})
LONGEST = 2
FLAGS: list[dict[str, Any]] = [
    {},
    {"scale_rewards": "none"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "dapo", "epsilon_high": 0.5},
    {"importance_sampling_level": "sequence", "epsilon": 0.05},
    {"beta": 0.3, "epsilon": 0.1},
    {"beta": 0.3, "use_bias_correction_kl": False},
    {"mask_truncated_completions": True},
    {"importance_cap": 1.05},
]


class Bigram(nn.Module):
    """A policy whose next token depends on the last one only."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor, **others: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])

    def logprobs(self, answer: tuple[int, ...]) -> list[Tensor]:
        table = self.table.log_softmax(-1)
        return [table[last, token] for last, token in zip((0, *answer), answer, strict=False)]


def objective(**flags: Any) -> ml.GRPO:
    fields: dict[str, Any] = {"num_generations": 2, "max_completion_length": LONGEST}
    return ml.GRPO(reward=lambda prompt, answer, row: 0.0, **fields | flags)


def numbers(values: list[Tensor]) -> tuple[float, ...]:
    return tuple(value.item() for value in values)


def answers_of(group: tuple, goal: ml.GRPO, old: Bigram, base: Bigram) -> list[Answer]:
    """Return a group as the trainer gives it to the loss."""
    rewards = torch.tensor([[REWARDS[answer] for answer in group]], dtype=torch.float64)
    advantages = group_advantages(rewards, goal.scale_rewards)[0].tolist()
    answers = []
    for answer, advantage in zip(group, advantages, strict=True):
        log_p = numbers(old.logprobs(answer))
        values = {
            "advantage": advantage,
            "truncated": answer[-1] != END,
            "old_logprobs": log_p,
            "base_logprobs": numbers(base.logprobs(answer)),
            "sampler_logprobs": tuple(value - 0.1 * (1 + i) for i, value in enumerate(log_p)),
        }
        answers.append(with_answer(PROMPT, answer, **values))
    return answers


def expected_loss(group: tuple, goal: ml.GRPO, new: Bigram, old: Bigram, base: Bigram) -> Tensor:
    """Return the loss of a group, written again token by token."""
    rewards = [REWARDS[answer] for answer in group]
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
    high = goal.epsilon if goal.epsilon_high is None else goal.epsilon_high
    total: Any = 0.0
    tokens = 0
    for answer, reward in zip(group, rewards, strict=True):
        if goal.mask_truncated_completions and answer[-1] != END:
            continue
        advantage = reward - mean
        if goal.scale_rewards == "group":
            advantage /= spread + 1e-4
        log_new = new.logprobs(answer)
        log_old = [value.detach() for value in old.logprobs(answer)]
        log_base = [value.detach() for value in base.logprobs(answer)]
        ratios = [(a - b).exp() for a, b in zip(log_new, log_old, strict=True)]
        if goal.importance_sampling_level == "sequence":
            product = torch.stack(ratios).prod() ** (1 / len(answer))
            ratios = [product for _ in ratios]
        summed: Any = 0.0
        for place, ratio in enumerate(ratios):
            clipped = ratio.clamp(1 - goal.epsilon, 1 + high)
            term = -torch.minimum(ratio * advantage, clipped * advantage)
            if goal.importance_cap is not None:
                term = term * min(torch.tensor(0.1 * (1 + place)).exp(), goal.importance_cap)
            if goal.beta:
                quotient = (log_base[place] - log_new[place]).exp()
                factor = ratio if goal.use_bias_correction_kl else 1.0
                term = term + goal.beta * factor * (quotient - quotient.log() - 1)
            summed = summed + term
        divisor = {"grpo": len(answer), "dr_grpo": LONGEST, "dapo": 1}[goal.loss_type]
        total = total + summed / divisor
        tokens += len(answer)
    return total / (max(tokens, 1) if goal.loss_type == "dapo" else len(group))


def probability(group: tuple, policy: Bigram) -> float:
    log_p = [value for answer in group for value in policy.logprobs(answer)]
    return torch.stack(log_p).sum().exp().item()


def mean_gradients(goal: ml.GRPO, new: Bigram, old: Bigram) -> tuple[Tensor, Tensor]:
    """Return the mean gradient over all groups: of the code, and of the enumeration."""
    base = Bigram(seed=2)
    code: Any = 0.0
    enumerated: Any = 0.0
    for group in itertools.product(SEQUENCES, repeat=goal.num_generations):
        p = probability(group, old)
        batch = goal.collate(answers_of(group, goal, old, base))
        loss, _ = goal.loss(new, batch)
        code = code + p * loss / max(goal.weight(batch), 1)
        enumerated = enumerated + p * expected_loss(group, goal, new, old, base)
    (found,) = torch.autograd.grad(code, new.table)
    (expected,) = torch.autograd.grad(enumerated, new.table)
    return found, expected


# ---- oracle


def test_the_answers_are_all_there_are():
    policy = Bigram(seed=0)
    assert sum(probability((answer,), policy) for answer in SEQUENCES) == pytest.approx(1)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_mean_gradient_over_all_groups_is_that_of_the_objective(flags):
    new, old = Bigram(seed=0), Bigram(seed=1)  # ratios from 0.1 to 10: clipping has an effect
    found, expected = mean_gradients(objective(**flags), new, old)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_only_the_unnormalised_form_has_the_gradient_of_the_expected_reward():
    """Print the error of the others, and of the mean reward without G/(G − 1)."""
    policy = Bigram(seed=0)
    reward: Any = 0.0
    for answer, value in REWARDS.items():
        reward = reward + torch.stack(policy.logprobs(answer)).sum().exp() * value
    (gradient,) = torch.autograd.grad(-reward, policy.table)
    biases = {}
    for flags in (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "dr_grpo"},
        {"scale_rewards": "none"},
        {},
        {"loss_type": "dapo", "scale_rewards": "none"},
    ):
        G = 2 if biases else 3
        goal = objective(num_generations=G, **flags)
        found, _ = mean_gradients(goal, policy, policy)
        if goal.loss_type == "dr_grpo":
            found = found * LONGEST
        biases[str(flags)] = ((found * G / (G - 1) - gradient).norm() / gradient.norm()).item()
        cosine = torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0).item()
        print(f"{flags}: relative error {biases[str(flags)]:.3f}, cosine {cosine:.4f}")
    unbiased, *others = biases.values()
    assert unbiased < 1e-6
    assert min(others) > 0.01


@pytest.mark.parametrize("corrected", [True, False])
def test_the_mean_gradient_of_the_kl_is_that_of_the_divergence(corrected, monkeypatch):
    """Without the ratio it is that of KL(p_base ‖ p), which is another."""
    monkeypatch.setitem(globals(), "REWARDS", dict.fromkeys(SEQUENCES, 1.0))
    policy, base = Bigram(seed=0), Bigram(seed=2)
    goal = objective(loss_type="dr_grpo", beta=1.0, use_bias_correction_kl=corrected)
    found, _ = mean_gradients(goal, policy, policy)
    p, p_base = policy.table.softmax(-1), base.table.softmax(-1).detach()
    kl = (p * (p / p_base).log()).sum(-1)  # (3,) behind each token
    if not corrected:
        kl = (p_base * (p_base / p).log()).sum(-1)
    # Behind the prompt 0, and behind a first token that does not end the answer.
    total = kl[0] + sum(p[0, first].detach() * kl[first] for first in (0, 1))
    (expected,) = torch.autograd.grad(total, policy.table)
    torch.testing.assert_close(found * LONGEST, expected, rtol=0, atol=1e-6)


TRL = [
    ({}, {"loss_type": "grpo"}),
    ({"loss_type": "dr_grpo", "epsilon": 0.1}, {"loss_type": "dr_grpo", "epsilon": 0.1}),
    ({"loss_type": "dapo", "epsilon_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    ({"beta": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    (
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    (
        {"importance_sampling_level": "sequence", "epsilon": 3e-4},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4},
    ),
]


@pytest.fixture(scope="module")
def both():
    """Return TRL's model and ours with the same weights, and judged answers with log p."""
    theirs = oracle(max_position_embeddings=64)
    ours = twin(theirs)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    answers = []
    for number, length in enumerate((5, 3, 7, 1)):
        prompt_ids = drawn(4 + number % 2)
        prompt = PromptRow(prompt_ids, [-100] * len(prompt_ids), row=number)
        noise = torch.randn(3, length, generator=generator)
        answer = with_answer(prompt, drawn(length), advantage=(0.8, -1.1, 0.4, -0.1)[number])
        goal = objective()
        log_p = token_logprobs(labelled_positions(ours, goal.collate([answer])), 1.0)
        log_p = log_p.detach() + 0.3 * noise  # (3, T)
        names = ("old_logprobs", "base_logprobs", "sampler_logprobs")
        values = {name: tuple(log_p[i].tolist()) for i, name in enumerate(names)}
        answers.append(replace(answer, **values))
    return theirs, ours, answers


def trl_loss(model: Any, answers: list[Answer], folder, beta: float = 0.0, **fields: Any) -> Tensor:
    """Return TRL's loss of these answers; its trainer is built with a row that it ignores."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from tests.losses.test_dpo import word_tokenizer

    config = GRPOConfig(
        str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=LONGEST,
        **fields,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **others: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=word_tokenizer(PreTrainedTokenizerFast),
    )
    trainer.beta = beta  # with beta in the config, the trainer would load a second model
    trainer.model.eval()  # its loss then divides by nothing that belongs to its loop
    width = max(len(answer.old_logprobs) for answer in answers)
    opening = max(len(answer.prompt) for answer in answers)  # type: ignore[arg-type] # has one
    inputs: dict[str, Any] = {key: [] for key in ("prompt_ids", "prompt_mask")}
    inputs |= {key: [] for key in ("completion_ids", "completion_mask")}
    names = {"old_logprobs": "old_per_token_logps", "base_logprobs": "ref_per_token_logps"}
    inputs |= {theirs: [] for theirs in names.values()}
    for answer in answers:
        size = len(answer.old_logprobs)
        prompt, completion = answer.input_ids[:-size], answer.input_ids[-size:]
        left, right = [0] * (opening - len(prompt)), [0] * (width - size)
        inputs["prompt_ids"].append(left + prompt)
        inputs["prompt_mask"].append(left + [1] * len(prompt))
        inputs["completion_ids"].append(completion + right)
        inputs["completion_mask"].append([1] * size + right)
        for ours, theirs in names.items():
            inputs[theirs].append([*getattr(answer, ours), *right])
    inputs = {key: torch.tensor(value) for key, value in inputs.items()}
    inputs["advantages"] = torch.tensor([answer.advantage for answer in answers])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize(("flags", "theirs"), TRL, ids=lambda value: str(value.get("loss_type")))
def test_loss_and_gradient_are_trls(both, flags, theirs, tmp_path):
    their_model, model, answers = both
    expected = trl_loss(their_model, answers, tmp_path, **theirs)
    their_model.zero_grad()
    expected.backward()
    goal = objective(**flags)
    batch = goal.collate(answers)
    loss, _ = goal.loss(model, batch)
    model.zero_grad()
    (loss / goal.weight(batch)).backward()
    assert (loss / goal.weight(batch)).item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
    found = dict(model.named_parameters())
    for name, parameter in their_model.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 0:
            difference = (found[name].grad - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm()  # fp32, sums in another order


# ---- properties


def test_a_batch_is_the_sum_of_its_parts(both):
    _, model, answers = both
    for flags, _ in TRL:
        goal = objective(**flags)
        whole, sums = goal.loss(model, goal.collate(answers))
        parts = [goal.loss(model, goal.collate([answer])) for answer in answers]
        assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
        clipped = sum(others["clip_ratio"].item() for _, others in parts)
        assert clipped == pytest.approx(sums["clip_ratio"].item(), rel=1e-5)
        weights = [goal.weight(goal.collate([answer])) for answer in answers]
        assert sum(weights) == goal.weight(goal.collate(answers))


def test_advantages_of_equal_rewards_are_exactly_zero():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]], dtype=torch.float64)
    for kind in ("group", "none"):
        advantages = group_advantages(rewards, kind)
        assert not advantages[0].any() and advantages[1].sum().abs() < 1e-12
    spread = rewards[1].std().item()
    expected = (1 - 1 / 3) / (spread + 1e-4)
    assert group_advantages(rewards, "group")[1, 1].item() == pytest.approx(expected)


def test_the_first_update_has_loss_zero_and_a_gradient(both):
    """The advantages of a group add up to zero, and the ratio is 1: a loss of 0 is right."""
    _, model, answers = both
    goal = objective(loss_type="dr_grpo")
    same_length = [replace(answers[0], advantage=value) for value in (0.5, -0.5)]
    same_length = [replace(answer, old_logprobs=()) for answer in same_length]
    loss, sums = goal.loss(model, goal.collate(same_length))
    assert loss.item() == 0 and sums["clip_ratio"].item() == 0
    one = [replace(answers[0], old_logprobs=()), replace(answers[1], old_logprobs=())]
    loss, _ = goal.loss(model, goal.collate(one))
    model.zero_grad()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.dim() == 2)
