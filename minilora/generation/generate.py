"""Text from a model, many prompts at a time: greedy or sampled, through a KV cache.

    p = softmax(logits / temperature)                           temperature 0: the arg-max
    nucleus = the fewest most likely tokens whose probabilities add up to top_p (Holtzman et al. 2020, section 3.1)
    token = the first of the nucleus at which the running sum of p exceeds u * p(nucleus),   u ~ U[0, 1)

Prompts of similar length go together, padded on the left; what all of them begin with is read once. A finished row
leaves its batch. u comes from a generator of the row's own, so a sampled answer depends on (seed, row number, prompt),
not on its neighbours. On a GPU a token's step can be one CUDA graph (generation/cuda_graph.py). Simplified against
transformers' generate: no beams, penalties or streaming.
"""

import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.prompt import encode_prompt, end_of_turn
from minilora.generation.cuda_graph import graphs
from minilora.lora.batched import for_prompts
from minilora.models.padded_batch import Context, inference, shared_prefix
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels.ops.mode import plain_now

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when an answer is over; `generate` documents the fields."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    batch_size: int = 16
    ends: frozenset[int] = frozenset()  # ids that end an answer and are not part of it
    stopped: Callable[[list[int]], bool] | None = None  # whether an answer holds a stop string
    cuda_graph: bool | str = "auto"

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "cuda_graph": (self.cuda_graph == "auto" or isinstance(self.cuda_graph, bool), "'auto', True or False"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: str | int | Sequence[str | int] | None = None,
    seed: int | None = None,
    batch_size: int = 16,
    cuda_graph: bool | str = "auto",
    adapters: Sequence[str | None] | None = None,
) -> Any:
    """What `model` says next: a string for one prompt, a list of strings for a list of prompts.

    A prompt is a list of messages (`[{"role": "user", "content": ...}]`) or a text: one user message if the tokenizer
    has a chat template, else (and always as `minilora.data.RawText`) a text to go on with. `stop`: strings or token
    ids before which an answer ends; the model's own end tokens always end it. `batch_size` prompts are answered at a
    time; answers do not depend on it, rounding aside.
    `cuda_graph`: on a GPU, start all the work of a token with one call; "auto" does where the model allows and it
    should pay (generation/cuda_graph.py says when), True raises where the model does not allow. Answers do not depend
    on it. `adapters`: for each prompt the name of the adapter that answers, None for the base alone (lora/batched.py).
    ValueError: an empty prompt, one too long for the model's context, a number out of its range,
    cuda_graph=True without a GPU.
    """
    single = isinstance(prompt, str | Mapping) or (bool(prompt) and all(isinstance(m, Mapping) for m in prompt))
    prompts: list[Any] = [prompt] if single else list(prompt)
    stops = [stop] if isinstance(stop, str | int) else list(stop or [])
    words = [text for text in stops if isinstance(text, str)]
    if "" in words:
        raise ValueError("stop holds an empty string, which every answer contains: remove it")
    ends = end_tokens(model, tokenizer) | {token for token in stops if isinstance(token, int)}

    def stopped(answer: list[int]) -> bool:
        text = tokenizer.decode(answer, skip_special_tokens=False)
        return any(word in text for word in words)

    rule = Decoding(max_new_tokens, temperature, top_p, seed, batch_size, ends, stopped if words else None, cuda_graph)
    if empty := [number for number, one in enumerate(prompts) if not one]:
        raise ValueError(f"prompts {empty[:8]} are empty: give a text or at least one message")
    for number, one in enumerate(prompts):
        if not isinstance(one, str) and not (isinstance(one, Sequence) and all(isinstance(m, Mapping) for m in one)):
            raise ValueError(f"prompt {number}: expected a text or a list of messages (dicts), got {one!r:.80}")
    rows = [encode_prompt(one, tokenizer) for one in prompts]
    found = generate_ids(model, rows, rule, adapters)
    answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in found]
    for word in words:
        answers = [answer.partition(word)[0] for answer in answers]
    return answers[0] if single else answers


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: the tokenizer's EOS, those of the model's configs, the template's end of turn."""
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    found = [getattr(config, "eos_token_id", None) for config in configs]
    found += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    ids = [token for entry in found for token in (entry if isinstance(entry, list | tuple) else [entry])]
    return frozenset(token for token in ids if token is not None)


def generate_ids(
    model: nn.Module, prompts: Sequence[list[int]], rule: Decoding, adapters: Sequence[str | None] | None = None
) -> list[list[int]]:
    """The same on token ids: the new tokens of each prompt, end tokens left out."""
    check_lengths(model, prompts, rule.max_new_tokens)
    rows = None if adapters is None else for_prompts(model, adapters, len(prompts), rule)
    seed = secrets.randbits(64) if rule.seed is None else rule.seed
    draws = [random.Random(f"{seed}, row {number}") for number in range(len(prompts))]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    steps = step_by_step(model, rule if adapters is None else replace(rule, cuda_graph=False), len(prompts))
    with inference(model), matrix_vector(model), rows or nullcontext() as own:
        prefix, size = shared_prefix(model, prompts if adapters is None else [])  # adapters read apart
        for start in range(0, len(order), rule.batch_size):
            batch = order[start : start + rule.batch_size]
            context = prefix.select([0] * len(batch))
            context.adapters = None if adapters is None else (own, [adapters[i] for i in batch])
            logits = context.extend([prompts[i][size:] for i in batch])  # (B, V)
            _answer(steps(context), logits, rule, [answers[i] for i in batch], [draws[i] for i in batch])
    return answers


def step_by_step(model: nn.Module, rule: Decoding, rows: int) -> Callable[[Context], Any]:
    """What the context of a batch is read on through, token by token: itself, or CUDA graphs."""
    gpu = next(model.parameters()).is_cuda
    if rule.cuda_graph is False or (rule.cuda_graph == "auto" and not gpu):
        return lambda context: context
    rows = min(rule.batch_size, rows)
    return graphs(model, rule.cuda_graph, rows, rule.max_new_tokens)


@contextmanager
def matrix_vector(model: nn.Module) -> Iterator[None]:
    """Inside, layers on a CPU are quick to take a single token. Sums are in fp32 and rounded once in any case.

    Where the processor has AMX, a dense bf16 one takes it through `torch.mv`: F.linear's product with one row fills
    AMX's tiles of 16, while without AMX it is the faster of the two (benchmarks/training/choices.py, docs/LOG.md). A
    4-bit one looks up only once where its codes lie.
    """
    layers: list[Any] = [m for m in model.modules() if "forward" not in vars(m)]
    dense: list[Any] = [m for m in layers if type(m) is nn.Linear and m.weight.dtype == torch.bfloat16]
    dense = [m for m in dense if m.weight.is_cpu] if torch.cpu._is_amx_tile_supported() else []
    packed: list[Any] = [m for m in layers if type(m) is NF4Linear and m.packed.is_cpu]
    sharded = any(hasattr(m, "unshard") for m in model.modules())  # FSDP's weights move before each layer
    if plain_now() or sharded or torch.is_autocast_enabled("cpu"):
        packed = []
    for layer in dense:
        layer.forward = partial(_one_token, layer)
    for layer in packed:
        layer.forward = layer.for_tokens()
    try:
        yield
    finally:
        for layer in dense + packed:
            del layer.forward


def _one_token(layer: nn.Linear, x: Tensor) -> Tensor:
    """x (…, in) -> (…, out), as nn.Linear."""
    if x.numel() != layer.in_features:
        return F.linear(x, layer.weight, layer.bias)
    token = x.reshape(-1)  # (in,)
    y = torch.mv(layer.weight, token) if layer.bias is None else torch.addmv(layer.bias, layer.weight, token)  # (out,)
    return y.view(*x.shape[:-1], -1)


def _answer(
    context: Context, logits: Tensor, rule: Decoding, answers: list[list[int]], draws: list[random.Random]
) -> None:
    """Fill the empty `answers` of one batch token by token; `logits` (B, V) of the first."""
    alive = list(range(len(answers)))  # the rows that `context` still holds
    for step in range(rule.max_new_tokens):
        uniform = [draws[i].random() for i in alive] if rule.temperature else []
        going = []
        for place, token in enumerate(pick(logits, rule.temperature, rule.top_p, uniform)):
            answer = answers[alive[place]]
            if token not in rule.ends:
                answer.append(token)
                if rule.stopped is None or not rule.stopped(answer):
                    going.append(place)
        if not going or step == rule.max_new_tokens - 1:
            return
        if len(going) < len(alive):
            context, alive = context.select(going), [alive[place] for place in going]
        logits = context.extend([answers[i][-1:] for i in alive])  # (B, V)


def pick(logits: Tensor, temperature: float, top_p: float, uniform: Sequence[float]) -> list[int]:
    """The next token of each row of logits (B, V): the arg-max, or drawn with `uniform[b]` in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature  # (B, V) <= 0, so nothing overflows
    p, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V)
    running = p.cumsum(-1)  # (B, V)
    # nucleus: every token before which less than top_p has been gathered
    size = ((running - p) < top_p).sum(-1, keepdim=True)  # (B, 1)
    mass = running.gather(-1, size - 1)  # (B, 1) p(nucleus)
    u = torch.tensor(uniform, dtype=p.dtype, device=p.device)[:, None]  # (B, 1)
    drawn = torch.searchsorted(running, u * mass, right=True)  # (B, 1) running sums <= u * mass
    return tokens.gather(-1, drawn.minimum(size - 1)).squeeze(-1).tolist()


def check_lengths(model: nn.Module, prompts: Sequence[list[int]], new_tokens: int) -> None:
    """ValueError for an empty prompt, and for one that leaves no room for `new_tokens` in the model's context."""
    room = getattr(model.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: a model needs at least one token to go on from")
        if room is not None and len(prompt) + new_tokens > room:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with {new_tokens} new ones exceed the model's "
                f"context of {room}: shorten it or lower max_new_tokens"
            )
