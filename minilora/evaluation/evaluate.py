r"""Evaluation on held-out rows: loss, greedy answers against the reference, the likeliest label.

loss           = Σ over supervised tokens of -log p(token) / their number
perplexity     = exp(loss)
label_accuracy = share of rows whose label of highest likelihood is the reference

A row with a prompt is read once for all three (read_once.py). A plain text has a loss only.

An answer is compared with the text that training would supervise for its row. A chat template may
write more than the row's answer, as Qwen3 does: `<think>\n\n</think>\n\nyes` for "yes". The metrics
see answer and reference without the template's additions at the beginning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from minilora.common import unwrap_model
from minilora.data.chat_template import as_trained, with_template_kwargs
from minilora.data.dataset import encode_dataset
from minilora.data.formats import Chat, RawText, as_messages
from minilora.data.loss_mask import IGNORE, Example, encode_row
from minilora.data.prompt import encode_prompt, split_prompt
from minilora.data.read_rows import read_dataset
from minilora.evaluation.likeliest_label import Labels
from minilora.evaluation.metrics import Metric, exact_match, metric_functions
from minilora.evaluation.read_once import PromptedRow, Readings, can_forget, read_once
from minilora.evaluation.scores import ScoredRow, Scores
from minilora.generation.generate import check_lengths, end_tokens, generate_ids
from minilora.generation.sampling import Decoding
from minilora.losses.sft import mean_loss

MAX_NEW_TOKENS = 32  # default length of an answer
RECURRENT_ROWS = 16  # default of rows at a time, for answers of a model with a recurrent state
OWN_FIELDS = ("label_accuracy", "exact_match", "token_f1")  # metrics that are fields of Scores


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    *,
    labels: Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    metrics: Mapping[str, Metric] | Sequence[str] | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Scores:
    """Score a model on the rows of a dataset.

    Rows of plain text have a loss and a perplexity only.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        dataset: rows, or a file of rows: anything that `train` takes.
        labels: the closed set of answers; adds `label_accuracy`. Every row's reference must be one
            of them. None leaves it out.
        max_new_tokens: longest greedy answer in tokens; 0 generates no answers, and so measures no
            exact match, F1 or `metrics`.
        batch_size: rows of the greatest length in one forward pass, and more of shorter ones. None
            takes rows of 4,096 tokens together. It changes no result.
        metrics: metrics of the greedy answers. None measures exact match and token F1. Names, in a
            list or separated by commas ("exact_match", "token_f1" or "f1", "json_valid",
            "pass_at_1"), measure these alone. A dict adds functions (prediction, reference) ->
            number by name. Each is averaged over the rows.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`. None takes
            those that the active adapter was trained with.

    Returns:
        The figures and the answers.

    Raises:
        ValueError: a row exceeds the context or has no supervised token, a reference is not a
            label, or a metric has the name of another figure.
    """
    model = unwrap_model(model)
    rows = read_dataset(dataset)
    measured = metric_functions(metrics)
    check_arguments(metrics, max_new_tokens, batch_size)
    tokenizer = as_trained(tokenizer, chat_template_kwargs, model)
    examples = _encode(model, tokenizer, rows)
    questions = _questions(rows, examples, tokenizer)
    if not questions and (labels is not None or metrics):
        raise ValueError(
            "labels and metrics need rows with a prompt and an answer, and these are plain texts"
        )
    table = None
    if labels is not None:
        first = questions[0]
        ids = label_table(labels, first.tokenizer, first.prompt, len(first.ids))
        _check_references(questions, ids, labels, tokenizer)
        table = Labels(ids)
    rule = None
    if max_new_tokens:
        ends = end_tokens(model, tokenizer)
        rule = Decoding(max_new_tokens, ends=ends, batch_size=batch_size or RECURRENT_ROWS)
    asked = []
    if labels is not None or max_new_tokens:
        asked = questions
    read = _read(model, examples, asked, batch_size, table, rule)
    figures: dict[str, Any] = {}
    values: dict[str, list[float]] = {}  # of each row, by metric
    if labels is not None:
        choices = [labels[index] for index in read.choices]
        figures["choices"] = choices
        pairs = [(choice, q.answer) for choice, q in zip(choices, questions, strict=True)]
        values["label_accuracy"] = [exact_match(*pair) for pair in pairs]
    if max_new_tokens and questions:
        answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in read.answers]
        figures["predictions"] = answers
        pairs = [q.compared(answer) for q, answer in zip(questions, answers, strict=True)]
        for name, metric in measured.items():
            values[name] = [metric(*pair) for pair in pairs]
    loss = read.loss_sum / read.tokens
    return Scores(
        n=len(rows),
        tokens=read.tokens,
        loss=loss,
        perplexity=math.exp(loss),
        answers=len(questions),
        references=[question.reference for question in questions],
        rows=_scored_rows(questions, figures, values),
        **figures,
        **_means(values),
    )


def _read(
    model: Any,
    examples: Sequence[Example],
    asked: Sequence["_Question"],
    batch_size: int | None,
    labels: Labels | None,
    rule: Decoding | None,
) -> Readings:
    """Read every row once: the `asked` ones in a KV cache, the others for their loss only.

    A model with a recurrent state reads a row twice: it cannot forget a reference.
    """
    readings = Readings()
    if asked and labels is None and not can_forget(model):
        if rule is not None:
            readings.answers = generate_ids(model, [question.ids for question in asked], rule)
        asked = []
    if asked:
        prompted = [PromptedRow.of(question.example, question.ids) for question in asked]
        readings = read_once(model, prompted, batch_size, labels, rule)
    numbers = {question.example.row for question in asked}
    others = [example for example in examples if example.row not in numbers]
    if others:
        loss, tokens = mean_loss(model, others, batch_size)
        readings.loss_sum += loss * tokens
        readings.tokens += tokens
    return readings


def _means(values: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return the means over the rows, as fields of `Scores`."""
    means = {name: math.fsum(column) / len(column) for name, column in values.items()}
    own = {name: means.pop(name) for name in OWN_FIELDS if name in means}
    return {**own, "metrics": means}


def _scored_rows(
    questions: Sequence["_Question"],
    figures: Mapping[str, list[str]],
    values: Mapping[str, list[float]],
) -> list[ScoredRow]:
    """Return each row with its answer, its likeliest label and its value of each metric."""
    nothing = [None] * len(questions)
    answers = figures.get("predictions", nothing)
    choices = figures.get("choices", nothing)
    rows = []
    for number, question in enumerate(questions):
        row = ScoredRow(
            row=question.example.row,
            prompt=question.prompt,
            expected=question.reference,
            got=answers[number],
            choice=choices[number],
            scores={name: column[number] for name, column in values.items()},
        )
        rows.append(row)
    return rows


def check_rows(model: Any, tokenizer: Any, rows: Sequence[Any]) -> None:
    """Raise the errors that `evaluate` would raise for these rows, without running the model.

    Args:
        model: a minilora or transformers model.
        tokenizer: the model's tokenizer.
        rows: rows with a prompt and an answer.

    Raises:
        ValueError: a row exceeds the context or leaves no room for an answer, has no supervised
            token, or its answer is not a text; or no row has a prompt and an answer.
    """
    questions = _questions(rows, _encode(model, tokenizer, rows), tokenizer)
    if not questions:
        raise ValueError(
            "eval_metrics need rows with a prompt and an answer, and the first eval rows are plain "
            "texts. Leave eval_metrics out, or give prompt/completion or messages rows."
        )
    prompts = [question.ids for question in questions]
    check_lengths(model, prompts, MAX_NEW_TOKENS)


@dataclass(frozen=True)
class _Question:
    """A row with a prompt and a reference answer.

    Attributes:
        example: the row as tokens and labels.
        prompt: messages, or raw text.
        ids: token ids of the prompt.
        answer: text of the row's answer.
        trained: the supervised text of that answer, without special tokens.
        tokenizer: the tokenizer, with the row's variables of the template.
    """

    example: Example
    prompt: Any
    ids: list[int]
    answer: str
    trained: str
    tokenizer: Any

    @property
    def reference(self) -> str:
        """The row's answer, or the supervised text if the template writes more or other text."""
        return self.answer if self.trained.strip() == self.answer.strip() else self.trained

    def compared(self, answer: str) -> tuple[str, str]:
        """Return an answer and its reference as the metrics see them.

        Text that the template adds in front of the row's answer is taken off both. So an answer
        without it, such as "yes" alone, is right too.

        Args:
            answer: a generated answer.
        """
        reference = self.reference.strip()
        own = self.answer.strip()
        added = reference.removesuffix(own).strip()
        if not added or not reference.endswith(own):
            return answer, self.reference
        return answer.strip().removeprefix(added), self.answer


def check_arguments(metrics: Any, max_new_tokens: int, batch_size: int | None) -> None:
    """Check what can be known of an evaluation without its model and its rows.

    The command line calls it before it loads the model.

    Args:
        metrics: as in `evaluate`.
        max_new_tokens: longest answer in tokens.
        batch_size: rows in one pass, or None.

    Raises:
        ValueError: a number is out of range, or a metric has the name of a field of Scores.
    """
    taken = set()
    if isinstance(metrics, Mapping):
        taken = {field.name for field in fields(Scores)} & metrics.keys()
    if taken:
        raise ValueError(f"metrics: {sorted(taken)} are measured already; choose other names")
    too_small = batch_size is not None and batch_size < 1
    if too_small or max_new_tokens < 0 or (metrics and not max_new_tokens):
        raise ValueError(
            "expected batch_size >= 1 and max_new_tokens >= 0 (>= 1 with metrics), got "
            f"{batch_size}, {max_new_tokens}"
        )


def _encode(model: Any, tokenizer: Any, rows: Sequence[Any]) -> Sequence[Example]:
    """Return one example a row; a row that cannot be scored whole is an error."""
    context_length = getattr(model.config, "max_position_embeddings", None)
    encoded = encode_dataset(rows, tokenizer, context_length)
    unusable = sorted({*encoded.report.truncated, *encoded.report.untrained})
    if unusable:
        raise ValueError(
            f"rows {unusable[:8]} have no trained token or exceed the context of {context_length} "
            f"tokens: {encoded.report}"
        )
    return encoded.examples


def _questions(rows: Sequence[Any], examples: Sequence[Example], tokenizer: Any) -> list[_Question]:
    """Return the rows that have a prompt and an answer; plain texts have neither."""
    questions = []
    for row, example in zip(rows, examples, strict=True):
        sample = as_messages(row, example.row)
        if not isinstance(sample, Chat) and not sample.prompt:
            continue
        prompt, answer = split_prompt(row, example.row)
        reader = tokenizer
        if isinstance(sample, Chat):
            reader = with_template_kwargs(tokenizer, sample.chat_template_kwargs)
        ids = encode_prompt(prompt, reader)
        trained = reader.decode(_answer_ids(example, len(ids)), skip_special_tokens=True)
        questions.append(_Question(example, prompt, ids, answer, trained, reader))
    return questions


def _check_references(
    questions: Sequence[_Question], table: list[list[int]], labels: Sequence[str], tokenizer: Any
) -> None:
    """Raise ValueError for a row whose reference is not one of the labels."""
    for question in questions:
        ids = _answer_ids(question.example, len(question.ids))
        if ids not in table:
            raise ValueError(
                f"row {question.example.row}: its answer {tokenizer.decode(ids)!r} is not one of "
                f"the labels {list(labels)}, or its tokens differ from those after the first row's "
                "prompt: let all prompts end alike"
            )


def label_table(labels: Sequence[str], tokenizer: Any, prompt: Any, size: int) -> list[list[int]]:
    """Return the token ids that training would supervise for each label as the answer to a prompt.

    Args:
        labels: the allowed answers.
        tokenizer: the model's tokenizer.
        prompt: messages, or raw text.
        size: tokens of the prompt.

    Returns:
        Token ids of each label, end of turn included.

    Raises:
        ValueError: there are fewer than two labels, or two of them have the same tokens.
    """
    table = []
    for label in labels:
        row: dict[str, Any] = {"prompt": str(prompt), "completion": label}
        if not isinstance(prompt, RawText):
            row = {"messages": [*prompt, {"role": "assistant", "content": label}]}
        table.append(_answer_ids(encode_row(row, tokenizer), size))
    distinct = {tuple(ids) for ids in table}
    if len(table) < 2 or len(distinct) < len(table):
        raise ValueError(
            f"labels: expected at least two, no two of them the same tokens, got {list(labels)}"
        )
    return table


def _answer_ids(example: Example, start: int) -> list[int]:
    """Return the last answer's tokens, from `start` to its last supervised one."""
    supervised = [i for i, label in enumerate(example.labels) if label != IGNORE]
    return example.input_ids[start : supervised[-1] + 1]
