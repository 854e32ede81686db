"""Tests of `minilora evaluate`: the comparison, the file of predictions, and early errors.

The figures and rows are those of `ml.evaluate` with the adapter on and off.
"""

import json

import pytest

import minilora as ml
from helpers.chats import furnish
from minilora.cli import evaluate as command
from minilora.cli.main import main

ROWS = [{"prompt": f"{a} plus {b}", "completion": str(a + b)} for a in range(3) for b in range(3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, rows, and two adapters with large updates."""
    place = furnish(tmp_path_factory.mktemp("place"), rows=ROWS)
    for name, seed in (("adapter", 1), ("other", 2)):
        model = ml.load_model(place / "model", dtype="float32")
        ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]), seed=seed)
        config = ml.TrainConfig(max_steps=seed, learning_rate=0.05)
        ml.train(model, ml.load_tokenizer(place / "model"), ROWS, config)
        ml.save_adapter(model, place / name)
    return place


def run(place, *options: str) -> int:
    source = str(place / "model")
    fixed = ["--dtype", "float32", "--max_new_tokens", "4", "--adapter", str(place / "adapter")]
    return main(["evaluate", source, str(place / "rows.jsonl"), *fixed, *options])


def expected_scores(place, adapter: str | None) -> ml.Scores:
    model = ml.load_model(place / "model", dtype="float32")
    tokenizer = ml.load_tokenizer(place / "model")
    if adapter is not None:
        ml.load_adapter(model, place / adapter)
    return ml.evaluate(model, tokenizer, ROWS, max_new_tokens=4)


@pytest.mark.parametrize("compared", ["base", "other"])
def test_comparison_is_of_the_same_rows(place, tmp_path, capsys, compared):
    out = tmp_path / "new" / "predictions.jsonl"
    target = "base" if compared == "base" else str(place / "other")
    assert run(place, "--compare", target, "--out", str(out), "--show", "2") == 0
    printed = capsys.readouterr().out.splitlines()
    after = expected_scores(place, "adapter")
    before = expected_scores(place, None if compared == "base" else "other")
    assert after.loss != before.loss
    figures = json.loads(printed[-1])
    assert figures.pop("compared") == pytest.approx(before.as_dict())
    assert figures == pytest.approx(after.as_dict())
    assert str(after.compare(before, (compared, "adapter"))) in "\n".join(printed)
    assert sum(line.startswith("row ") for line in printed) == 2
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["got"] for line in written] == after.predictions
    assert [line["compared"]["got"] for line in written] == before.predictions
    assert [line["expected"] for line in written] == [row["completion"] for row in ROWS]


def test_metrics_are_chosen_by_name(place, capsys):
    assert run(place, "--metrics", "f1,json_valid") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"token_f1", "json_valid"} <= figures.keys() and "exact_match" not in figures


@pytest.mark.parametrize(
    "options, message",
    [
        (["--metrics", "exact_mach"], "'exact_mach' matches nothing. Nearest: 'exact_match'"),
        (["--compare", "./nowhere"], "nowhere"),
        (["--adapter", "./nowhere"], "nowhere"),
        (["--out", "."], "--out: . is a folder"),
        (["--out", "/proc/new/predictions.jsonl"], "--out: /proc/new is not writable"),
    ],
)
def test_errors_come_before_the_model_is_loaded(place, monkeypatch, capsys, options, message):
    monkeypatch.setattr(command.ml, "load_model", None)
    assert run(place, *options) == 1
    assert message in capsys.readouterr().err


def test_comparison_without_an_adapter_is_refused(place, capsys):
    rows = str(place / "rows.jsonl")
    assert main(["evaluate", str(place / "model"), rows, "--compare", "base"]) == 1
    assert "expected an --adapter" in capsys.readouterr().err
