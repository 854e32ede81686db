"""Choice of the next token: greedy, or sampled from the nucleus.

    p       = softmax(logits / temperature)          temperature 0: the arg-max
    nucleus = the fewest most likely tokens whose probabilities add up to top_p
    token   = the first token of the nucleus at which the running sum of p exceeds u * p(nucleus)
    u       ~ U[0, 1)

top_k leaves only the k most likely tokens for the nucleus. min_p removes the tokens of the nucleus
whose probability is less than min_p times that of the most likely token. generation/penalties.py
changes the logits before.

Source: Holtzman et al. 2020 (nucleus sampling), arXiv:1904.09751, section 3.1;
Nguyen et al. 2024 (min-p), arXiv:2407.01082.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.generation.penalties import TokenRules, adjusted


@dataclass(frozen=True)
class Decoding(TokenRules):
    """Rules for choosing tokens and ending answers, with those of TokenRules.

    Attributes:
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        top_p: probability mass of the nucleus.
        seed: seed of the sampling; None draws one.
        batch_size: prompts answered at a time; changes no result, up to rounding.
        ends: token ids that end an answer and do not belong to it.
        stopped: a function that returns True for an answer (token ids) that contains a stop string.
        cuda_graph: run each token's step as one CUDA graph: "auto", True or False.
        grammar: the grammar of structured.py that answers follow, or None.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    batch_size: int = 16
    ends: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None
    cuda_graph: bool | str = "auto"
    grammar: Any = None

    def __post_init__(self) -> None:
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        finite = 0 <= self.temperature < float("inf")
        self._check("temperature", finite, "0 (greedy) or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        known = self.cuda_graph == "auto" or isinstance(self.cuda_graph, bool)
        self._check("cuda_graph", known, "'auto', True or False")
        self.check_rules()

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def is_complete(self, answer: list[int]) -> bool:
        """Return True for an answer that needs no further token.

        Args:
            answer: token ids without an end token.
        """
        if len(answer) == self.max_new_tokens:
            return True
        return self.stopped is not None and self.stopped(answer)


def next_tokens(
    logits: Tensor,
    rule: Decoding,
    uniform: Sequence[float],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    constraints: Sequence[Any] | None = None,
) -> list[int]:
    """Return the next token of each row, after its penalties and its constraint.

    Args:
        logits: logits of the B rows, (B, V).
        rule: the rules of all rows.
        uniform: a number in [0, 1) for each row; not used with temperature 0.
        prompts: the prompt of each row.
        answers: the answer of each row so far.
        constraints: for each row the `Constraint` of structured.py; None forbids no token.
    """
    if rule.changes_logits:
        rows = []
        for row, prompt, answer in zip(logits, prompts, answers, strict=True):
            rows.append(adjusted(row, rule, prompt, answer, rule.ends))
        logits = torch.stack(rows)  # (B, V)
    if constraints is not None:
        rows = []
        for row, constraint in zip(logits, constraints, strict=True):
            rows.append(constraint.masked(row))
        logits = torch.stack(rows)  # (B, V)
    return pick(logits, rule.temperature, rule.top_p, uniform, rule.top_k, rule.min_p)


def pick(
    logits: Tensor,
    temperature: float,
    top_p: float,
    uniform: Sequence[float],
    top_k: int = 0,
    min_p: float = 0.0,
) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: logits of the B rows, (B, V).
        temperature: 0 takes the arg-max.
        top_p: probability mass of the nucleus.
        uniform: a number in [0, 1) for each row; not used with temperature 0.
        top_k: number of likeliest tokens in the nucleus; 0 is all.
        min_p: smallest probability in the nucleus, as a part of the largest.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    if 0 < top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k)  # (B, k) each
        places = torch.tensor(pick(logits, temperature, top_p, uniform, 0, min_p))[:, None]
        return tokens.gather(-1, places.to(tokens.device)).squeeze(-1).tolist()
    # (B, V), at most 0, so that the exponential cannot overflow
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    p, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V) each
    running = p.cumsum(-1)  # (B, V)
    # A token belongs to the nucleus if the tokens before it have less than top_p.
    size = ((running - p) < top_p).sum(-1, keepdim=True)  # (B, 1)
    if min_p:
        size = size.minimum((p >= min_p * p[:, :1]).sum(-1, keepdim=True))  # (B, 1)
    mass = running.gather(-1, size - 1)  # (B, 1): p(nucleus)
    u = torch.tensor(uniform, dtype=p.dtype, device=p.device)[:, None]  # (B, 1)
    drawn = torch.searchsorted(running, u * mass, right=True)  # (B, 1): running sums <= u * mass
    return tokens.gather(-1, drawn.minimum(size - 1)).squeeze(-1).tolist()
