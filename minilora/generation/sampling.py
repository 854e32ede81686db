"""Choice of the next token: greedy, or sampled from the nucleus.

    p       = softmax(logits / temperature)          temperature 0: the arg-max
    nucleus = the fewest most likely tokens whose probabilities add up to top_p
    token   = the first token of the nucleus at which the running sum of p exceeds u * p(nucleus)
    u       ~ U[0, 1)

Source: Holtzman et al. 2020 (nucleus sampling), arXiv:1904.09751, section 3.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """Rules for choosing tokens and ending answers.

    Attributes:
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        top_p: probability mass of the nucleus.
        seed: seed of the sampling; None draws one.
        batch_size: prompts answered at a time; changes no result, up to rounding.
        ends: token ids that end an answer and do not belong to it.
        stopped: a function that returns True for an answer (token ids) that contains a stop string.
        cuda_graph: run each token's step as one CUDA graph: "auto", True or False.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    batch_size: int = 16
    ends: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None
    cuda_graph: bool | str = "auto"

    def __post_init__(self) -> None:
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        finite = 0 <= self.temperature < float("inf")
        self._check("temperature", finite, "0 (greedy) or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        known = self.cuda_graph == "auto" or isinstance(self.cuda_graph, bool)
        self._check("cuda_graph", known, "'auto', True or False")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def pick(logits: Tensor, temperature: float, top_p: float, uniform: Sequence[float]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: logits of the B rows, (B, V).
        temperature: 0 takes the arg-max.
        top_p: probability mass of the nucleus.
        uniform: a number in [0, 1) for each row; not used with temperature 0.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    # (B, V), at most 0, so that the exponential cannot overflow
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    p, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V) each
    running = p.cumsum(-1)  # (B, V)
    # A token belongs to the nucleus if the tokens before it have less than top_p.
    size = ((running - p) < top_p).sum(-1, keepdim=True)  # (B, 1)
    mass = running.gather(-1, size - 1)  # (B, 1): p(nucleus)
    u = torch.tensor(uniform, dtype=p.dtype, device=p.device)[:, None]  # (B, 1)
    drawn = torch.searchsorted(running, u * mass, right=True)  # (B, 1): running sums <= u * mass
    return tokens.gather(-1, drawn.minimum(size - 1)).squeeze(-1).tolist()
