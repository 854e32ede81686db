"""Does every form of a trained model say what the model said in training? Logits of one dataset, stage by stage.

    trained          the base as it was trained on, with the adapter                what the others are held against
    merged           W + ΔW as one weight, in memory                                 a rounding of the weights
    merged folder    written for transformers, read back, with the tokenizer in it
    4 bits           that folder quantised, written as bitsandbytes has it, read back
    gguf             one file, its own tokenizer
    served           many prompts in one batch, token by token from a cache, the adapter chosen by row

At each token t of the answers, p being the trained model and q a stage, after the same tokens:

    KL = mean over t of  Σ p (log p − log q)   in nats        Δ = max |logits of p − of q|        top-1: equal likeliest

A stage is *equal* if every logit has the same bits, *rounded* if KL is at most the tolerance and its tokenizer gives
the same tokens, else *different*. The first that is different is where to look. What a stage cannot have (a kind of
adapter that is not chosen by row, an extra that is missing) is left out, and said to be. Simplified: a stage is this
library's reading of what it wrote; what others make of the files is held against it elsewhere (tests of formats).
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.data.formats import read_dataset
from minilora.data.loss_mask import IGNORE, Example
from minilora.data.tokenizer import load_tokenizer
from minilora.lora.batched import per_row_adapters
from minilora.lora.files.save_load import load_adapter
from minilora.lora.merging.merge import merge
from minilora.losses.sft import SFT
from minilora.models.loader import load_model
from minilora.models.padded_batch import Context, inference
from minilora.models.save import save_model

STAGES = ("trained", "merged", "merged folder", "4 bits", "gguf", "served")
TOKENS = 512  # of answers that are compared, at most: their logits over the vocabulary are held
ADAPTER = "default"
LOST = "4 bits keep little of a small ΔW (minilora merge measures it): leave the adapter beside the base"


class Answer(NamedTuple):
    """The last answer of a row: what is read before it, and its tokens."""

    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Stage:
    """One form: mean KL in nats, the largest difference of logits and its share of tokens with the likeliest one equal;
    `note`: why it is different otherwise, or was left out (then the figures are NaN)."""

    name: str
    verdict: str
    kl: float = math.nan
    difference: float = math.nan
    top1: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class ExportComparison:
    """All stages; prints as a table that ends in the first different one."""

    stages: tuple[Stage, ...]
    tokens: int
    tolerance: float

    @property
    def first(self) -> Stage | None:
        """The first stage that is different."""
        return next((stage for stage in self.stages if stage.verdict == "different"), None)

    def __str__(self) -> str:
        lines = [f"{'stage':<16}{'verdict':<12}{'KL, nats':>10}{'max |Δ|':>10}{'top-1':>8}"]
        for s in self.stages:
            figures = f"{s.kl:10.2e}{s.difference:10.2e}{s.top1:8.1%}" if s.kl == s.kl else " " * 28
            lines.append(f"{s.name:<16}{s.verdict:<12}{figures}  {s.note}".rstrip())
        found = f"first different: {self.first.name}" if self.first else "no stage is different"
        return "\n".join([*lines, f"{found}; {self.tokens} tokens, rounded up to KL = {self.tolerance:g}"])


def compare_exports(
    model: str | Path,
    adapter: str | Path,
    dataset: Any,
    *,
    quantize: str | None = None,
    dtype: Any = "auto",
    rows: int = 8,
    tolerance: float = 0.01,
    check_base: bool = True,
) -> ExportComparison:
    """Hold every form of `model` with `adapter` against the two as they were trained, on the answers of `dataset`.

    model: what load_model takes; quantize, dtype: as in training. adapter: a folder or Hub id in PEFT's format.
    dataset: what `train` takes; its first `rows` rows are read, up to 512 tokens of answers.
    tolerance: the mean KL, in nats a token, up to which a stage counts as rounded.
    What is written goes to a temporary folder, a dense model and a 4-bit one, then a GGUF file, and is removed.
    ValueError: no rows, a row that training would refuse, an adapter that does not fit (load_adapter).
    """
    tokenizer = load_tokenizer(model)
    some = read_dataset(dataset)[: max(rows, 0)]
    answers = _answers(some, tokenizer)
    trained = load_model(model, quantize=quantize, dtype=dtype)
    load_adapter(trained, adapter, ADAPTER, tokenizer=tokenizer, check_base=check_base)
    told = _logits(trained, answers)
    stages = [Stage("trained", "equal", 0.0, 0.0, 1.0)]
    for name, found in _stages(trained, tokenizer, some, answers):
        stages.append(found if isinstance(found, Stage) else _compare(name, told, found, tolerance))
    return ExportComparison(tuple(stages), len(told), tolerance)


def _stages(
    trained: Any, tokenizer: Any, rows: list[Any], answers: list[Answer]
) -> Iterator[tuple[str, Tensor | Stage]]:
    """Each form after the first: its logits (N, V), or its Stage where there are none to compare."""
    dtype = trained.model.norm.weight.dtype  # what it computes in
    yield "merged", _logits(merge(trained), answers)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_model(trained, place / "merged", merge=True, tokenizer=tokenizer)
        yield _read("merged folder", place / "merged", dtype, None, rows, answers)
        save_model(load_model(place / "merged", quantize="nf4", dtype=dtype), place / "4", format="bnb-4bit")
        yield _read("4 bits", place / "4", dtype, tokenizer, rows, answers)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        try:
            save_model(trained, file, format="gguf", merge=True, tokenizer=tokenizer)
        except (ImportError, ValueError) as error:  # no gguf package; what llama.cpp has no field for
            yield "gguf", Stage("gguf", "left out", note=str(error))
        else:
            yield _read("gguf", file, dtype, None, rows, answers)
    try:
        yield "served", _served(trained, answers)
    except ValueError as error:  # adapters of a kind that is not chosen by row
        yield "served", Stage("served", "left out", note=str(error))


def _read(
    name: str, path: Path, dtype: torch.dtype, tokenizer: Any, rows: list[Any], answers: list[Answer]
) -> tuple[str, Tensor | Stage]:
    """A form that was written, read back; with its own tokenizer, unless one is given."""
    try:
        again = _answers(rows, tokenizer or load_tokenizer(path))
        found = _logits(load_model(path, dtype=dtype), answers)
    except ValueError as error:
        return name, Stage(name, "different", note=f"cannot be read back: {error}")
    if again != answers:
        row = next(i for i, pair in enumerate(zip_longest(again, answers)) if pair[0] != pair[1])
        return name, Stage(name, "different", note=f"its tokenizer gives answer {row} other tokens")
    return name, found


def _answers(rows: list[Any], tokenizer: Any) -> list[Answer]:
    """The last run of trained tokens of each row, at most TOKENS in all. ValueError: no rows, or none with any."""
    if not rows:
        raise ValueError("compare_exports: expected at least one row to compare on, got none.")
    found, room = [], TOKENS
    for example in SFT().encode(rows, tokenizer, None).examples:
        start, end = _last_run(example)
        if tokens := example.input_ids[start : min(end, start + room)]:
            found.append(Answer(example.input_ids[:start], tokens))
            room -= len(tokens)
    return found


def _last_run(example: Example) -> tuple[int, int]:
    """[start, end) of the last tokens in a row that train; the first token of a text has nothing before it."""
    end = max(i for i, label in enumerate(example.labels) if label != IGNORE) + 1
    start = end
    while start > 1 and example.labels[start - 1] != IGNORE:
        start -= 1
    return start, end


def _logits(model: Any, answers: Sequence[Answer]) -> Tensor:
    """(N, V) in fp32, on the CPU: what `model` says at the tokens of the answers, each row by itself."""
    device = next(model.parameters()).device
    with inference(model):
        parts = []
        for prompt, tokens in answers:
            ids = torch.tensor([prompt + tokens[:-1]], device=device)  # (1, T)
            parts.append(model(ids)[0, len(prompt) - 1 :].float().cpu())  # (n, V)
    return torch.cat(parts)


def _served(model: Any, answers: Sequence[Answer]) -> Tensor:
    """The same as a server does it: prompts of all lengths in one batch, then a token a step, the adapter by row."""
    steps = max(len(tokens) for _, tokens in answers)
    with inference(model), per_row_adapters(model, [ADAPTER] * len(answers)):
        context = Context(model)
        said = [context.extend([prompt for prompt, _ in answers]).cpu()]  # (B, V)
        for step in range(steps - 1):
            # a row that is over reads its last token again, for the batch's sake: nothing of it is compared
            said.append(context.extend([[tokens[min(step, len(tokens) - 1)]] for _, tokens in answers]).cpu())
    return torch.cat([said[i][b][None] for b, (_, tokens) in enumerate(answers) for i in range(len(tokens))])


def _compare(name: str, told: Tensor, found: Tensor, tolerance: float) -> Stage:
    kl = 0.0
    for p, q in zip(told.split(64), found.split(64), strict=True):  # (n, V): in fp64 a few at a time
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
    kl = max(kl / len(told), 0.0)
    top1 = (told.argmax(-1) == found.argmax(-1)).float().mean().item()
    verdict = "equal" if torch.equal(told, found) else "rounded" if kl <= tolerance else "different"
    note = LOST if name == "4 bits" and verdict == "different" else ""
    return Stage(name, verdict, kl, (told - found).abs().max().item(), top1, note)
