"""Tests of `Context`: sequences that are extended, selected and branched step by step.

Property: extend, select and branch equal one forward pass over the whole sequence, for our models
and transformers', with padding and windows. A common prefix is read once, and the model stays
unchanged. Logits are about 10: 2e-5 is some thirty fp32 roundings of 6e-7.
"""

import pytest
import torch

from helpers.prompts import pair, ragged
from helpers.tiny import KINDS, RECURRENT, oracle, twin
from minilora.generation.generate import generate_ids
from minilora.generation.sampling import Decoding
from minilora.models.padded_batch import Context, inference, shared_prefix


def test_a_selected_context_leaves_the_first_unchanged():
    """Branches continue without a change of the shared prefix, with logits of whole sequences."""
    for model in pair():
        with inference(model):
            root = Context(model)
            root.extend([[1, 2, 3]])
            two = root.select([0, 0, 0])
            two.extend([[4], [5, 6], [7, 8, 9]])
            late = two.select([2, 0])
            logits = late.extend([[10, 11], [12]])
            again = root.extend([[20]])
            whole = [[1, 2, 3, 7, 8, 9, 10, 11], [1, 2, 3, 4, 12], [1, 2, 3, 20]]
            alone = [Context(model).extend([ids])[0] for ids in whole]
        for got, expected in zip((logits[0], logits[1], again[0]), alone, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


WINDOWS = [
    {},
    {"family": "mistral", "sliding_window": 4},
    KINDS["qwen3 window between"],
    KINDS["gemma3"],
]


@pytest.mark.parametrize(
    "fields", WINDOWS, ids=["none", "in all layers", "in two of three", "gemma3"]
)
def test_a_branch_reads_its_own_path_only(fields):
    """The nodes are A, A B, A B C and D, with padding and windows.

    Each node gives the log-probability of its path alone, and then the context is as before.
    """
    theirs = oracle(**fields)
    models = [theirs, twin(theirs)]
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]).bool()
    paths, nodes, nexts = (
        [[11], [11, 12], [11, 12, 13], [14]],
        torch.tensor([0, 2, 2, 3]),
        torch.tensor([[7, 8, 9, 10]]),
    )
    rows = [[1, 2, 3, 4, 5, 6], [1, 7]]
    for model in models:
        with inference(model):
            context = Context(model)
            context.extend(rows)
            for _ in range(2):  # the first time leaves the context unchanged
                got = context.branch(torch.tensor([[11, 12, 13, 14]]), sees, nodes, nexts)
                whole = [
                    [Context(model).extend([row + paths[n]])[0] for n in nodes] for row in rows
                ]
                expected = [
                    [x.log_softmax(-1)[t] for x, t in zip(xs, nexts[0], strict=True)]
                    for xs in whole
                ]
                torch.testing.assert_close(got, torch.tensor(expected), atol=2e-5, rtol=0)
            after = context.extend([[20], [21]])
            alone = torch.stack(
                [Context(model).extend([r])[0] for r in ([*rows[0], 20], [*rows[1], 21])]
            )
            torch.testing.assert_close(after, alone, atol=2e-5, rtol=0)


def test_a_prefix_shared_by_all_prompts_is_read_once(monkeypatch):
    _, mine = pair()
    read = []
    hidden = mine.hidden
    monkeypatch.setattr(
        mine, "hidden", lambda ids, *rest: (read.append(ids.numel()), hidden(ids, *rest))[1]
    )
    prompts = ragged(2, 2, 2, 2, common=40)  # these differ right after it
    generate_ids(mine, prompts, Decoding(1, batch_size=2))
    assert sum(read) == 40 + 4 * 2
    with inference(mine):
        _, size = shared_prefix(mine, [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]])
    assert size == 2  # at least one token of each is left


@pytest.mark.parametrize("sizes", [(5, 3, 4), (5,)], ids=["rows", "one row"])
def test_the_head_is_not_copied_for_each_row(sizes):
    """PyTorch multiplies a strided (B, 1, D) by B copies of a weight without grad.

    With a real vocabulary the copies take gigabytes. PyTorch also copies for one row, although that
    counts as contiguous with any stride.
    """
    model = twin(pair()[0]).requires_grad_(False)
    with inference(model), torch.profiler.profile() as profile:
        Context(model).extend(ragged(*sizes))
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}


def test_the_model_is_left_as_it_was():
    _, mine = pair()
    model = twin(pair()[0])
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert generate_ids(model, ragged(4), Decoding(4)) == generate_ids(mine, ragged(4), Decoding(4))
    with pytest.raises(ZeroDivisionError), inference(model):
        assert (
            not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        )
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    with inference(model):
        table = 2 * torch.ones(3)
    # Gradients pass through a tensor that was made inside.
    (table * torch.ones(3, requires_grad=True)).sum().backward()


def test_a_recurrent_state_refuses_a_branch():
    """It cannot forget the branch, and the next tokens would follow it without an error."""
    model = oracle(**RECURRENT)
    with inference(model), pytest.raises(ValueError, match="recurrent layers.*Leave the"):
        context = Context(model)
        context.extend([[1, 2, 3]])
        assert not context.can_forget
        context.branch_all(torch.tensor([[4]]), torch.ones(1, 1, dtype=torch.bool))


def test_a_recurrent_state_shares_no_beginning():
    """It would read the padding between the shared tokens and the rest of a shorter row."""
    model = oracle(**RECURRENT)
    prompts = ragged(3, 9, common=11)
    with inference(model):
        context, size = shared_prefix(model, prompts)
        logits = context.select([0, 0]).extend([prompt[size:] for prompt in prompts])
        for prompt, found in zip(prompts, logits, strict=True):
            alone = model(torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(found, alone, rtol=0, atol=5e-5)
