"""Rules that change the logits of a row before its next token is chosen.

For a token t that occurs c_t times in the answer so far:

    repetition    l_t / ρ if l_t > 0 else l_t · ρ     for every t of the prompt and the answer
    frequency     l_t − c_t · f
    presence      l_t − p                             if c_t > 0
    bias          l_t + b_t
    min_tokens    −∞ for every end token, while the answer has fewer tokens

Simplified: the tokens of a row are counted again at each step.

Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition, as in transformers);
https://platform.openai.com/docs/api-reference (frequency, presence, bias: OpenAI's formula).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)  # requests inherit that identity counts
class TokenRules:
    """Rules that restrict or change the choice of a token. The defaults change nothing.

    Attributes:
        top_k: number of likeliest tokens to sample from; 0 is all.
        min_p: smallest probability of a token to sample, as a part of the likeliest token's.
        repetition_penalty: divisor of the logits of tokens in the prompt and the answer.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted from these logits for each occurrence.
        logit_bias: token id -> number that is added to its logit.
        min_tokens: an answer of fewer tokens gets no end token.
    """

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0

    @property
    def changes_logits(self) -> bool:
        """True if `adjusted` may differ from the logits."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.min_tokens)
        return self.repetition_penalty != 1 or any(penalties) or bool(self.logit_bias)

    def check_rules(self) -> None:
        """Raise ValueError for a number that is out of range."""
        finite = float("inf")
        checks = {
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < finite, "above 0"),
            "presence_penalty": (abs(self.presence_penalty) < finite, "finite"),
            "frequency_penalty": (abs(self.frequency_penalty) < finite, "finite"),
            "min_tokens": (self.min_tokens >= 0, "0 or more"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0 or not abs(bias) < finite:
                raise ValueError(
                    f"logit_bias must give token ids a finite number each, got {token!r}: {bias!r}"
                )


def adjusted(
    logits: Tensor,
    rules: TokenRules,
    prompt: Sequence[int],
    answer: Sequence[int],
    ends: Collection[int],
) -> Tensor:
    """Return the logits of a row after its penalties.

    Args:
        logits: logits of the next token, (V,).
        rules: the penalties.
        prompt: tokens of the prompt.
        answer: tokens of the answer so far.
        ends: tokens that end the answer.

    Returns:
        New logits, (V,).
    """
    logits = logits.clone()
    if rules.repetition_penalty != 1:
        seen = _index({*prompt, *answer}, logits)  # (S,)
        old = logits[seen]
        penalty = rules.repetition_penalty
        logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if answer and (rules.presence_penalty or rules.frequency_penalty):
        counts = Counter(answer)
        used = _index(counts, logits)  # (S,)
        count = torch.tensor([*counts.values()], dtype=logits.dtype, device=logits.device)  # (S,)
        logits[used] -= count * rules.frequency_penalty + rules.presence_penalty
    if rules.logit_bias:
        biased = _index(rules.logit_bias, logits)  # (S,)
        bias = [*rules.logit_bias.values()]
        logits[biased] += torch.tensor(bias, dtype=logits.dtype, device=logits.device)
    if ends and len(answer) < rules.min_tokens:
        logits[_index(ends, logits)] = -torch.inf
    return logits


def _index(tokens: Collection[int], logits: Tensor) -> Tensor:
    """Return token ids as an index of the logits."""
    return torch.tensor([*tokens], dtype=torch.long, device=logits.device)
