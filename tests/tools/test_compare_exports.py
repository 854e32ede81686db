"""Proves that `compare_exports` compares every form of a trained model with training.

Forms that only round pass in fp32. A fault put into one form (its weights, its tokenizer, its
cache) makes that form the first different stage.

Oracle: KL and top-1 by their definitions. Errors: no rows, rows without an answer, options without
effect.
"""

import json
import sys

import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from minilora.cli.main import main
from minilora.models.padded_batch import Context
from minilora.tools import compare_exports as module
from minilora.tools.compare_exports import (
    STAGES,
    Answer,
    _compare,
    _logits,
    _served,
    compare_exports,
)

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{a} plus {b}"},
            {"role": "assistant", "content": f"{a + b} " * b},
        ]
    }
    for a in range(2)
    for b in range(1, 4)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write model/, rows.jsonl and adapter/ (q and up, with a B large enough for ΔW to matter)."""
    folder = furnish(tmp_path_factory.mktemp("compare_exports"), rows=ROWS)
    save_adapter(folder, "adapter", r=4, target_modules=["q_proj", "up_proj"])
    return folder


def save_adapter(folder, name: str, **fields) -> None:
    model = ml.load_model(folder / "model", dtype="float32")
    ml.inject(model, ml.LoRAConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.named_parameters():
        if "lora_B" in key:
            tensor.data.normal_(0, 0.05, generator=generator)
    ml.save_adapter(model, folder / name)


def compared(place, adapter: str = "adapter", **options):
    report = compare_exports(place / "model", place / adapter, ROWS, dtype="float32", **options)
    return report, {stage.name: stage for stage in report.stages}


# ---- oracle


def test_figures_are_their_definitions():
    p, q = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 7)
    stage = _compare("x", p, q, 0.01)
    P = p.double().softmax(-1)
    kl = sum(float(P[t, v] * (P[t, v] * 7).log()) for t in range(5) for v in range(7)) / 5
    assert stage.kl == pytest.approx(kl, rel=1e-5) and stage.difference == p.abs().max().item()
    assert stage.top1 == (p.argmax(-1) == 0).float().mean().item() and stage.verdict == "different"
    assert (
        _compare("x", p, p + 1e-4, 0.01).verdict == "rounded"
        and _compare("x", p, p.clone(), 0.01).verdict == "equal"
    )


def test_logits_are_those_after_each_token_of_an_answer(place):
    model = ml.load_model(place / "model", dtype="float32")
    answers = [Answer([1, 2, 3], [4, 5]), Answer([6], [7])]
    found = _logits(model, answers)
    whole = model(torch.tensor([[1, 2, 3, 4]]))[0]  # (T, V)
    torch.testing.assert_close(
        found, torch.cat([whole[2:], model(torch.tensor([[6]]))[0]]), rtol=1e-5, atol=1e-5
    )


# ---- forms that only round


def test_every_form_of_a_dense_model_is_there_and_rounds(place):
    report, stages = compared(place)
    assert tuple(stages) == STAGES
    for name in ("merged", "merged folder", "gguf", "served"):
        # fp32
        assert stages[name].verdict in ("equal", "rounded") and stages[name].kl < 1e-9, stages[name]
    # NF4 changes every weight by 9 %, so this is not the trained model
    assert stages["4 bits"].verdict == "different" and report.first is stages["4 bits"]
    assert "minilora merge measures it" in stages["4 bits"].note and not stages["merged"].note
    assert "first different: 4 bits" in str(report) and str(report).count("\n") == len(STAGES) + 1


def test_a_base_in_4_bits_and_a_tolerance(place):
    report, stages = compared(place, quantize="nf4", tolerance=10.0, rows=2)
    assert report.first is None and stages["merged"].kl < 1e-9 < stages["4 bits"].kl
    assert "no stage is different" in str(report)
    # the 4-bit form is the one that `merge` and `export` write
    trained = ml.load_model(place / "model", quantize="nf4", dtype="float32")
    ml.load_adapter(trained, place / "adapter", check_base=False)
    answers = answers_of(place, 2)
    expected = _compare(
        "4 bits", _logits(trained, answers), _logits(ml.merge(trained, "nf4"), answers), 10.0
    )
    assert stages["4 bits"].kl == pytest.approx(expected.kl, rel=1e-3)
    assert report.tokens == sum(len(answer.tokens) for answer in answers_of(place, 2))


def answers_of(place, rows: int) -> list[Answer]:
    return module._answers(ROWS[:rows], ml.load_tokenizer(place / "model"))


# ---- a fault in one form is found in its stage


@pytest.mark.parametrize("stage", ["merged", "merged folder", "gguf", "served"])
def test_a_fault_is_found_in_its_stage(place, stage, monkeypatch):
    """Leave ΔW out of the merge, of the files that are read back, or of the served rows."""
    if stage == "merged":
        monkeypatch.setattr(
            module, "merge", lambda model: ml.load_model(place / "model", dtype="float32")
        )
    elif stage == "served":
        monkeypatch.setattr(
            module,
            "per_row_adapters",
            lambda model, names: ml.per_row_adapters(model, [None] * len(names)),
        )
    else:
        real, wanted = module.load_model, {"merged folder": "merged", "gguf": "model.gguf"}[stage]

        def read(path, **how):
            lost = str(path).endswith(wanted) and not how.get("quantize")
            return real(place / "model" if lost else path, **how)

        monkeypatch.setattr(module, "load_model", read)
    report, stages = compared(place, tolerance=1e-4)
    first = "4 bits" if stage in ("gguf", "served") else stage
    assert report.first is stages[first]
    assert stages[stage].verdict == "different"


def test_another_tokenizer_in_a_form_is_found(place, monkeypatch):
    real = module.load_tokenizer

    def other(path):
        tokenizer = real(path)
        if str(path).endswith(".gguf"):
            tokenizer.chat_template = tokenizer.chat_template.replace(
                "<|im_start|>", "<|im_start|> "
            )
        return tokenizer

    monkeypatch.setattr(module, "load_tokenizer", other)
    _, stages = compared(place, tolerance=10.0)
    assert stages["gguf"].verdict == "different" and "answer 0" in stages["gguf"].note


def test_a_wrong_cache_is_found(place, monkeypatch):
    """The server reads each token one place too far."""
    model = ml.load_model(place / "model", dtype="float32")
    ml.load_adapter(model, place / "adapter")
    answers = answers_of(place, 3)
    torch.testing.assert_close(
        _served(model, answers), _logits(model, answers), rtol=1e-4, atol=1e-4
    )  # fp32 sums
    real = Context.extend

    def late(self, rows):
        self.lengths = self.lengths + 1
        return real(self, rows)

    monkeypatch.setattr(Context, "extend", late)
    assert (
        _compare("served", _logits(model, answers), _served(model, answers), 1e-6).verdict
        == "different"
    )


# ---- forms that are left out, and errors


def test_an_unsupported_form_is_left_out_with_a_note(place, monkeypatch):
    save_adapter(place, "dora", r=2, target_modules=["q_proj"], use_dora=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    _, stages = compared(place, "dora", rows=1)
    assert stages["served"].verdict == stages["gguf"].verdict == "left out"
    assert "DoRA" in stages["served"].note and "-e '.[gguf]'" in stages["gguf"].note
    assert stages["merged"].verdict == "rounded"


def test_rows_that_cannot_be_compared(place):
    with pytest.raises(ValueError, match="at least one row"):
        compared(place, rows=0)
    question, answer = ROWS[0]["messages"]
    with pytest.raises(ValueError, match="row 1: no assistant turn to train on"):
        compare_exports(
            place / "model",
            place / "adapter",
            [ROWS[0], {"messages": [question, answer | {"weight": 0}]}],
        )


def test_the_command_prints_the_report_and_returns_its_verdict(place, capsys):
    run = [
        "compare-exports",
        str(place / "model"),
        str(place / "rows.jsonl"),
        "--adapter",
        str(place / "adapter"),
    ]
    assert main([*run, "--dtype", "float32", "--rows", "2"]) == 1
    assert "first different: 4 bits" in capsys.readouterr().out
    assert main([*run, "--dtype", "float32", "--rows", "2", "--tolerance", "100"]) == 0
    assert main(run[:3]) == 1
    assert "--adapter" in capsys.readouterr().err
    assert json.loads((place / "rows.jsonl").read_text().splitlines()[0]) == ROWS[0]
