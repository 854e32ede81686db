"""The answers of one step: sample them, judge them, and read their log p with the trainer's forward.

    1. sample     G answers of each prompt; the sampler stores log p of each token
    2. judge      rewards and advantages (losses/grpo.py)
    3. read       log p_old with the forward pass of the update: the same micro-batches, the same
                  kernels. The ratio p / p_old of the first update is therefore exactly 1.
    4. compare    log p of the sampler with log p_old. Both are log p of the same weights, computed
                  in another order (KV cache, other padding), so they differ by rounding only.

The bound of the difference. u is the unit roundoff of the dtype. The residual stream is rounded
after each of the two sublayers of L layers, in both computations: k = 4 L roundings. Their errors
are independent, so the last hidden state has a relative error of sqrt(k) · u in a random direction,
which changes a logit z by that part of the typical size of the logits, their standard deviation s:
by sqrt(k) · u · s. log p = z − logsumexp(z) has the error of both: sqrt(2) times as much. The
largest of N errors is sqrt(2 ln N) times their standard deviation. Then each logit is rounded to
the dtype, and log p to fp32 (u₃₂), in both computations, at most by u · |z| and u₃₂ · |log p| for
each of the two terms.

    |log p_sampler − log p_old| ≤ sqrt(2) · sqrt(2 ln N) · sqrt(4 L) · u · s
                                  + 4 · u · max |z| + 4 · u₃₂ · max |log p|

It holds for independent errors, not in the worst case. A difference above it means in practice that
sampler and trainer do not compute the same thing.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import order_by_length, unwrap_model
from minilora.generation.generate import end_tokens
from minilora.generation.rollouts import sample_groups
from minilora.generation.sampling import Decoding
from minilora.lora.active import disable_adapters, list_adapters
from minilora.losses.grpo import GRPO, kl_estimate
from minilora.losses.on_policy import Answer, OnPolicy, PromptRow, token_figures, with_answer
from minilora.losses.sft import labelled_positions, means
from minilora.models.padded_batch import inference
from minilora.training.batch_sampler import seed_of
from minilora.training.config import TrainConfig

ROUNDINGS = 2  # of the residual stream in a layer


@dataclass(frozen=True)
class Rollout:
    """The answers of one step.

    Attributes:
        samples: The answers of each micro-batch.
        groups: The answers of each prompt, in the order in which they were sampled.
        figures: Figures of the step by name.
    """

    samples: list[list[Answer]]
    groups: list[list[Answer]]
    figures: dict[str, float]


class Rollouts:
    """The sampler of a run.

    Attributes:
        model: The model that samples, without wrappers.
        run_model: The model as the update runs it: compiled if it was.
        tokenizer: Its tokenizer.
        objective: The loss, with the options of the sampling.
        config: The options of the run.
        autocast: Context of the forward passes.
    """

    def __init__(
        self,
        run_model: nn.Module,
        tokenizer: Any,
        objective: OnPolicy,
        config: TrainConfig,
        autocast: AbstractContextManager,
    ):
        """Store the parts.

        Args:
            run_model: The model as the update runs it.
            tokenizer: Its tokenizer.
            objective: The loss.
            config: The options of the run.
            autocast: Context of the forward passes.

        Raises:
            ValueError: If an option cannot have its meaning: see `check_on_policy`.
        """
        self.run_model = run_model
        self.model = unwrap_model(run_model)
        check_on_policy(self.model, objective, config)
        self.tokenizer = tokenizer
        self.objective = objective
        self.config = config
        self.autocast = autocast
        self.ends = end_tokens(self.model, tokenizer)
        self.has_base = bool(list_adapters(self.model))

    def collect(self, prompts: Sequence[PromptRow], step: int) -> Rollout:
        """Return the answers to the prompts of a step.

        Args:
            prompts: The prompts.
            step: Number of the step, from 1: the seed of the answers depends on it.

        Returns:
            G answers of each prompt, judged, with their log p.

        Raises:
            ValueError: If a reward is not a finite number.
        """
        answers = self.sample(prompts, step)
        answers, figures = self.objective.judge(answers)
        size = self.config.per_device_train_batch_size
        order = order_by_length(answers)
        read: list[Tensor] = []
        samples = []
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            chosen = [answers[number] for number in numbers]
            micro_batch, values = self._read(chosen)
            read.append(values)
            samples.append(micro_batch)
            for number, answer in zip(numbers, micro_batch, strict=True):
                answers[number] = answer
        figures |= self._figures(samples, torch.cat(read))
        G = self.objective.num_generations
        groups = []
        for start in range(0, len(answers), G):
            groups.append(answers[start : start + G])
        return Rollout(samples, groups, figures)

    def sample(
        self,
        prompts: Sequence[PromptRow],
        step: int,
        size: int | None = None,
        temperature: float | None = None,
    ) -> list[Answer]:
        """Return sampled answers, prompt by prompt.

        Args:
            prompts: The prompts.
            step: The seed of the answers depends on it.
            size: Answers of each prompt; None is `num_generations`.
            temperature: 0 is greedy; None is the objective's.
        """
        objective = self.objective
        rule = Decoding(
            max_new_tokens=objective.max_completion_length,
            temperature=objective.temperature if temperature is None else temperature,
            seed=seed_of(self.config.seed, "rollout", step),
            batch_size=objective.generation_batch_size,
            ends=self.ends,
        )
        ids = [prompt.input_ids for prompt in prompts]
        with self.autocast:
            groups = sample_groups(self.model, ids, size or objective.num_generations, rule)
        answers = []
        for prompt, group in zip(prompts, groups, strict=True):
            for sampled in group:
                words = list(sampled.tokens)
                if sampled.ended:
                    words.pop()
                text = self.tokenizer.decode(words, skip_special_tokens=True)
                answer = with_answer(
                    prompt,
                    sampled.tokens,
                    text=text,
                    truncated=not sampled.ended,
                    sampler_logprobs=tuple(sampled.logprobs),
                )
                answers.append(answer)
        return answers

    def _read(self, answers: list[Answer]) -> tuple[list[Answer], Tensor]:
        """Return the answers of a micro-batch with log p, and the figures of their tokens (N, 4)."""
        batch = self.objective.collate(answers)
        temperature = self.objective.temperature
        with self.autocast:
            # With gradients enabled the kernels are those of the update. The graph is dropped.
            positions = labelled_positions(self.run_model, batch)
            with torch.no_grad():
                values = token_figures(positions, temperature)  # (N, 4)
            base = None
            if self.has_base:
                with inference(self.model), disable_adapters(self.model):
                    positions = labelled_positions(self.run_model, batch)
                    base = token_figures(positions, temperature)[:, 0]  # (N,)
        read = []
        start = 0
        for answer in answers:
            end = start + len(answer.sampler_logprobs)
            answer = replace(answer, old_logprobs=tuple(values[start:end, 0].tolist()))
            if base is not None:
                answer = replace(answer, base_logprobs=tuple(base[start:end].tolist()))
            read.append(answer)
            start = end
        return read, values.detach()

    def _figures(self, samples: list[list[Answer]], values: Tensor) -> dict[str, float]:
        """Return the figures of a step; `values` (N, 4) are those of the tokens in `samples`."""
        answers = [answer for micro_batch in samples for answer in micro_batch]
        figures = _shape_of(answers)
        figures["entropy"] = values[:, 1].mean().item()
        old = _joined(answers, "old_logprobs")  # (N,)
        if self.has_base:
            base = _joined(answers, "base_logprobs")  # (N,)
            figures["kl"] = kl_estimate(old, base).mean().item()
        difference = (_joined(answers, "sampler_logprobs") - old).abs()  # (N,)
        figures["sampler_mean"] = difference.mean().item()
        figures["sampler_max"] = difference.amax().item()
        figures["sampler_bound"] = rounding_bound(self.model, self.autocast, values)
        if figures["sampler_max"] > figures["sampler_bound"]:
            warnings.warn(
                f"log p of the sampler and of the trainer differ by {figures['sampler_max']:.2g}, "
                f"and rounding explains {figures['sampler_bound']:.2g}: they do not compute the same "
                "policy. importance_cap corrects for a difference; look for its cause first.",
                stacklevel=2,
            )
        return figures


def held_out_figures(rollouts: Rollouts, prompts: Sequence[PromptRow]) -> dict[str, float]:
    """Return the figures of one answer to each held-out prompt.

    Args:
        rollouts: The sampler of the run.
        prompts: The held-out prompts.

    Returns:
        With GRPO "reward", "length" and "truncated" of greedy answers, and as "loss" the negative
        reward; else the means of the loss over sampled answers.
    """
    objective: Any = rollouts.objective
    if not isinstance(objective, GRPO):
        answers = rollouts.sample(prompts, 0, size=1)
        size = rollouts.config.per_device_eval_batch_size
        return means(rollouts.run_model, answers, size, objective)[0]
    answers = rollouts.sample(prompts, 0, size=1, temperature=0.0)
    rewards = objective.rewards(answers)
    reward = sum(rewards) / len(answers)
    return {"loss": -reward, "reward": reward} | _shape_of(answers)


def _shape_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the share of truncated answers, and the mean length in tokens."""
    truncated = 0
    tokens = 0
    for answer in answers:
        truncated += answer.truncated
        tokens += len(answer.sampler_logprobs)
    return {"truncated": truncated / len(answers), "length": tokens / len(answers)}


def _joined(answers: Sequence[Answer], name: str) -> Tensor:
    """Return a value of every token of some answers, fp64 (N,)."""
    values: list[float] = []
    for answer in answers:
        values += getattr(answer, name)
    return torch.tensor(values, dtype=torch.float64)


def rounding_bound(model: Any, autocast: AbstractContextManager, values: Tensor) -> float:
    """Return the largest difference of log p that rounding explains (see the module docstring).

    Args:
        model: The model.
        autocast: Context of its forward passes.
        values: The figures of N tokens, (N, 4), from `token_figures`.
    """
    weight = model.get_input_embeddings().weight
    device = weight.device.type
    dtype = weight.dtype
    with autocast:
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    u = torch.finfo(dtype).eps / 2
    u32 = torch.finfo(torch.float32).eps / 2
    k = 2 * ROUNDINGS * getattr(model.config, "num_hidden_layers", 1)
    tokens = max(len(values), 2)
    largest = math.sqrt(2 * math.log(tokens))
    log_p, _, spread, size = values.abs().amax(0).tolist()
    # sqrt(2) · sqrt(2 ln N) · sqrt(4 L) · u · s
    random_part = math.sqrt(2 * k) * largest * u * spread
    # 4 · u · max |z| + 4 · u₃₂ · max |log p|
    return random_part + 4 * u * size + 4 * u32 * log_p


def check_on_policy(model: nn.Module, objective: OnPolicy, config: TrainConfig) -> None:
    """Refuse options that have no meaning for sampled answers.

    Args:
        model: The model to be trained.
        objective: The loss.
        config: The options of the run.

    Raises:
        ValueError: If dropout or noise would change the policy between sampling and update, or the
            loss compares with a base that the model does not have.
    """
    name = type(objective).__name__
    if config.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha: noise changes the policy between sampling and update: leave it 0 "
            f"with {name}."
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"lora_dropout: dropout of {module.p} changes the policy between sampling and update: "
                f"set it to 0 with {name}."
            )
    if objective.needs_base and not list_adapters(model):
        raise ValueError(
            f"{name} compares with the model without its adapter, and this model has no adapter: "
            "ml.inject one first, or set beta to 0."
        )


def prompts_per_step(objective: OnPolicy, config: TrainConfig) -> int:
    """Return the number of prompts whose groups make one optimiser step.

    Args:
        objective: The loss; its `num_generations` answers make a group.
        config: Batch size and accumulation count answers.

    Raises:
        ValueError: If the answers of a step are not a whole number of groups.
    """
    answers = config.per_device_train_batch_size * config.gradient_accumulation_steps
    prompts, left = divmod(answers, objective.num_generations)
    if left or not prompts:
        raise ValueError(
            f"num_generations: a step has {config.per_device_train_batch_size} · "
            f"{config.gradient_accumulation_steps} = {answers} answers "
            "(per_device_train_batch_size · gradient_accumulation_steps), which is not a whole "
            f"number of groups of {objective.num_generations}: change one of the three."
        )
    return prompts
