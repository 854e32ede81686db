"""Proves that the table of runs shows the options that differ, and the last figures of each log."""

import pytest

import minilora as ml
from helpers.toy import FAST, Letters, llama, rows
from minilora.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with two runs that differ in r and the learning rate."""
    place = tmp_path_factory.mktemp("runs")
    for name, r, rate in (("a", 2, 1e-2), ("b", 4, 2e-2)):
        model = llama()
        ml.inject(model, ml.LoRAConfig(r=r, target_modules="all-linear"))
        fields = FAST | {"max_steps": 2, "logging_steps": 1, "learning_rate": rate}
        config = ml.TrainConfig(output_dir=place / name, **fields)
        ml.train(model, Letters(), rows(8), config, eval_dataset=rows(4))
    return place


def test_options_that_differ_and_last_figures_are_shown(place):
    comparison = ml.compare_runs([place / "a", place / "b"])
    assert comparison.differing == ["r", "learning_rate"]
    log = ml.plot.logs.read_log(place / "b")
    figures = comparison.runs[1].figures
    assert figures["eval_loss"] == [r["eval_loss"] for r in log if "eval_loss" in r][-1]
    assert figures["loss"] == [r["loss"] for r in log if "loss" in r][-1]
    assert figures["steps"] == 2 and figures["seconds"] == log[-1]["seconds"]
    header, first, second = str(comparison).splitlines()
    assert header.split()[:3] == ["run", "r", "learning_rate"] and "state" not in header
    assert first.split()[1:3] == ["2", "0.01"] and second.split()[1:3] == ["4", "0.02"]
    assert comparison._repr_html_().count("<tr>") == 3


def test_command_prints_the_table_and_what_it_leaves_out(place, capsys):
    (place / "notes.txt").touch()
    given = [str(place / name) for name in ("a", "b", "notes.txt")]
    assert main(["runs", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == str(ml.compare_runs(given))
    assert lines[-1].startswith(f"left out: {place / 'notes.txt'} has no log.jsonl")
    assert main(["runs", str(place / "notes.txt")]) == 1
    assert "has a log.jsonl" in capsys.readouterr().err


def test_run_that_was_killed_and_an_earlier_version_are_read(place, tmp_path):
    lines = (place / "a" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:2]))  # no run.json, no totals
    comparison = ml.compare_runs([place / "b", tmp_path])
    killed = comparison.runs[1]
    assert killed.state == "not ended" and "seconds" not in killed.figures
    assert killed.figures["steps"] == 1 and "learning_rate" in comparison.differing
    assert str(comparison).splitlines()[2].endswith("not ended")


@pytest.mark.parametrize(
    "logging_steps, shown_steps, remark",
    [(1, [3], ""), (2, [1, 2], " (step 2)"), (10, [3], "")],
)
def test_loss_is_shown_at_any_logging_steps(tmp_path, logging_steps, shown_steps, remark):
    model = llama()
    ml.inject(model, ml.LoRAConfig(r=2))
    fields = FAST | {"max_steps": 3, "logging_steps": logging_steps}
    config = ml.TrainConfig(output_dir=tmp_path, **fields)
    result = ml.train(model, Letters(), rows(8), config)
    expected = sum(result.losses[step - 1] for step in shown_steps) / len(shown_steps)
    line = str(ml.compare_runs([tmp_path])).splitlines()[1]
    assert f"  3  {expected:.4g}{remark}  " in line


def test_a_run_stopped_before_a_step_shows_no_loss(place, tmp_path):
    totals = '{"steps": 0, "tokens": 0, "seconds": 0.0, "interrupted": true}\n'
    for name, end in (("started", ""), ("stopped", totals)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"config": {}}\n' + end)
    paths = [tmp_path / "started", tmp_path / "stopped"]
    assert "loss" not in str(ml.compare_runs(paths))
    assert "not ended" in str(ml.compare_runs([place / "a", *paths]))


def test_equal_runs_are_called_equal(place):
    assert "All options are equal." in str(ml.compare_runs([place / "a", place / "a"]))
