"""Group relative policy optimisation: raise the answers of a group with more reward than its mean.

A group is G answers o_1 … o_G to one prompt, sampled from the policy before the update (p_old). A
Python function gives each answer a reward R_i.

    A_i   = R_i − mean(R)                        scale_rewards "none": Dr. GRPO, eq. 3
    A_i   = (R_i − mean(R)) / (std(R) + 1e-4)    scale_rewards "group": GRPO, §4.1.2

    r_t   = p(o_t) / p_old(o_t)                  importance_sampling_level "token"
    r_t   = (Π_t p(o_t) / p_old(o_t))^(1/|o|)    importance_sampling_level "sequence": GSPO, eq. 7

    l_t   = −min(r_t A, clip(r_t, 1 − epsilon, 1 + epsilon_high) A)
            epsilon_high above epsilon: DAPO's clip-higher, eq. 10
    l_t ·= min(p_old(o_t) / p_sampler(o_t), importance_cap)     truncated importance sampling
    l_t +=  beta r_t (p_base/p − log(p_base/p) − 1)     KL(p ‖ p_base), estimated from one sample
            use_bias_correction_kl False leaves r_t out, as in GRPO, eq. 4: the gradient at r_t = 1
            is then that of KL(p_base ‖ p) (DeepSeek-V3.2, arXiv 2512.02556)

    loss  = 1/(P G) Σ_i 1/|o_i| Σ_t l_t          loss_type "grpo":    mean over the answers
    loss  = 1/(P G) Σ_i 1/L Σ_t l_t              loss_type "dr_grpo": L is max_completion_length
    loss  = 1/Σ_i |o_i| Σ_i Σ_t l_t              loss_type "dapo":    mean over the tokens

P is the number of prompts of a step. p_base is the model with its adapter off, so no second model
is needed.

Before the first update of a step r_t is exactly 1. The advantages of a group add up to 0, so the
loss is 0 there, up to the KL and to the lengths of the answers, and its gradient is not: watch the
reward, not the loss. With `num_iterations` 1 every update is such a first update, and clipping does
nothing.

Only "dr_grpo" with scale_rewards "none", times L G/(G − 1), has the gradient of the expected reward
(tests/losses/test_grpo.py). The other forms weigh prompts or answers differently: a division by the
standard deviation weighs up the prompts whose rewards hardly differ, and 1/|o_i| weighs down the
tokens of long answers.

Source: GRPO: Shao et al. 2024, arXiv 2402.03300. Dr. GRPO: Liu et al. 2025, arXiv 2503.20783. DAPO:
Yu et al. 2025, arXiv 2503.14476. GSPO: Zheng et al. 2025, arXiv 2507.18071. KL estimate: Schulman
2020, http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from minilora.common import option
from minilora.losses.on_policy import Answer, OnPolicy, answer_tensor, token_logprobs
from minilora.losses.rewards import Reward, load_reward, reward_name, rewards_of
from minilora.losses.sft import labelled_positions, padded, trained_tokens

STD_FLOOR = 1e-4  # added to the standard deviation of a group, as in TRL


@dataclass(frozen=True, kw_only=True)
class GRPO(OnPolicy):
    """Learn from the rewards of sampled answers; the fields have TRL's names.

    Attributes:
        reward: A function `reward(prompt, answer, row) -> float`, or "FILE.py:FUNCTION".
        loss_type: "grpo", "dr_grpo" or "dapo": what the loss is divided by.
        scale_rewards: "group" divides by the standard deviation of the group, "none" does not.
        epsilon: Distance from 1 at which a ratio is clipped.
        epsilon_high: The same above 1 (DAPO); None is `epsilon`.
        importance_sampling_level: "token", or "sequence" for GSPO's ratio.
        beta: Price of one nat of KL from the base model.
        use_bias_correction_kl: True multiplies the estimate of the KL by the ratio, so that its
            gradient is that of the KL.
        mask_truncated_completions: True takes truncated answers out of the loss.
        importance_cap: Largest factor p_old / p_sampler of a token; None corrects nothing.

    Raises:
        ValueError: If a field is out of its range, or the reward is not such a function.
    """

    better: ClassVar[tuple[str, ...]] = ("reward",)

    reward: Reward | str = field(
        repr=False,
        compare=False,
        metadata={"help": "reward(prompt, answer, row) -> float, as FILE.py:FUNCTION"},
    )
    loss_type: str = option(
        "grpo",
        "mean over answers (grpo), sum over the largest length (dr_grpo), mean over tokens (dapo)",
        choices=("grpo", "dr_grpo", "dapo"),
    )
    scale_rewards: str = option(
        "group",
        "divide advantages by the standard deviation of their group, or not (Dr. GRPO)",
        choices=("group", "none"),
    )
    epsilon: float = option(0.2, "distance from 1 at which a ratio is clipped", above=0, below=1)
    epsilon_high: float | None = option(
        None, "the same above 1 (DAPO's clip-higher); None is epsilon", above=0
    )
    importance_sampling_level: str = option(
        "token", "ratio of a token, or of the sequence (GSPO)", choices=("token", "sequence")
    )
    beta: float = option(0.0, "price of one nat of KL from the model without its adapter", low=0)
    use_bias_correction_kl: bool = option(
        True, "multiply the estimate of the KL by the ratio: its gradient is then that of the KL"
    )
    mask_truncated_completions: bool = option(
        False, "leave answers that did not end out of the loss"
    )
    importance_cap: float | None = option(
        None, "largest factor p_old/p_sampler of a token; None corrects nothing", above=0
    )

    def __post_init__(self):
        super().__post_init__()
        name = self.reward
        if not isinstance(name, str):
            name = reward_name(name)
        object.__setattr__(self, "reward_name", name)  # run.json stores it
        object.__setattr__(self, "reward", load_reward(self.reward))
        if self.num_generations < 2:
            raise ValueError(
                "num_generations: a group of one answer has no variance and teaches nothing: set at "
                "least 2."
            )

    @property
    def needs_base(self) -> bool:
        """True if the loss compares with the base model."""
        return self.beta > 0

    def rewards(self, answers: Sequence[Answer]) -> list[float]:
        """Return the reward of each answer.

        Args:
            answers: Sampled answers.

        Raises:
            ValueError: If a reward is not a finite number; the message names the row.
        """
        assert callable(self.reward)
        return rewards_of(self.reward, answers)

    def judge(self, answers: Sequence[Answer]) -> tuple[list[Answer], dict[str, float]]:
        """Return the answers of a step with rewards and advantages, and figures about them.

        Args:
            answers: G answers of each prompt, prompt by prompt.

        Returns:
            The answers, and "reward" (the mean), "reward_std" (over all answers) and
            "zero_variance" (share of groups whose rewards are all equal, which teach nothing).

        Raises:
            ValueError: If a reward is not a finite number.
        """
        rewards = torch.tensor(self.rewards(answers), dtype=torch.float64)  # (P G,)
        groups = rewards.view(-1, self.num_generations)  # (P, G)
        advantages = group_advantages(groups, self.scale_rewards).flatten()  # (P G,)
        judged = []
        for answer, reward, advantage in zip(
            answers, rewards.tolist(), advantages.tolist(), strict=True
        ):
            judged.append(replace(answer, reward=reward, advantage=advantage))
        equal = groups.amax(1) == groups.amin(1)  # (P,)
        return judged, {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "zero_variance": equal.double().mean().item(),
        }

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch of some answers, on the CPU.

        Args:
            examples: B judged answers with N tokens in all, or prompts.

        Returns:
            The tensors of `padded`, (B, T) each; for answers also `advantages` and `kept` (B,), and
            log p of each token, (N,): `old_logprobs`, `base_logprobs` and `sampler_logprobs`, if
            the answers have them.
        """
        batch = padded(examples)
        if not isinstance(examples[0], Answer):
            return batch
        batch["advantages"] = torch.tensor([answer.advantage for answer in examples])  # (B,)
        batch["kept"] = torch.ones(len(examples))  # (B,)
        if self.mask_truncated_completions:
            truncated = [answer.truncated for answer in examples]
            batch["kept"][torch.tensor(truncated)] = 0.0
        for name in _TOKEN_VALUES:
            if getattr(examples[0], name):
                batch[name] = answer_tensor(examples, name)  # (N,)
        return batch

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number that the loss is divided by: answers, or with "dapo" tokens.

        Args:
            batch: A batch of `collate`.
        """
        if self.loss_type != "dapo":
            return len(batch["labels"])
        if "kept" not in batch:
            return trained_tokens(batch)
        tokens = (batch["labels"][:, 1:] != -100).sum(1)  # (B,)
        return int((tokens * batch["kept"]).sum())

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, summed over its answers or tokens.

        Args:
            model: The model.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the sum of "clip_ratio": the share of tokens whose ratio is
            clipped.
        """
        positions = labelled_positions(model, batch)
        log_p = token_logprobs(positions, self.temperature)  # (N,)
        row = positions.sample  # (N,): the answer of each token
        length = row.bincount(minlength=len(batch["labels"]))  # (B,)
        values = {key: batch[key].to(log_p.device) for key in _VALUES if key in batch}
        advantage = values["advantages"][row]  # (N,)
        old = values.get("old_logprobs", log_p.detach())  # (N,)

        # r_t = p(o_t) / p_old(o_t)
        log_ratio = log_p - old  # (N,)
        if self.importance_sampling_level == "sequence":
            # log r = 1/|o| Σ_t log(p(o_t) / p_old(o_t))
            log_ratio = (_row_sums(log_ratio, row, length) / length)[row]  # (N,)
        ratio = log_ratio.exp()  # (N,)
        # l_t = −min(r_t A, clip(r_t, 1 − epsilon, 1 + epsilon_high) A)
        high = self.epsilon_high or self.epsilon
        clipped = ratio.clamp(1 - self.epsilon, 1 + high)  # (N,)
        losses = -torch.minimum(ratio * advantage, clipped * advantage)  # (N,)
        if self.importance_cap is not None:
            # l_t ·= min(p_old(o_t) / p_sampler(o_t), importance_cap)
            losses = losses * (old - values["sampler_logprobs"]).exp().clamp(
                max=self.importance_cap
            )
        if self.beta:
            # l_t += beta r_t (p_base/p − log(p_base/p) − 1)
            factor = ratio if self.use_bias_correction_kl else 1.0
            losses = losses + self.beta * factor * kl_estimate(log_p, values["base_logprobs"])

        is_clipped = (clipped * advantage < ratio * advantage).float()  # (N,)
        weight = self._token_weights(row, length) * values["kept"][row]  # (N,)
        if self.loss_type != "dapo":  # the mean over the answers, not over the tokens
            is_clipped = is_clipped / length[row]
        clip_ratio = (is_clipped * values["kept"][row]).sum()
        return (losses * weight).sum(), {"clip_ratio": clip_ratio.detach()}

    def _token_weights(self, row: Tensor, length: Tensor) -> Tensor:
        """Return the weight of each token in the sum over the batch, (N,)."""
        if self.loss_type == "grpo":
            # Σ_i 1/|o_i| Σ_t l_t
            return 1 / length[row]
        if self.loss_type == "dr_grpo":
            # Σ_i 1/L Σ_t l_t
            return torch.full_like(row, 1 / self.max_completion_length, dtype=torch.float32)
        # Σ_i Σ_t l_t
        return torch.ones_like(row, dtype=torch.float32)


_TOKEN_VALUES = ("old_logprobs", "base_logprobs", "sampler_logprobs")
_VALUES = (
    "advantages",
    "kept",
    *_TOKEN_VALUES,
)  # the tensors of a batch that the model does not read


def group_advantages(rewards: Tensor, scale_rewards: str) -> Tensor:
    """Return the advantages of the answers of some groups.

    Args:
        rewards: Rewards (P, G).
        scale_rewards: "group" or "none".

    Returns:
        Advantages (P, G): exactly 0 in a group whose rewards are all equal.
    """
    # A_i = R_i − mean(R)
    centred = rewards - rewards.mean(1, keepdim=True)  # (P, G)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (P, 1)
    centred = centred.masked_fill(equal, 0.0)
    if scale_rewards == "none":
        return centred
    # A_i = (R_i − mean(R)) / (std(R) + 1e-4)
    return centred / (rewards.std(1, keepdim=True) + STD_FLOOR)


def kl_estimate(log_p: Tensor, log_p_base: Tensor) -> Tensor:
    """Return an estimate of KL(p ‖ p_base) from a token that p sampled; it is never negative.

    Args:
        log_p: log p of the tokens, (N,).
        log_p_base: log p of the same tokens under the base model, (N,).

    Returns:
        The estimate of each token, (N,).

    Source:
        Schulman 2020, http://joschu.net/blog/kl-approx.html, k3.
    """
    log_ratio = log_p_base - log_p  # (N,)
    # p_base/p − log(p_base/p) − 1
    return log_ratio.exp() - log_ratio - 1


def _row_sums(values: Tensor, row: Tensor, length: Tensor) -> Tensor:
    """Return the sum of the values (N,) of each answer, (B,)."""
    return values.new_zeros(len(length)).index_add(0, row, values)
