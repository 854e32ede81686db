"""Rows that are read once, for their loss, their likeliest label and their greedy answer.

    beginning of all prompts     read once for all rows
    the rest of each prompt      read once, into the row's KV cache
    the reference                read after it: log p of its tokens, and the arg-max at each of them
    labels                       read after the prompt, those that may be likelier than the reference
    greedy answer                continued after the last token that the arg-max and the reference
                                 share

The arg-max after the prompt is the first token of the greedy answer. If it is the first token of
the reference, the arg-max after that one is the second token of the answer, and so on. So an answer
that equals its reference needs no further pass. This is speculative decoding with the reference as
the draft (Leviathan et al. 2022, arXiv:2211.17192), and exact, because the answer is greedy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.common import batch_tokens, batches_by_tokens
from minilora.common.progress import ProgressBar
from minilora.data.loss_mask import IGNORE, Example
from minilora.evaluation.likeliest_label import Labels
from minilora.generation.generate import check_lengths, continue_answers, step_by_step
from minilora.generation.sampling import Decoding
from minilora.generation.single_token import matrix_vector
from minilora.models.padded_batch import LOGITS, Context, inference, shared_prefix


@dataclass(frozen=True)
class PromptedRow:
    """A row of a prompt and a reference answer.

    Attributes:
        prompt: token ids of the prompt.
        reference: supervised token ids after it, end of turn included.
        earlier: positions of supervised tokens in the prompt: answers of earlier turns.
    """

    prompt: list[int]
    reference: list[int]
    earlier: list[int]

    @classmethod
    def of(cls, example: Example, prompt: list[int]) -> "PromptedRow":
        """Return the row of an example.

        Args:
            example: the whole row.
            prompt: token ids of its prompt.
        """
        supervised = [i for i, label in enumerate(example.labels) if label != IGNORE]
        start = len(prompt)
        earlier = [i for i in supervised if i < start]
        return cls(prompt, example.input_ids[start : supervised[-1] + 1], earlier)

    @property
    def targets(self) -> list[int]:
        """The supervised tokens, in their order."""
        return [self.prompt[i] for i in self.earlier] + self.reference

    @property
    def unsupervised(self) -> list[int]:
        """The tokens before the first supervised one."""
        return self.prompt[: self.earlier[0]] if self.earlier else self.prompt


@dataclass
class Readings:
    """Results of rows that were read once.

    Attributes:
        loss_sum: sum of -log p over the supervised tokens of all rows.
        tokens: number of these tokens.
        choices: number of the likeliest label of each row; empty without labels.
        answers: token ids of the greedy answer of each row; empty without a rule.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    choices: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


def read_once(
    model: nn.Module,
    rows: Sequence[PromptedRow],
    batch_size: int | None,
    labels: Labels | None = None,
    rule: Decoding | None = None,
) -> Readings:
    """Read rows once; return the sum of their losses, their likeliest labels, their answers.

    Args:
        model: the model.
        rows: the rows.
        batch_size: rows of the greatest length in one forward pass, or None for rows of 4,096
            tokens together; changes no result.
        labels: the closed set of answers, which contains every reference; None chooses none.
        rule: rules of the greedy answers; None generates none.

    Raises:
        ValueError: a prompt and its answer exceed the model's context.
    """
    new_tokens = 0  # of the longest label or answer
    if labels is not None:
        new_tokens = labels.longest
    if rule is not None:
        new_tokens = max(new_tokens, rule.max_new_tokens)
    check_lengths(model, [row.prompt for row in rows], new_tokens)
    lengths = []
    for row in rows:
        lengths.append(len(row.prompt) + max(new_tokens, len(row.reference)))
    batches = batches_by_tokens(lengths, batch_tokens(lengths, batch_size))
    steps: Any = None
    if rule is not None:
        steps = step_by_step(model, rule, max(map(len, batches)))
    choices = [0] * len(rows)
    answers: list[list[int]] = [[] for _ in rows]
    readings = Readings()
    with inference(model), matrix_vector(model), ProgressBar("evaluate", len(rows), "row") as bar:
        prefix, size = shared_prefix(model, [row.unsupervised for row in rows])
        for batch in batches:
            bar.update(0, {"reading": "prompts"})
            batch_rows = [rows[i] for i in batch]
            context = prefix.select([0] * len(batch))
            scored = _read(context, batch_rows, size, labels)
            for one in scored:
                readings.loss_sum -= one.log_p.sum().item()
                readings.tokens += len(one.log_p)
            if labels is not None:
                bar.update(0, {"reading": "labels"})
                chosen = _choose(context, batch_rows, scored, labels)
                for i, choice in zip(batch, chosen, strict=True):
                    choices[i] = choice
            if rule is None:
                bar.update(len(batch))
                continue
            batch_answers = [answers[i] for i in batch]
            ended_by_token = _answer(context, batch_rows, scored, rule, steps, batch_answers)
            for token, ended in enumerate(ended_by_token):
                bar.update(ended, {"token": f"{token}/{rule.max_new_tokens}"})
    if labels is not None:
        readings.choices = choices
    if rule is not None:
        readings.answers = answers
    return readings


def can_forget(model: nn.Module) -> bool:
    """Return whether a model can read the reference of a row, and forget it (`Context.branch`).

    Args:
        model: the model. One of transformers reads one token, which shows its kind of cache.
    """
    context = Context(model)
    if context.native:
        return True
    with inference(model):
        context.extend([[0]])
    return context.can_forget


class _Scored(NamedTuple):
    """The first pass of a row.

    Attributes:
        log_p: log-probability of each of its targets, fp64.
        likeliest: likeliest token in the place of each of them.
        first: log-probability of each label's first token after the prompt, (L,).
    """

    log_p: Tensor
    likeliest: list[int]
    first: Tensor


def _read(
    context: Context, rows: Sequence[PromptedRow], size: int, labels: Labels | None
) -> list[_Scored]:
    """Read prompts, from token `size` on, and references; the context then ends with the prompts."""
    kept = [1 + len(row.prompt) - len(row.unsupervised) for row in rows]
    keep = max(kept)
    prompts = [row.prompt[size:] for row in rows]
    read = context.extend_all(prompts, keep)  # (B, keep, D)
    longest = max([len(row.reference) for row in rows])
    if longest > 1:
        draft = torch.zeros(len(rows), longest - 1, dtype=torch.long)  # (B, J-1)
        for number, row in enumerate(rows):
            draft[number, : len(row.reference) - 1] = torch.tensor(row.reference[:-1])
        line = torch.ones(longest - 1, longest - 1, dtype=torch.bool).tril()  # (J-1, J-1)
        after = context.branch_all(draft, line)  # (B, J-1, D)
        read = torch.cat([read, after], dim=1)  # (B, keep+J-1, D)
    numbers = []  # row and column of the token before each target
    columns = []
    targets = []
    for number, row in enumerate(rows):
        start = keep - len(row.prompt)  # column of the prompt's first token, maybe a lost one
        before = [start + i - 1 for i in row.earlier]
        before += range(keep - 1, keep - 1 + len(row.reference))
        columns += before
        numbers += [number] * len(before)
        targets += row.targets
    hidden = read[numbers, columns]  # (N, D)
    sizes = [len(row.targets) for row in rows]
    found = _through_head(context, hidden, torch.tensor(targets), labels)
    log_p, likeliest, first = [column.split(sizes) for column in found]
    scored = []
    for number, row in enumerate(rows):
        first_of_answer = first[number][len(row.earlier)]  # (L,)
        scored.append(_Scored(log_p[number], likeliest[number].tolist(), first_of_answer))
    return scored


def _through_head(
    context: Context, hidden: Tensor, targets: Tensor, labels: Labels | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(target), fp64, the likeliest token, and log p of labels' first tokens."""
    firsts = torch.tensor([], dtype=torch.long)  # (L,)
    if labels is not None:
        firsts = labels.first
    targets = targets.to(hidden.device)  # (N,)
    firsts = firsts.to(hidden.device)
    chunk = max(1, LOGITS // context.vocabulary)
    log_p = []
    likeliest = []
    first = []
    for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = context.logits(part)  # (n, V)
        total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
        chosen = logits.gather(1, target[:, None])  # (n, 1)
        log_p.append((chosen - total)[:, 0].double())
        likeliest.append(logits.argmax(-1))
        first.append(logits[:, firsts] - total)
    return torch.cat(log_p).cpu(), torch.cat(likeliest).cpu(), torch.cat(first).cpu()


def _choose(
    context: Context, rows: Sequence[PromptedRow], scored: Sequence[_Scored], labels: Labels
) -> list[int]:
    """Return the likeliest label of each row; the score of its reference is known."""
    known = []
    scores = []
    for row, one in zip(rows, scored, strict=True):
        known.append(labels.ids.index(row.reference))
        scores.append(one.log_p[len(row.earlier) :].sum())
    first = torch.stack([one.first for one in scored])  # (B, L)
    return labels.likeliest(context, first, torch.tensor(known), torch.stack(scores).float())


def _answer(
    context: Context,
    rows: Sequence[PromptedRow],
    scored: Sequence[_Scored],
    rule: Decoding,
    steps: Callable[[Context], Any],
    answers: Sequence[list[int]],
) -> Iterator[int]:
    """Fill the empty `answers` of a batch; yield the number of answers that end at a token."""
    unfinished = []
    for number, (row, one) in enumerate(zip(rows, scored, strict=True)):
        likeliest = one.likeliest[len(row.earlier) :]
        if not _follow(row.reference, likeliest, rule, answers[number]):
            unfinished.append(number)
    yield len(rows) - len(unfinished)
    if not unfinished:
        return
    if len(unfinished) < len(rows):
        context = context.select(unfinished)
    begun = [answers[number] for number in unfinished]
    if context.window:
        for answer in begun:
            del answer[1:]  # the rest would need padding in the middle (shared_prefix)
    logits = context.extend(begun)  # (B, V)
    prompts = [rows[number].prompt for number in unfinished]
    yield from continue_answers(steps(context), logits, rule, begun, prompts)


def _follow(
    reference: Sequence[int], likeliest: Sequence[int], rule: Decoding, answer: list[int]
) -> bool:
    """Fill the empty `answer` as far as the reference's pass knows it; return True at its end."""
    for expected, token in zip(reference, likeliest, strict=True):
        if token in rule.ends:
            return True
        answer.append(token)
        if rule.is_complete(answer):
            return True
        if token != expected:
            return False
    return False
