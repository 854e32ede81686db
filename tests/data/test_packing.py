"""Tests of packing: a packed document gives the logits and gradients of the document alone.

The bins are tested in test_best_fit.py. Oracle: the document alone, for every family and option of
the decoder, sliding windows, fp32 and bf16, with and without gradient checkpointing, and for models
of transformers. Properties: no mask is built, and every example is trained once per epoch. Round
trip: a packed batch is split into its documents. Errors: models whose documents attend to each
other.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.bounds import assert_rounded, attention_sizes, rounding
from helpers.tiny import KINDS, oracle, tokens, twin
from helpers.toy import FAST, Letters, Wrapped, adapters, llama, lora, relative, rows
from minilora.data import Example, encode_dataset
from minilora.data.packing import join
from minilora.losses.sft import SFT, padded, token_loss, trained_tokens
from minilora.training.checks import check_packing
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora_kernels.ops.attention import (
    Documents,
    attention,
    causal_mask,
    document_runs,
    plain_attention,
)
from tests.lora.test_transformers_models import adapted, build
from tests.ops.test_attention import heads

SIZES = [[7, 1, 12, 3], [9, 2]]  # lengths of the documents of two rows; the second has padding
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())


def batch_of(sizes: list[list[int]]) -> tuple[list[list[Example]], dict[str, Tensor]]:
    """Return random documents of which all tokens are trained, and their packed batch."""
    documents = [
        [tokens(1, n, seed=10 * r + d)[0].tolist() for d, n in enumerate(row)]
        for r, row in enumerate(sizes)
    ]
    examples = [[Example(ids, [-100, *ids[1:]]) for ids in row] for row in documents]
    return examples, padded([join(row) for row in examples])


def packed_and_alone(model, sizes=SIZES) -> list[tuple[Tensor, Tensor]]:
    """Return (logits in the packed row, logits of the document alone) for every document."""
    examples, batch = batch_of(sizes)
    packed = model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    assert torch.isfinite(packed).all()
    pairs = []
    for row, documents in enumerate(examples):
        start = 0
        for document in documents:
            alone = model(torch.tensor([document.input_ids]))[0]
            pairs.append((packed[row, start : start + len(document)], alone))
            start += len(document)
    return pairs


# ---- oracle: the document alone


@kinds
def test_packed_logits_are_those_of_the_document_alone(fields):
    model = twin(oracle(**fields))
    with torch.no_grad():
        packed, alone = (torch.cat(logits) for logits in zip(*packed_and_alone(model), strict=True))
    bound = rounding(
        model, lambda model: torch.cat([alone for _, alone in packed_and_alone(model)])
    )
    assert_rounded(packed, alone, bound)
    far = twin(oracle(**fields))  # counter-check: without document ids the logits differ
    _, batch = batch_of(SIZES)
    with torch.no_grad():
        joined = far(batch["input_ids"])[0, 8:20] - far(batch["input_ids"][:1, 8:20])
    assert fields.get("sliding_window") == 1 or joined.abs().max() > 0.05


@pytest.mark.parametrize(
    "name", ["llama3", "window 5", "qwen2 window above", "qwen3 window between", "gemma3"]
)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_gradients_are_those_of_the_documents_alone(name, recompute, dtype, bound):
    """Compare the gradients of the summed loss for each parameter, relative to their norm.

    Measured differences: 2e-6 in fp32, 0.024 in bf16.
    """
    model = twin(oracle(**KINDS[name])).train().to(dtype)
    model.gradient_checkpointing = recompute
    examples, batch = batch_of(SIZES)
    found = []
    for batches in ([batch], [padded([e]) for row in examples for e in row]):
        model.zero_grad()
        losses = [token_loss(model, b)[0] for b in batches if trained_tokens(b)]
        torch.stack(losses).sum().backward()
        assert sum(map(trained_tokens, batches)) == sum(n - 1 for row in SIZES for n in row)
        found.append((sum(losses).item(), {n: p.grad.float() for n, p in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=bound)
    assert relative(found[0][1], found[1][1]) <= bound


@pytest.mark.parametrize("name", ["llama3", "window 5", "qwen2", "qwen3 window between", "gemma3"])
def test_packed_logits_in_bf16_are_within_two_roundings(name):
    """The bound is two roundings of the largest logit.

    Measured: equal bits. Other kernels may add in another order.
    """
    model = twin(oracle(**KINDS[name])).bfloat16()
    with torch.no_grad():
        for packed, alone in packed_and_alone(model):
            assert (packed - alone).abs().max() <= 2 * 2**-8 * alone.abs().max()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_document_by_document_equals_the_mask(window, dtype):
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, -1, -1]])
    runs = document_runs(ids)
    assert runs == [(4, True), (1, True), (4, True), (2, True), (5, True), (2, False)]
    wide = {} if window is None else {n: causal_mask(n, n, window=window) for n in (4, 5)}
    whole = causal_mask(9, 9, window=window, document_ids=ids)
    grad = heads(2, 9, 9, seed=1)[0].detach().where((ids >= 0)[:, None, :, None], 0)
    results = []
    for form, mask in ((attention, Documents(runs, wide)), (plain_attention, whole)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in heads(2, 9, 9)]
        out = form(*inputs, mask).where((ids >= 0)[:, None, :, None], 0)
        out.backward(grad.to(dtype))
        results.append([out, *(x.grad for x in inputs)])
    sizes = attention_sizes(*inputs, grad, whole)
    for found, plain, size in zip(*results, sizes, strict=True):
        # Each of the two implementations may be off by eps/2.
        assert ((found - plain).abs() <= torch.finfo(dtype).eps * size).all()


def test_a_mask_is_built_only_for_documents_longer_than_the_window(monkeypatch):
    made = []

    def counted(*sizes, **options):
        made.append(sizes)
        return causal_mask(*sizes, **options)

    for module in ("minilora.models.masks", "minilora_kernels.ops.attention"):
        monkeypatch.setattr(f"{module}.causal_mask", counted)
    for name, expected in [("llama", set()), ("gemma3", {(7, 7), (12, 12), (9, 9)})]:
        made.clear()
        with torch.no_grad():
            packed_and_alone(twin(oracle(**KINDS[name])), SIZES)
            alone = [(n, n) for row in SIZES for n in row if n > 5 and name == "gemma3"]
        assert set(made) == expected and len(made) == len(expected) + len(alone)


def test_a_document_id_that_returns_is_the_same_document():
    model, ids = twin(oracle()), tokens(1, 6)
    documents = torch.tensor([[0, 1, 0, 0, 1, 0]])
    assert document_runs(documents) is None
    with torch.no_grad():
        found = model(ids, document_ids=documents)[0, 3]
        mask = causal_mask(6, 6, document_ids=documents)
        assert torch.equal(found, model.lm_head(model.hidden(ids, mask=mask))[0, 3])


# ---- training


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_training_packed_equals_training_alone(kind, capsys):
    """All rows are in one step, packed or not.

    The tokens and the divisor are the same, so the first loss and the trained adapter are the same.
    """
    results, trained = [], []
    for packing in (True, False):
        model = lora() if kind == "ours" else adapted(build("phi3"), "phi3")
        config = TrainConfig(packing=packing, max_length=40, per_device_train_batch_size=24, **FAST)
        results.append(train(model, Letters(), rows(), config))
        trained.append(adapters(model))
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-4)  # five steps of Adam
    assert results[0].losses[0] == pytest.approx(results[1].losses[0], rel=1e-6)
    assert results[0].tokens == results[1].tokens and relative(*trained) < 1e-2
    assert (
        "packing: 24 examples in 9 rows of 40 tokens, 6.1% of them padding\n"
        in capsys.readouterr().out
    )


def test_packing_trains_every_example_once_per_epoch(monkeypatch):
    seen, real = [], SFT.collate
    monkeypatch.setattr(SFT, "collate", lambda self, batch: seen.extend(batch) or real(self, batch))
    config = TrainConfig(
        packing=True, max_length=30, num_train_epochs=2, per_device_train_batch_size=4
    )
    train(lora(), Letters(), rows(23), config)
    expected = sorted(e.input_ids for e in encode_dataset(rows(23), Letters(), 30)) * 2
    found = []
    for row in seen:
        ends = [0, *itertools.accumulate(size for _, size in row.documents)]
        found += [row.input_ids[a:b] for a, b in itertools.pairwise(ends)]
    assert sorted(found) == sorted(expected)


def test_a_loss_that_is_not_finite_names_the_rows_of_its_packed_row():
    model = lora()
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * float("nan"),))
    with pytest.raises(
        ValueError, match=r"step 1: the loss of rows 0, 1, 2, 3, 4, 5, 6, 7, … is nan"
    ):
        config = TrainConfig(packing=True, max_length=40, per_device_train_batch_size=9, **FAST)
        train(model, Letters(), rows(), config)


def test_a_run_resumes_only_with_the_same_packing(tmp_path):
    config = {"output_dir": tmp_path, "max_length": 40, **FAST}
    whole = train(
        lora(),
        Letters(),
        rows(),
        TrainConfig(packing=True, **config | {"output_dir": None, "max_steps": 8}),
    )
    short = TrainConfig(packing=True, lr_scheduler_type="constant", **config)
    first = train(lora(), Letters(), rows(), short)
    more = {
        **config,
        "max_steps": 8,
        "resume_from_checkpoint": "last",
        "lr_scheduler_type": "constant",
    }
    for fields, message in [
        ({}, "samples was 9, is 24"),
        ({"packing": True, "max_length": 48}, "packing was 40, is 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(lora(), Letters(), rows(), TrainConfig(**more | fields))
    again = train(lora(), Letters(), rows(), TrainConfig(packing=True, **more))
    assert again.losses[:5] == first.losses and again.steps == whole.steps == 8


# ---- round trip


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_packed_batch_contains_its_documents(sizes):
    examples, batch = batch_of(sizes)
    assert set(batch) == {"input_ids", "labels", "position_ids", "document_ids"}
    for row, documents in enumerate(examples):
        ids = batch["document_ids"][row]
        for number, document in enumerate(documents):
            here = ids == number
            assert batch["input_ids"][row][here].tolist() == document.input_ids
            assert batch["labels"][row][here].tolist() == document.labels
            assert batch["position_ids"][row][here].tolist() == list(range(len(document)))
        padding = ids == -1
        assert padding.sum() == len(ids) - sum(map(len, documents))
        assert (batch["labels"][row][padding] == -100).all()
        assert batch["position_ids"][row][padding].tolist() == list(range(int(padding.sum())))


def test_the_first_token_of_each_document_is_not_trained():
    row = join([Example([5, 6], [5, 6]), Example([7, 8], [7, 8])])
    assert row.labels == [-100, 6, -100, 8]


# ---- models of transformers, errors


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_models_that_use_position_ids_pass_the_probe(implementation, dtype):
    for fields in (KINDS["llama"], KINDS["qwen3"], KINDS["gemma3"]):
        model = oracle(**fields).to(dtype).train()
        model.set_attn_implementation(implementation)
        check_packing(model)
        assert model.training
    check_packing(build("gpt2").to(dtype))  # learned position embeddings


class NoPositions(Wrapped):
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids)


@pytest.mark.parametrize("kind", [Wrapped, NoPositions])
def test_a_model_whose_documents_attend_to_each_other_is_refused(kind):
    with pytest.raises(
        ValueError, match=f"packing: {kind.__name__} lets packed documents see each other"
    ):
        check_packing(kind(llama()))


def test_a_model_that_passes_an_attention_mask_is_refused():
    """With a mask of ones or a cache, transformers ignores document borders in position_ids."""
    model = oracle()
    real = model.forward
    model.forward = lambda ids, **given: real(ids, attention_mask=torch.ones_like(ids), **given)
    with pytest.raises(ValueError, match="LlamaForCausalLM lets packed"):
        check_packing(model)


def test_packing_and_dataset_cache_need_supervised_fine_tuning():
    class Other:
        encode = collate = weight = loss = None

    for fields in ({"packing": True}, {"dataset_cache": "somewhere"}):
        with pytest.raises(
            ValueError, match="belong to supervised fine-tuning; Other has samples of another form"
        ):
            train(lora(), Letters(), rows(), TrainConfig(**fields), objective=Other())
