"""Groups of sampled answers to each prompt, with log p of their tokens: rollouts.

    p = softmax(logits / temperature)        token = the first at which the running sum of p
                                             exceeds u        u ~ U[0, 1)

The whole distribution is sampled: no top_k, no top_p, because the loss that reads these answers
needs log p of the distribution that they come from. A prompt is read once, and its keys and values
are repeated for the G answers. An answer keeps its end token. Each answer has its own random
generator, so it depends on (seed, prompt number, answer number) and not on the batch, up to
rounding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.common import order_by_length
from minilora.common.progress import ProgressBar
from minilora.generation.generate import check_lengths
from minilora.generation.sampling import Decoding
from minilora.generation.single_token import matrix_vector
from minilora.models.padded_batch import Context, inference, shared_prefix


@dataclass
class Sampled:
    """A sampled answer.

    Attributes:
        tokens: token ids, with the end token if the answer has one.
        logprobs: log p of each token.
        ended: False if the answer reached the largest length without an end token.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


def sample_groups(
    model: nn.Module, prompts: Sequence[list[int]], size: int, rule: Decoding
) -> list[list[Sampled]]:
    """Sample a group of answers to each prompt.

    Args:
        model: the model, with its active adapters.
        prompts: token ids of each prompt.
        size: G, the number of answers of a prompt.
        rule: its `max_new_tokens`, `temperature`, `seed`, `batch_size` and `ends` count.
            Temperature 0 takes the most likely tokens, and log p is then that of temperature 1.

    Returns:
        For each prompt its G answers.

    Raises:
        ValueError: a prompt is empty or exceeds the model's context.
    """
    check_lengths(model, prompts, rule.max_new_tokens)
    groups: list[list[Sampled]] = []
    for _ in prompts:
        groups.append([Sampled() for _ in range(size)])
    order = order_by_length(prompts)
    prompts_at_a_time = max(1, rule.batch_size // size)
    bar = ProgressBar("sample", len(prompts) * size, "answer")
    with bar, inference(model), matrix_vector(model):
        prefix, shared = shared_prefix(model, prompts)
        for start in range(0, len(order), prompts_at_a_time):
            numbers = order[start : start + prompts_at_a_time]  # P prompts
            context = prefix.select([0] * len(numbers))
            rests = [prompts[number][shared:] for number in numbers]
            logits = context.extend(rests)  # (P, V)
            repeated: list[int] = []
            answers: list[Sampled] = []
            for place, number in enumerate(numbers):
                repeated += [place] * size
                answers += groups[number]
            draws = _random_generators(rule.seed, numbers, size)
            _fill(context.select(repeated), logits[repeated], rule, answers, draws)
            bar.update(len(answers))
    return groups


def _random_generators(seed: int | None, numbers: Sequence[int], size: int) -> list[random.Random]:
    """Return a generator for each answer of some prompts."""
    generators = []
    for number in numbers:
        for answer in range(size):
            generators.append(random.Random(f"{seed}, prompt {number}, answer {answer}"))
    return generators


def _fill(
    context: Context,
    logits: Tensor,
    rule: Decoding,
    answers: list[Sampled],
    draws: list[random.Random],
) -> None:
    """Fill empty answers; `logits` (B, V) are those of their first tokens."""
    active = list(range(len(answers)))  # the answers whose rows are in `context`
    for _ in range(rule.max_new_tokens):
        uniform = [draws[number].random() for number in active]
        tokens, logprobs = _draw(logits, rule.temperature, uniform)
        unfinished = []
        for place, number in enumerate(active):
            answer = answers[number]
            answer.tokens.append(tokens[place])
            answer.logprobs.append(logprobs[place])
            answer.ended = tokens[place] in rule.ends
            if not answer.ended and len(answer.tokens) < rule.max_new_tokens:
                unfinished.append(place)
        if not unfinished:
            return
        if len(unfinished) < len(active):
            context = context.select(unfinished)
            active = [active[place] for place in unfinished]
        last_tokens = [answers[number].tokens[-1:] for number in active]
        logits = context.extend(last_tokens)  # (B, V)


def _draw(
    logits: Tensor, temperature: float, uniform: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Return a token of each row of logits (B, V), and its log p."""
    log_p = (logits / (temperature or 1.0)).log_softmax(-1)  # (B, V)
    if temperature == 0:
        chosen = logits.argmax(-1, keepdim=True)  # (B, 1)
    else:
        running = log_p.double().exp().cumsum(-1)  # (B, V)
        u = torch.tensor(uniform, dtype=running.dtype, device=running.device)[:, None]  # (B, 1)
        # The running sum ends near 1, not at 1.
        chosen = torch.searchsorted(running, u * running[:, -1:], right=True)  # (B, 1)
        chosen = chosen.clamp_max(logits.shape[-1] - 1)
    log_p = log_p.gather(-1, chosen)  # (B, 1)
    return chosen.squeeze(-1).tolist(), log_p.squeeze(-1).tolist()
