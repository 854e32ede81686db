"""Tests of rows that are read once for their loss, their likeliest label and their greedy answer.

Oracle: three separate ways: the loss of whole rows, one whole sequence a label, `generate_ids`. The
losses may differ by the rounding of two fp32 computations, which is derived in helpers/bounds.py;
choices and answers are equal. Property: every prompt token goes through the model once, and an
answer that equals its reference needs no pass of its own.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.bounds import rounding
from helpers.prompts import EOS, pair, ragged
from helpers.tiny import KINDS, oracle, twin
from minilora.data import IGNORE, Example
from minilora.evaluation.likeliest_label import Labels
from minilora.evaluation.read_once import PromptedRow, read_once
from minilora.generation.generate import generate_ids
from minilora.generation.sampling import Decoding
from minilora.losses.sft import mean_loss

NEW = 6
RULE = Decoding(NEW, ends=frozenset({EOS}), cuda_graph=False)
WINDOWS = {
    "none": {},
    "in all layers": {"family": "mistral", "sliding_window": 4},
    "in two of three": KINDS["qwen3 window between"],
    "gemma3": KINDS["gemma3"],
}


@cache
def models(window: str) -> tuple[nn.Module, nn.Module]:
    """Return a transformers model with this kind of window, and minilora's decoder like it."""
    theirs = oracle(**WINDOWS[window])
    return theirs, twin(theirs)


def rows_of(model: nn.Module, common: int) -> list[PromptedRow]:
    """Return rows whose greedy answers follow the reference not at all, in part, and to its end."""
    prompts = ragged(3, 9, 4, 1, 6, 6, 2, common=common)
    greedy = generate_ids(model, prompts, RULE)
    references = []
    for i, answer in enumerate(greedy):
        reference = [*answer, EOS]
        if i % 3 == 1:
            reference = [*answer[: i // 2], (answer[i // 2] + 1) % 90, 7, EOS]
        if i % 3 == 2:
            reference = [(answer[0] + 1) % 90, EOS][: i // 2]
        references.append(reference)
    return [PromptedRow(p, r, []) for p, r in zip(prompts, references, strict=True)]


def tree_of(rows: Sequence[PromptedRow]) -> Labels:
    """Return the references as labels, and others that begin like them."""
    distinct = {tuple(row.reference) for row in rows}
    distinct |= {(*row.reference[:1], 8, 9, EOS) for row in rows}
    return Labels([list(label) for label in sorted(distinct)])


def log_p(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the log-likelihood of each token of an answer, (J,), by one pass over everything."""
    out: Any = model(torch.tensor([[*prompt, *answer]]))
    logits = getattr(out, "logits", out)[0, len(prompt) - 1 : -1]  # (J, V)
    return -F.cross_entropy(logits, torch.tensor(answer), reduction="none")


def target_log_p(model: nn.Module, rows: Sequence[PromptedRow]) -> Tensor:
    """Return the log-likelihood of every supervised token, (N,)."""
    parts = []
    for row in rows:
        parts += [log_p(model, row.prompt[:i], row.prompt[i : i + 1]) for i in row.earlier]
        parts.append(log_p(model, row.prompt, row.reference))
    return torch.cat(parts).double()


def assert_read_as_three_passes(
    model: nn.Module, rows: Sequence[PromptedRow], *batch_sizes: int, rule: Decoding = RULE
) -> None:
    labels = tree_of(rows)
    scores = []
    with torch.no_grad():
        targets = target_log_p(model, rows)  # (N,)
        for row in rows:
            scores.append([log_p(model, row.prompt, label).sum() for label in labels.ids])
    # A sum of N differences is at most √N times their 2-norm.
    bound = len(targets) ** 0.5 * rounding(model, lambda m: target_log_p(m, rows))
    answers = generate_ids(model, [row.prompt for row in rows], rule)
    for batch_size in batch_sizes:
        found = read_once(model, rows, batch_size, labels, rule)
        assert found.loss_sum == pytest.approx(-targets.sum().item(), abs=bound, rel=0)
        assert found.tokens == sum(len(row.targets) for row in rows)
        assert found.choices == torch.tensor(scores).argmax(-1).tolist()
        assert found.answers == answers


# ---- the three results


@pytest.mark.parametrize("common", [0, 11], ids=["", "shared beginning"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("native", [True, False], ids=["minilora", "transformers"])
def test_results_equal_those_of_three_passes(native, window, common):
    model = models(window)[int(native)]
    rows = rows_of(model, common)
    assert_read_as_three_passes(model, rows, 1, 3, 7)


def test_earlier_turns_count_for_the_loss():
    """The shared beginning stops before the first supervised token of any row."""
    theirs, mine = pair()
    rows = rows_of(mine, 11)
    rows = [PromptedRow(row.prompt, row.reference, [7, 8, 12][:i]) for i, row in enumerate(rows)]
    rows = [row for row in rows if len(row.prompt) > 12]
    for model in (theirs, mine):
        assert_read_as_three_passes(model, rows, 2)


@pytest.mark.parametrize("ends", [frozenset(), frozenset({EOS}), None], ids=["no", "EOS", "own"])
@pytest.mark.parametrize("new", [1, 3, 12])
def test_answers_end_where_generation_ends_them(ends, new):
    """The reference may be shorter or longer than an answer, and have an end token inside."""
    mine = pair()[1]
    rows = rows_of(mine, 0)
    if ends is None:
        ends = frozenset({rows[0].reference[2]})
    rule = Decoding(new, ends=ends, cuda_graph=False)
    assert_read_as_three_passes(mine, rows, 4, rule=rule)


def test_row_of_an_example_has_its_supervised_tokens():
    example = Example([1, 2, 3, 4, 5, 6, 7, 8], [IGNORE, 2, IGNORE, IGNORE, 5, 6, 7, IGNORE])
    row = PromptedRow.of(example, [1, 2, 3, 4])
    assert row == PromptedRow([1, 2, 3, 4], [5, 6, 7], [1])
    assert row.targets == [2, 5, 6, 7] and row.unsupervised == [1]
    mine = pair()[1]
    expected = mean_loss(mine, [example], 1)
    read = read_once(mine, [row], 1)
    assert read.loss_sum / read.tokens == pytest.approx(expected[0], rel=1e-6)
    assert read.tokens == expected[1] and read.choices == read.answers == []


# ---- the work


@pytest.fixture
def read(monkeypatch) -> list[Tensor]:
    """Return a list of the token ids of every pass of minilora's model."""
    mine = pair()[1]
    passes: list[Tensor] = []
    hidden = mine.hidden

    def recorded(input_ids: Tensor, *rest: Any) -> Tensor:
        passes.append(input_ids)
        return hidden(input_ids, *rest)

    monkeypatch.setattr(mine, "hidden", recorded)
    return passes


def count(passes: Sequence[Tensor]) -> int:
    return sum(ids.numel() for ids in passes)


def test_every_prompt_token_is_read_once(read):
    """An answer that equals its reference is read once too, with its loss, except its end."""
    mine = pair()[1]
    prompts = ragged(4, 4, 4, 4, common=20)
    greedy = generate_ids(mine, prompts, RULE)
    assert {len(answer) for answer in greedy} == {NEW}
    rows = [PromptedRow(p, [*a, EOS], []) for p, a in zip(prompts, greedy, strict=True)]
    read.clear()
    found = read_once(mine, rows, 2, None, RULE)
    assert found.answers == greedy
    assert count(read) == 20 + 4 * 4 + 4 * NEW
    sizes = [ids.shape for ids in read]
    assert sizes == [(1, 20), (2, 4), (2, NEW), (2, 4), (2, NEW)]


def test_an_answer_continues_after_the_part_that_it_shares(read):
    mine = pair()[1]
    prompts = ragged(4, 4, common=20)
    greedy = generate_ids(mine, prompts, RULE)
    other = (greedy[0][3] + 1) % 90
    rows = [PromptedRow(p, [*a[:3], other, EOS], []) for p, a in zip(prompts, greedy, strict=True)]
    read.clear()
    assert read_once(mine, rows, 2, None, RULE).answers == greedy
    # The four known tokens of the answer are read in one pass, then one token a pass.
    assert [ids.shape[1] for ids in read] == [20, 4, 4, 4] + [1] * (NEW - 5)


def test_labels_below_the_reference_are_not_read(read):
    mine = pair()[1]
    (prompt,) = ragged(4)
    reference = generate_ids(mine, [prompt], Decoding(3))[0]
    unlikely = int(mine(torch.tensor([prompt]))[0, -1].argmin())
    labels = Labels([reference, [unlikely, 3, 4]])
    read.clear()
    assert read_once(mine, [PromptedRow(prompt, reference, [])], 2, labels).choices == [0]
    assert [ids.shape for ids in read] == [(1, 4), (1, 2)]  # the prompt, and the reference


def test_short_rows_fill_a_batch_by_their_tokens(read):
    mine = pair()[1]
    rows = [PromptedRow(prompt, [3], []) for prompt in ragged(40, *[4] * 20)]
    read_once(mine, rows, 1)
    # 41 tokens a batch: the long row, then eight short ones with their one new token.
    assert [ids.shape for ids in read] == [(1, 40), (8, 4), (8, 4), (4, 4)]
