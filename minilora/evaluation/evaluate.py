"""How well a model answers held-out rows: loss, greedy answers against the reference, the likeliest of given labels.

    loss        = sum over trained tokens of -log p(token) / their number           perplexity = exp(loss)
    score(l)    = sum_j log p(l_j | prompt, l_<j)       over the tokens of label l and its end of turn, not averaged
    label_accuracy = share of rows whose label of highest score is the reference

The score is a likelihood, so it is a sum: a mean over tokens would favour long labels whose tail is predictable.
All labels are read on top of the prompt's KV cache in one forward, side by side as a tree (labels that begin alike
share their beginning), and only where needed: a label scores no more than its first token does, so a favourite by
first token whose whole score is above the first tokens of all rivals has won (branch and bound, exact).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.dataset import encode_dataset
from minilora.data.formats import Chat, RawText, as_messages, read_dataset
from minilora.data.loss_mask import IGNORE, Example, encode_row
from minilora.data.prompt import encode_prompt, split_prompt
from minilora.evaluation.metrics import Scores, exact_match, token_f1
from minilora.generation.generate import Decoding, check_lengths, end_tokens, generate_ids
from minilora.losses.sft import mean_loss
from minilora.models.padded_batch import Context, inference, shared_prefix

Metric = Callable[[str, str], float]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    *,
    labels: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    metrics: Mapping[str, Metric] | None = None,
) -> Scores:
    """Scores of `model` on the rows of `dataset` (anything `train` takes); none of them depends on `batch_size`.

    labels: the closed set of answers; adds `label_accuracy`. Every row's reference must be among them.
    max_new_tokens: room for a greedy answer; 0 leaves generation out, and with it exact match, F1 and `metrics`.
    metrics: more of them by name, each a function (prediction, reference) -> number, averaged over the rows.
    Loss and perplexity need no more than trained tokens; a `text` row has nothing else.
    ValueError: a row too long for the context or without a trained token, labels that fit no row, a taken name.
    """
    rows, metrics = read_dataset(dataset), dict(metrics or {})
    if taken := {field.name for field in fields(Scores)} & metrics.keys():
        raise ValueError(f"metrics: {sorted(taken)} are measured already; choose other names")
    if batch_size < 1 or max_new_tokens < 0 or (metrics and not max_new_tokens):
        raise ValueError(
            f"expected batch_size >= 1 and max_new_tokens >= 0 (>= 1 with metrics), got {batch_size}, {max_new_tokens}"
        )
    examples = _encode(model, tokenizer, rows)
    loss, tokens = mean_loss(model, examples, batch_size)
    asked = [(row, example) for row, example in zip(rows, examples, strict=True) if _has_answer(row, example.row)]
    if not asked and (labels is not None or metrics):
        raise ValueError("labels and metrics need rows with a prompt and an answer, and these are plain texts")
    pairs = [split_prompt(row, example.row) for row, example in asked]
    references, prompts = [answer for _, answer in pairs], [encode_prompt(prompt, tokenizer) for prompt, _ in pairs]
    found: dict[str, Any] = {}
    if labels is not None:
        table = label_table(labels, tokenizer, pairs[0][0], len(prompts[0]))
        for (_, example), prompt in zip(asked, prompts, strict=True):
            if (ids := _answer_ids(example, len(prompt))) not in table:
                raise ValueError(
                    f"row {example.row}: its answer {tokenizer.decode(ids)!r} is none of the labels {list(labels)}, "
                    "or is not tokenised as after the first row: let all prompts end alike"
                )
        choices = [labels[index] for index in choose(model, prompts, table, batch_size)]
        found |= {"choices": choices, "label_accuracy": _mean(exact_match, choices, references)}
    if max_new_tokens and asked:
        rule = Decoding(max_new_tokens, batch_size=batch_size, ends=end_tokens(model, tokenizer))
        answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generate_ids(model, prompts, rule)]
        found |= {"predictions": answers, "metrics": {k: _mean(f, answers, references) for k, f in metrics.items()}}
        found |= {f.__name__: _mean(f, answers, references) for f in (exact_match, token_f1)}
    return Scores(len(rows), tokens, loss, math.exp(loss), len(asked), references=references, **found)


def _encode(model: Any, tokenizer: Any, rows: Sequence[Any]) -> Sequence[Example]:
    """One example a row; a row that could not be scored whole is an error, because its figures would mislead."""
    room = getattr(model.config, "max_position_embeddings", None)
    encoded = encode_dataset(rows, tokenizer, room)
    if bad := sorted({*encoded.report.truncated, *encoded.report.untrained}):
        raise ValueError(
            f"rows {bad[:8]} have no trained token or exceed the context of {room} tokens: {encoded.report}"
        )
    return encoded.examples


def _has_answer(row: Any, index: int) -> bool:
    sample = as_messages(row, index)
    return isinstance(sample, Chat) or bool(sample.prompt)


def _mean(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> float:
    return math.fsum(map(metric, predictions, references)) / len(references)


def label_table(labels: Sequence[str], tokenizer: Any, prompt: Any, size: int) -> list[list[int]]:
    """What training would train of each label as the answer to `prompt` (of `size` tokens): its ids, end included."""
    table = []
    for label in labels:
        row = {"prompt": str(prompt), "completion": label}
        if not isinstance(prompt, RawText):
            row = {"messages": [*prompt, {"role": "assistant", "content": label}]}
        table.append(_answer_ids(encode_row(row, tokenizer), size))
    if len(table) < 2 or len({tuple(ids) for ids in table}) < len(table):
        raise ValueError(f"labels: expected at least two, no two of them the same tokens, got {list(labels)}")
    return table


def _answer_ids(example: Example, start: int) -> list[int]:
    """The last answer's tokens, from `start` to its last trained one."""
    end = max(i for i, label in enumerate(example.labels) if label != IGNORE) + 1
    return example.input_ids[start:end]


class Labels:
    """The token ids of the answers to choose from, as a tree: labels that begin alike share nodes.

    A node is a beginning of a label, whole labels left out; an edge is a label's next token after one of its nodes.
    """

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self.sizes = torch.tensor([len(label) for label in ids])  # (L,)
        self.padded = torch.tensor([[*label, *[0] * (max(map(len, ids)) - len(label))] for label in ids])  # (L, J)
        heads = sorted({tuple(label[:j]) for label in ids for j in range(1, len(label))})
        number = {head: i for i, head in enumerate(heads)}
        self.tokens = torch.tensor([[head[-1] for head in heads]])  # (1, N)
        self.sees = torch.tensor([[head[: len(other)] == other for other in heads] for head in heads])  # (N, N)
        edges = [(a, number[tuple(label[:j])], label[j]) for a, label in enumerate(ids) for j in range(1, len(label))]
        self.owner, self.nodes, self.nexts = torch.tensor(edges, dtype=torch.long).view(-1, 3).T  # (E,) each

    def scores(self, context: Context, first: Tensor) -> Tensor:
        """Log-likelihood (B, L) of every label; `first` (B, L) of their first tokens."""
        tails = context.branch(self.tokens, self.sees, self.nodes, self.nexts[None]).cpu()  # (B, E)
        return first.index_add(1, self.owner, tails)

    def score_of(self, picked: Tensor, context: Context, first: Tensor) -> Tensor:
        """Log-likelihood (B,) of one label a row, picked (B,)."""
        tokens, width = self.padded[picked], self.padded.shape[1] - 1  # (B, J)
        line = torch.ones(width, width, dtype=torch.bool).tril()
        tails = context.branch(tokens[:, :-1], line, torch.arange(width), tokens[:, 1:]).cpu()  # (B, J-1)
        inside = torch.arange(width) < self.sizes[picked, None] - 1  # (B, J-1)
        return first.gather(1, picked[:, None])[:, 0] + tails.where(inside, 0).sum(-1)


def choose(model: nn.Module, prompts: Sequence[list[int]], labels: Sequence[list[int]], batch_size: int) -> list[int]:
    """The index of the label of highest log-likelihood after each prompt; the first of equals."""
    check_lengths(model, prompts, max(map(len, labels)))
    table, best = Labels(labels), [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with inference(model):
        prefix, size = shared_prefix(model, prompts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            context = prefix.select([0] * len(batch))
            logits = context.extend([prompts[i][size:] for i in batch])  # (B, V)
            first = logits.log_softmax(-1).cpu()[:, table.padded[:, 0]]  # (B, L)
            for i, label in zip(batch, _likeliest(context, first, table), strict=True):
                best[i] = label
    return best


def _likeliest(context: Context, first: Tensor, labels: Labels) -> list[int]:
    """The favourite of each row by first token, unless another label can still beat it: then all are scored."""
    bound, best = first.max(-1)  # (B,), (B,)
    if labels.padded.shape[1] > 1:
        bound = labels.score_of(best, context, first)  # no label's score is above that of its first token
        rivals = (first >= bound[:, None]).scatter(1, best[:, None], False)  # (B, L)
        rows = rivals.any(-1).nonzero()[:, 0]  # (b,)
        if len(rows):
            best[rows] = labels.scores(context.select(rows.tolist()), first[rows]).argmax(-1)
    return best.tolist()
