"""Comparison of every exported form of a trained model with the model as it was trained.

The comparison uses the logits of one dataset, stage by stage:

    trained          the base with the adapter, as in training; the reference
    merged           W + ΔW as one weight, in memory; differs by rounding only
    merged folder    a transformers folder, written and read back, with its tokenizer
    4 bits           in bitsandbytes' format, read back: the codes of a 4-bit base rounded again as
                     `merge` does, or the merged folder quantised
    gguf             one file, with its own tokenizer
    served           many prompts in one batch, token by token from a cache, one adapter per row

At each token t of the answers, with p from the trained model and q from a stage, after the same
tokens:

    KL = mean over t of  Σ p (log p − log q)   in nats
    Δ  = max |logits of p − logits of q|
    top-1 = share of tokens with the same most likely token

A stage is *equal* if every logit has the same bits. It is *rounded* if KL is at most the tolerance
and its tokenizer gives the same tokens. Otherwise it is *different*. Begin the search for a fault
at the first stage that is different. A stage that cannot exist is reported as *left out*: the kind
of adapter cannot be chosen by row, or an optional package is missing.

Simplified: a stage is the file as this library reads it. Tests of the formats compare the files
with other libraries.
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

from minilora.common.notebook import html_table
from minilora.data.loss_mask import IGNORE, Example
from minilora.data.read_rows import read_dataset
from minilora.data.tokenizer import load_tokenizer
from minilora.lora.batched import per_row_adapters
from minilora.lora.files.save_load import load_adapter
from minilora.lora.merging.merge import merge
from minilora.lora.registry import lora_layers
from minilora.losses.sft import SFT
from minilora.models.loader import load_model
from minilora.models.padded_batch import Context, inference
from minilora.models.save import save_model
from minilora.quant.nf4_linear import NF4Linear

STAGES = ("trained", "merged", "merged folder", "4 bits", "gguf", "served")
MAX_TOKENS = 512  # of answers: their logits over the vocabulary are kept in memory
_ADAPTER = "default"
_TOKENS_AT_ONCE = 64  # whose logits are converted to fp64 at the same time
_FOUR_BIT_NOTE = (
    "4 bits add noise to ΔW (minilora merge measures it): keep the adapter separate from the base"
)


class Answer(NamedTuple):
    """The last answer of a row.

    Attributes:
        prompt: Token ids before the answer.
        tokens: Token ids of the answer.
    """

    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Stage:
    """The result for one form of the model.

    Attributes:
        name: An entry of STAGES.
        verdict: "equal", "rounded", "different" or "left out".
        kl: Mean KL in nats; NaN without logits to compare.
        difference: The largest absolute difference of two logits; NaN without logits.
        top1: Share of tokens with the same most likely token, 0 to 1; NaN without logits.
        note: The reason why the stage was left out, or a hint why it is different.
    """

    name: str
    verdict: str
    kl: float = math.nan
    difference: float = math.nan
    top1: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class ExportComparison:
    """All stages; prints as a table that ends in the first different stage.

    Attributes:
        stages: The results, in the order of STAGES.
        tokens: Number of compared tokens.
        tolerance: The mean KL, in nats, up to which a stage counts as rounded.
    """

    stages: tuple[Stage, ...]
    tokens: int
    tolerance: float

    @property
    def first(self) -> Stage | None:
        """The first stage that is different, or None."""
        for stage in self.stages:
            if stage.verdict == "different":
                return stage
        return None

    def __str__(self) -> str:
        lines = [f"{'stage':<16}{'verdict':<12}{'KL, nats':>10}{'max |Δ|':>10}{'top-1':>8}"]
        for stage in self.stages:
            if math.isnan(stage.kl):
                figures = " " * 28
            else:
                figures = f"{stage.kl:10.2e}{stage.difference:10.2e}{stage.top1:8.1%}"
            line = f"{stage.name:<16}{stage.verdict:<12}{figures}  {stage.note}"
            lines.append(line.rstrip())
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        if self.first is None:
            summary = "no stage is different"
        else:
            summary = f"first different: {self.first.name}"
        return f"{summary}; {self.tokens} tokens, rounded up to KL = {self.tolerance:g}"

    def _repr_html_(self) -> str:
        rows = []
        for stage in self.stages:
            figures = ["", "", ""]
            if not math.isnan(stage.kl):
                figures = [f"{stage.kl:.2e}", f"{stage.difference:.2e}", f"{stage.top1:.1%}"]
            rows.append([stage.name, stage.verdict, *figures, stage.note])
        header = ["stage", "verdict", "KL, nats", "max |Δ|", "top-1", ""]
        return html_table(header, rows, [self._summary()])


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
    """Compare every form of a model and its adapter with the two as they were trained.

    The exported forms are written to a temporary folder and removed: first a dense and a 4-bit
    model, then a GGUF file.

    Args:
        model: The base, as `load_model` accepts it: Hub id, folder or .gguf file.
        adapter: Folder or Hub id of an adapter in PEFT's format.
        dataset: Rows with answers, in any form that `train` accepts.
        quantize: As in training: "nf4" or "keep", or None for a dense base.
        dtype: As in training; "auto" chooses by the hardware.
        rows: Number of rows, from the start of the dataset; at most 512 tokens of their answers
            are compared.
        tolerance: The mean KL, in nats per token, up to which a stage counts as rounded.
        check_base: False skips the check that the adapter was trained on this base.

    Returns:
        The verdict and the figures of every stage.

    Raises:
        ValueError: `rows` or the dataset is empty, training would refuse a row, or the adapter
            does not fit the base.
    """
    tokenizer = load_tokenizer(model)
    selected_rows = read_dataset(dataset)[: max(rows, 0)]
    answers = _answers(selected_rows, tokenizer)
    trained = load_model(model, quantize=quantize, dtype=dtype)
    load_adapter(trained, adapter, _ADAPTER, tokenizer=tokenizer, check_base=check_base)
    reference = _logits(trained, answers)  # (N, V)
    stages = [Stage("trained", "equal", 0.0, 0.0, 1.0)]
    for name, result in _stages(trained, tokenizer, selected_rows, answers):
        if isinstance(result, Stage):
            stages.append(result)
        else:
            stages.append(_compare(name, reference, result, tolerance))
    return ExportComparison(tuple(stages), len(reference), tolerance)


def _stages(
    trained: Any, tokenizer: Any, rows: list[Any], answers: list[Answer]
) -> Iterator[tuple[str, Tensor | Stage]]:
    """Yield each form after the first: its logits (N, V), or its Stage if it has no logits."""
    yield "merged", _logits(merge(trained), answers)
    # Each form is written and removed before the next one, so that the disk holds few of them.
    yield from _folder_stages(trained, tokenizer, rows, answers)
    yield "gguf", _gguf_stage(trained, tokenizer, rows, answers)
    try:
        served = _served(trained, answers)  # (N, V)
    except ValueError as error:  # a kind of adapter that cannot be chosen by row
        yield "served", Stage("served", "left out", note=str(error))
    else:
        yield "served", served


def _folder_stages(
    trained: Any, tokenizer: Any, rows: list[Any], answers: list[Answer]
) -> Iterator[tuple[str, Tensor | Stage]]:
    """Yield the merged folder, and that folder in 4 bits."""
    dtype = _compute_dtype(trained)
    with tempfile.TemporaryDirectory() as folder:
        merged_folder = Path(folder) / "merged"
        save_model(trained, merged_folder, merge=True, tokenizer=tokenizer)
        result = _read_back("merged folder", merged_folder, dtype, None, rows, answers)
        yield "merged folder", result

        four_bit_folder = Path(folder) / "4"
        if _adapts_four_bits(trained):
            save_model(trained, four_bit_folder, format="bnb-4bit", merge=True, requantize=True)
        else:
            quantized = load_model(merged_folder, quantize="nf4", dtype=dtype)
            save_model(quantized, four_bit_folder, format="bnb-4bit")
            del quantized
        yield "4 bits", _read_back("4 bits", four_bit_folder, dtype, tokenizer, rows, answers)


def _adapts_four_bits(model: Any) -> bool:
    """Return True if an active adapter is on a 4-bit layer."""
    return any(
        layer.active and isinstance(layer.base_layer, NF4Linear)
        for layer in lora_layers(model).values()
    )


def _gguf_stage(
    trained: Any, tokenizer: Any, rows: list[Any], answers: list[Answer]
) -> Tensor | Stage:
    """Write a GGUF file and return the logits of the model in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        try:
            save_model(trained, file, format="gguf", merge=True, tokenizer=tokenizer)
        except (ImportError, ValueError) as error:
            # The gguf package is missing, or llama.cpp cannot express the model.
            return Stage("gguf", "left out", note=str(error))
        return _read_back("gguf", file, _compute_dtype(trained), None, rows, answers)


def _compute_dtype(model: Any) -> torch.dtype:
    return model.model.norm.weight.dtype


def _read_back(
    name: str,
    path: Path,
    dtype: torch.dtype,
    tokenizer: Any,
    rows: list[Any],
    answers: list[Answer],
) -> Tensor | Stage:
    """Return the logits of a written form; a tokenizer of None reads the form's own."""
    try:
        if tokenizer is None:
            tokenizer = load_tokenizer(path)
        answers_again = _answers(rows, tokenizer)
        logits = _logits(load_model(path, dtype=dtype), answers)  # (N, V)
    except ValueError as error:
        return Stage(name, "different", note=f"cannot be read back: {error}")
    for row, (again, answer) in enumerate(zip_longest(answers_again, answers)):
        if again != answer:
            note = f"its tokenizer gives answer {row} other tokens"
            return Stage(name, "different", note=note)
    return logits


def _answers(rows: list[Any], tokenizer: Any) -> list[Answer]:
    """Return the last answer of each row, at most MAX_TOKENS tokens in all."""
    if not rows:
        raise ValueError("compare_exports: expected at least one row to compare on, got none.")
    answers = []
    tokens_left = MAX_TOKENS
    for example in SFT().encode(rows, tokenizer, None).examples:
        start, end = _last_answer(example)
        tokens = example.input_ids[start : min(end, start + tokens_left)]
        if tokens:
            answers.append(Answer(example.input_ids[:start], tokens))
            tokens_left -= len(tokens)
    return answers


def _last_answer(example: Example) -> tuple[int, int]:
    """Return [start, end) of the last run of supervised tokens.

    The run never starts at the first token, which the model cannot predict.
    """
    supervised = [i for i, label in enumerate(example.labels) if label != IGNORE]
    end = max(supervised) + 1
    start = end
    while start > 1 and example.labels[start - 1] != IGNORE:
        start -= 1
    return start, end


def _logits(model: Any, answers: Sequence[Answer]) -> Tensor:
    """Return the fp32 logits at the tokens of the answers, row after row, on the CPU: (N, V)."""
    device = next(model.parameters()).device
    parts = []
    with inference(model):
        for prompt, tokens in answers:
            input_ids = torch.tensor([prompt + tokens[:-1]], device=device)  # (1, T)
            logits = model(input_ids)[0, len(prompt) - 1 :]  # (n, V)
            parts.append(logits.float().cpu())  # (n, V)
    return torch.cat(parts)  # (N, V)


def _served(model: Any, answers: Sequence[Answer]) -> Tensor:
    """Return the same logits (N, V) from one batch with a cache and an adapter per row.

    As in a server, prompts of all lengths are read together; then each row reads a token a step.
    """
    steps = max(len(tokens) for _, tokens in answers)
    prompts = [prompt for prompt, _ in answers]
    with inference(model), per_row_adapters(model, [_ADAPTER] * len(answers)):
        context = Context(model)
        logits_by_step = [context.extend(prompts).cpu()]  # each (B, V)
        for step in range(steps - 1):
            next_tokens = []
            for _, tokens in answers:
                # A finished row repeats its last token to stay in the batch; it is not compared.
                next_tokens.append([tokens[min(step, len(tokens) - 1)]])
            logits_by_step.append(context.extend(next_tokens).cpu())
    logits = []
    for row, (_, tokens) in enumerate(answers):
        for step in range(len(tokens)):
            logits.append(logits_by_step[step][row])  # (V,)
    return torch.stack(logits)  # (N, V)


def _compare(name: str, reference: Tensor, logits: Tensor, tolerance: float) -> Stage:
    """Compare the logits (N, V) of a stage with those of the trained model."""
    kl = 0.0
    chunks = zip(reference.split(_TOKENS_AT_ONCE), logits.split(_TOKENS_AT_ONCE), strict=True)
    for reference_chunk, chunk in chunks:
        log_p = reference_chunk.double().log_softmax(-1)  # (n, V)
        log_q = chunk.double().log_softmax(-1)  # (n, V)
        # Σ p (log p − log q)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
    kl = max(kl / len(reference), 0.0)
    same_top1 = reference.argmax(-1) == logits.argmax(-1)  # (N,)
    top1 = same_top1.float().mean().item()
    difference = (reference - logits).abs().max().item()
    verdict = "different"
    if torch.equal(reference, logits):
        verdict = "equal"
    elif kl <= tolerance:
        verdict = "rounded"
    note = ""
    if name == "4 bits" and verdict == "different":
        note = _FOUR_BIT_NOTE
    return Stage(name, verdict, kl, difference, top1, note)
