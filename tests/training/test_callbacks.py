"""Proves that callbacks see each step, evaluation and save, and that a result holds its history."""

import json

import matplotlib
import pytest

import minilora as ml
from helpers.toy import FAST, Letters, lora, rows
from minilora.training.logs.run_facts import read_run

FIELDS = FAST | {"max_steps": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 3}


class Recorder(ml.Callback):
    """A callback that keeps what it is given."""

    def __init__(self):
        self.events = []

    def on_step(self, step):
        self.events.append(("step", step.step, step))

    def on_evaluate(self, scores):
        self.events.append(("evaluate", scores["step"], scores))

    def on_save(self, path, step):
        self.events.append(("save", step, path))


def run(folder=None, callbacks=(), **fields):
    config = ml.TrainConfig(output_dir=folder, **(FIELDS | fields))
    data = rows(16)
    return ml.train(lora(), Letters(), data, config, eval_dataset=data[:4], callbacks=callbacks)


def test_callbacks_see_every_event_in_its_order(tmp_path):
    recorder = Recorder()
    result = run(tmp_path, [recorder])
    order = [(kind, step) for kind, step, _ in recorder.events]
    assert order == [
        ("step", 1), ("step", 2), ("evaluate", 2), ("step", 3), ("save", 3), ("step", 4),
        ("save", 4), ("evaluate", 4),
    ]  # fmt: skip
    steps = [info for kind, _, info in recorder.events if kind == "step"]
    assert [info.loss for info in steps] == result.losses
    logged = [record for record in result.history if "learning_rate" in record]
    assert [info.learning_rate for info in steps] == [r["learning_rate"] for r in logged]
    assert [info.tokens for info in steps] == [r["tokens"] for r in logged]
    evals = [scores for kind, _, scores in recorder.events if kind == "evaluate"]
    assert evals == result.evals
    saved = [path for kind, _, path in recorder.events if kind == "save"]
    assert saved == [tmp_path / "checkpoint-3", tmp_path / "checkpoint-4"]


def test_error_in_a_callback_keeps_the_last_complete_step(tmp_path):
    class Failing:
        def on_step(self, step):
            if step.step == 2:
                raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback") as failure:
        run(tmp_path, [Failing()])
    assert (tmp_path / "checkpoint-2").is_dir()
    assert "checkpoint-2" in failure.value.__notes__[0]
    resumed = run(tmp_path, resume_from_checkpoint="last")
    assert resumed.losses == run(None).losses


def test_callback_ends_the_run_as_ctrl_c_does(tmp_path):
    class Stop:
        def on_step(self, step):
            raise KeyboardInterrupt

    result = run(tmp_path, [Stop()])
    assert result.interrupted and result.steps == 1


@pytest.mark.parametrize(
    "callback, message",
    [
        (type("Typo", (), {"on_stp": print})(), "callbacks: 'on_stp' matches nothing. .*'on_step'"),
        (
            object(),
            "expected objects with on_step, on_evaluate, on_save, got an object of .*object",
        ),
        (Recorder, "got the class Recorder"),
    ],
)
def test_other_objects_are_refused(callback, message):
    with pytest.raises(ValueError, match=message):
        run(None, [callback])


# ---- the record of a run


def test_history_equals_the_log_also_after_a_resume(tmp_path):
    run(tmp_path, save_steps=1)
    result = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert result.history == [json.loads(line) for line in lines]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_result_without_a_folder_draws_its_losses(logging_steps):
    result = run(None, logging_steps=logging_steps)
    figure = result.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    loss, dots = figure.axes[0].lines[:2]
    assert list(loss.get_xdata()) == [1, 2, 3, 4]
    assert list(loss.get_ydata()) == pytest.approx(result.losses)
    assert list(zip(*dots.get_data(), strict=True)) == result.eval_losses


def test_result_is_a_table_on_a_terminal_and_in_a_notebook():
    result = run(None)
    assert f"{result.loss:.4f}" in str(result) and "eval_loss" in str(result)
    page = result._repr_html_()
    assert page.count("<tr>") == len(str(result).splitlines())
    assert f"{result.eval_loss:.4f}" in page


def test_run_json_holds_every_option(tmp_path):
    run(tmp_path)
    facts = read_run(tmp_path)
    assert facts["config"] == json.loads(
        json.dumps(ml.TrainConfig(output_dir=str(tmp_path), **FIELDS).to_dict())
    )
    assert facts["adapters"]["default"]["r"] == 4
    assert facts["model"]["trainable"] == ml.count_parameters(lora()).trainable
    assert facts["dataset"]["samples"] == 16 and facts["objective"]["name"] == "SFT"
    assert facts["versions"]["minilora"] and facts["model"]["storage"] == {"quantize": None}
