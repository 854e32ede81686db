"""Tests of the distillation objectives.

The divergences equal torch's `F.kl_div`, in both directions and over the k most likely tokens.
Training is as exact as with the other objectives. The teacher gets no gradient, and the logits of a
whole batch never exist at once.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend

import minilora as ml
from helpers.chats import ours
from helpers.objective_laws import check_eval_batches, check_resume, check_splits, stirred
from helpers.toy import FAST, Letters, Wrapped, adapters, llama, lora, rows
from minilora.data import Tokenizer
from minilora.losses.distillation import divergence
from minilora.losses.sft import token_loss
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora_kernels.ops import cross_entropy

KINDS = [
    {},
    {"kind": "reverse"},
    {"top_k": 5, "temperature": 2.0},
    {"kind": "reverse", "top_k": 3, "alpha": 0.25},
]


def logits(seed: int, V: int = 30) -> torch.Tensor:
    return 3 * torch.randn(7, V, generator=torch.Generator().manual_seed(seed))


def batch_of(objective, count: int = 6) -> dict[str, torch.Tensor]:
    return objective.collate(objective.encode(rows(count), Letters(), 64)[:count])


# ---- oracle


def test_forward_and_reverse_are_torchs():
    student, teacher = logits(0), logits(1)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(student, teacher, "forward"), forward)
    torch.testing.assert_close(divergence(student, teacher, "reverse"), reverse)
    assert (forward - reverse).abs().min() > 1e-3


@pytest.mark.parametrize("k", [1, 4, 30, 99])
def test_top_k_as_documented(k):
    """The teacher is renormalised over its k tokens; the student only in the reverse divergence."""
    student, teacher = logits(0), logits(1)
    kept = teacher.argsort(-1, descending=True)[:, :k]
    p = teacher.softmax(-1).gather(1, kept)
    p, q = p / p.sum(-1, keepdim=True), student.softmax(-1).gather(1, kept)
    share = q / q.sum(-1, keepdim=True)
    forward = F.kl_div(q.log(), p, reduction="none").sum(-1)
    reverse = F.kl_div(p.log(), share, reduction="none").sum(-1)
    torch.testing.assert_close(
        divergence(student, teacher, "forward", k), forward, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        divergence(student, teacher, "reverse", k), reverse, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["ours", "logits"])
def test_the_loss_is_the_formula_over_whole_logits(kind):
    student, teacher = stirred(lora()), llama(seed=3)
    wrap = Wrapped if kind == "logits" else lambda model: model
    objective = ml.Distill(wrap(teacher), temperature=2.0, alpha=0.7)
    batch = batch_of(objective)
    mask = (batch["labels"] != -100)[:, 1:]
    q, p = (model(batch["input_ids"])[:, :-1][mask] for model in (student, teacher))  # (N, V)
    kl = F.kl_div(
        (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), reduction="sum", log_target=True
    )
    nll = F.cross_entropy(q, batch["input_ids"][:, 1:][mask], reduction="sum")
    loss, sums = objective.loss(wrap(student), batch)
    assert loss.item() == pytest.approx((0.7 * 4 * kl + 0.3 * nll).item(), rel=1e-5)
    assert sums["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert sums["cross_entropy"].item() == pytest.approx(
        token_loss(student, batch)[0].item(), rel=1e-5
    )


def test_kl_to_base_is_the_formula_over_whole_logits():
    model = stirred(lora(targets=["q_proj", "down_proj"]))
    objective = ml.KLToBase(kl_weight=0.5)
    batch = batch_of(objective)
    mask = (batch["labels"] != -100)[:, 1:]
    q, p = (m(batch["input_ids"])[:, :-1][mask].log_softmax(-1) for m in (model, llama()))
    kl = F.kl_div(p, q, reduction="sum", log_target=True)
    loss, sums = objective.loss(model, batch)
    assert loss.item() == pytest.approx((token_loss(model, batch)[0] + 0.5 * kl).item(), rel=1e-5)
    assert sums["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert ml.KLToBase(kl_weight=0).loss(model, batch)[0].item() == pytest.approx(
        token_loss(model, batch)[0].item()
    )
    # An untrained adapter gives the base's output, bit for bit.
    assert objective.loss(lora(), batch)[1]["kl"] == 0


def test_kl_to_base_switches_off_an_adapter_on_the_head():
    model = stirred(lora(llama(tie_word_embeddings=False), targets=["lm_head"]))
    batch = batch_of(ml.KLToBase())
    mask = (batch["labels"] != -100)[:, 1:]
    q = model(batch["input_ids"])[:, :-1][mask].log_softmax(-1)
    with ml.disable_adapters(model):
        p = model(batch["input_ids"])[:, :-1][mask].log_softmax(-1)
    expected = F.kl_div(p, q, reduction="sum", log_target=True)
    assert ml.KLToBase().loss(model, batch)[1]["kl"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


# ---- properties


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_gradient_and_evaluation_do_not_depend_on_the_split(fields):
    objective = ml.Distill(llama(seed=3), **fields)
    check_splits(stirred(lora()), objective, rows(7))
    check_eval_batches(stirred(lora()), objective, rows(7))


def test_kl_to_base_does_not_depend_on_the_split():
    check_splits(stirred(lora()), ml.KLToBase(), rows(7))
    check_eval_batches(stirred(lora()), ml.KLToBase(), rows(7))


@pytest.mark.parametrize("kind", ["distill", "kl_to_base"])
def test_a_resumed_run_is_one_that_never_stopped(kind, tmp_path):
    objective = ml.Distill(llama(seed=3)) if kind == "distill" else ml.KLToBase()
    check_resume(lambda: lora(dropout=0.1), objective, rows(8), tmp_path)


def test_logits_exist_for_a_chunk_at_a_time_and_chunks_change_nothing(monkeypatch):
    model, objective = stirred(lora()), ml.Distill(llama(seed=3))
    batch = batch_of(objective)
    whole, _ = objective.loss(model, batch)
    seen = []
    for head in (model.lm_head, objective.teacher.lm_head):
        head.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 131 * 4)
    chunked, _ = objective.loss(model, batch)
    chunked.backward()
    assert max(seen) == 4 and chunked.item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_teacher_is_read_in_eval_mode_and_learns_nothing():
    teacher = stirred(lora(llama(seed=3), dropout=0.5)).train()
    before = adapters(teacher)
    student = lora()
    result = train(
        student,
        Letters(),
        rows(),
        TrainConfig(**FAST),
        objective=ml.Distill(teacher),
        eval_dataset=rows(5),
    )
    assert result.metrics["kl"][-1] < result.metrics["kl"][0] and 0 < result.evals[-1]["eval_kl"]
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], p) for name, p in adapters(teacher).items())
    batch = batch_of(ml.SFT())
    once, again = (ml.Distill(teacher).loss(student, batch)[0] for _ in range(2))
    assert torch.equal(once, again)  # no dropout


def test_a_4_bit_student_comes_closer_to_its_unquantised_base():
    from minilora.quant.quantize_model import quantize_model

    student = llama(hidden_size=64, intermediate_size=64)
    quantize_model(student)
    lora(student)
    objective = ml.Distill(llama(hidden_size=64, intermediate_size=64))
    result = train(
        student, Letters(), rows(), TrainConfig(**FAST | {"max_steps": 12}), objective=objective
    )
    assert result.losses[-1] < 0.7 * result.losses[0]


# ---- vocabularies


def padded_head(rows: int, seed: int = 3):
    """Return a model whose embedding and head have further rows, which no token uses."""
    model = llama(seed=seed)
    for name in ("model.embed_tokens", "lm_head"):
        layer = model.get_submodule(name)
        weight = torch.cat([layer.weight.data, torch.randn(rows, 32)])
        layer.weight = torch.nn.Parameter(weight)
    return model


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_padding_of_the_teacher_or_the_student_changes_no_divergence(kind):
    """Qwen2.5 0.5B has 151936 rows and 7B has 152064, for one tokenizer."""
    exact, padded = ml.Distill(llama(seed=3), kind=kind), ml.Distill(padded_head(128), kind=kind)
    batch = batch_of(exact)
    batch_of(padded)
    expected, _ = exact.loss(llama(), batch)
    assert padded.loss(llama(), batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    found = exact.loss(padded_head(64, seed=0), batch)[1]["kl"].item()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    result = train(lora(), Letters(), rows(), TrainConfig(**FAST), objective=padded)
    assert result.metrics["kl"][-1] < result.metrics["kl"][0]


def test_more_than_padding_is_another_tokenizer():
    objective = ml.Distill(padded_head(600))
    batch = batch_of(objective)
    with pytest.raises(
        ValueError, match="has 731 tokens, the student's 131, and the tokenizer 131"
    ):
        objective.loss(llama(), batch)


def teacher_in(folder, tokenizer):
    """Return a model that names a folder with this tokenizer as its source."""
    tokenizer.save_pretrained(folder)
    model = llama()
    model.name_or_path = str(folder)
    return model


def swapped(tokenizer, first: str, second: str):
    """Return the tokenizer with the ids of two tokens exchanged."""
    state = json.loads(tokenizer.backend.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return Tokenizer(Backend.from_str(json.dumps(state)), tokenizer.special_tokens)


def test_a_teacher_with_another_tokenizer_of_equal_size_is_refused(tmp_path):
    mine = ours("chatml")
    other = ml.Distill(teacher_in(tmp_path / "other", swapped(mine, "x", "y")))
    with pytest.raises(
        ValueError, match=r"another tokenizer: id \d+ is '[xy]' there.*2 of \d+ ids"
    ):
        other.encode(rows(4), mine, 64)
    same = ml.Distill(teacher_in(tmp_path / "same", mine))
    same.encode(rows(4), mine, 64)
    assert same.token_range == (len(mine), len(mine) + sys.maxsize)
    same.encode(rows(4), Letters(), 64)  # its tokens cannot be listed
    assert same.token_range == (131, 131 + 512)


def test_a_renamed_special_token_is_the_same_tokenizer(tmp_path):
    mine = ours("chatml")
    state = json.loads(mine.backend.to_str().replace("<|im_start|>", "<|begin|>"))
    renamed = Tokenizer(Backend.from_str(json.dumps(state)), mine.special_tokens)
    ml.Distill(teacher_in(tmp_path, renamed)).encode(rows(4), mine, 64)


def test_a_teacher_from_a_folder_without_a_tokenizer_is_accepted(tmp_path):
    teacher = llama(seed=3)
    for source in (str(tmp_path), str(tmp_path / "none"), "nobody/cached-nowhere"):
        teacher.name_or_path = source
        assert len(ml.Distill(teacher).encode(rows(4), ours("chatml"), 64)) == 4


# ---- errors


def test_errors():
    small = llama(seed=3)
    small.lm_head = torch.nn.Linear(32, 50, bias=False)
    batch = batch_of(ml.SFT())
    with pytest.raises(ValueError, match="its vocabulary has 50 tokens, the student's 131"):
        ml.Distill(small).loss(llama(), batch)
    with pytest.raises(ValueError, match="without its adapter, and this model has no adapter"):
        ml.KLToBase().loss(llama(), batch)
    for fields in ({"temperature": 0}, {"alpha": 1.5}, {"kind": "sideways"}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ml.Distill(small, **fields)
    with pytest.raises(ValueError, match="kl_weight"):
        ml.KLToBase(kl_weight=-1.0)
