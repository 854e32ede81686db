"""Proves that no complete step is lost when a run fails, and that failures are found before step 1.

Oracle: the run without a failure. A resumed run equals it bit for bit.
"""

import math

import pytest
import torch

from helpers.toy import Letters, llama, lora, rows
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.run_folder import checkpoint_steps
from minilora.training.validation import Evaluation

CONFIG = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 5}


def run(folder=None, model=None, eval_rows=None, **fields):
    """Train a fresh model for 4 steps."""
    model = lora(dropout=0.3) if model is None else model
    config = TrainConfig(output_dir=folder, **(CONFIG | fields))
    evals = rows(4, seed=1) if eval_rows is None else eval_rows
    return model, train(model, Letters(), rows(), config, eval_dataset=evals)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("save_steps", [None, 1])
def test_a_failing_evaluation_leaves_its_step(tmp_path, monkeypatch, step, save_steps):
    measure, calls = Evaluation.measure, []

    def fail(self):
        calls.append(1)
        if len(calls) == step // 2:
            raise RuntimeError("no such metric")
        return measure(self)

    options = {"eval_steps": 2, "save_steps": save_steps}
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "measure", fail)
        with pytest.raises(RuntimeError, match="no such metric") as caught:
            run(tmp_path, **options)
    assert checkpoint_steps(tmp_path)[-1] == step
    assert f"checkpoint-{step}" in caught.value.__notes__[0]
    assert 'resume_from_checkpoint="last"' in caught.value.__notes__[0]
    resumed, result = run(tmp_path, resume_from_checkpoint="last", **options)
    expected, whole = run(**options)
    assert same(resumed, expected) and result.evals == whole.evals


def test_a_loss_that_is_not_finite_leaves_the_steps_before_it(tmp_path):
    model = lora(dropout=0.3)
    forwards = []

    def break_third_step(module, inputs, output):
        forwards.append(module.training)
        return output * math.nan if sum(forwards) == 3 else output

    hook = model.model.norm.register_forward_hook(break_third_step)
    with pytest.raises(ValueError, match="step 3"):
        run(tmp_path, model)
    hook.remove()
    assert checkpoint_steps(tmp_path) == [2]
    resumed, _ = run(tmp_path, resume_from_checkpoint="last")
    assert same(resumed, run()[0])


def test_a_failure_within_an_update_saves_nothing(tmp_path, monkeypatch):
    """Weights may have changed, and moments not: there is no whole step to save."""
    step, calls = torch.optim.AdamW.step, []

    def fail(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("optimiser failed")
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="optimiser failed") as caught:
        run(tmp_path)
    assert checkpoint_steps(tmp_path) == [] and not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": "no prompt"}, "plain texts"),
        ({"prompt": "a" * 60, "completion": "b"}, "exceed the model's context"),
        ({"prompt": "a", "completion": "b" * 90}, "exceed the context"),
    ],
)
def test_eval_rows_without_a_score_are_found_before_step_1(tmp_path, row, problem):
    with pytest.raises(ValueError, match=problem):
        run(
            tmp_path,
            lora(llama(max_position_embeddings=64)),
            [row],
            eval_metrics="exact_match",
            max_length=64,
        )
    assert not list(tmp_path.iterdir())


def test_a_figure_that_is_not_a_number_is_never_the_best(monkeypatch):
    figures = iter([math.nan, 2.0, 3.0, 1.0])
    monkeypatch.setattr(Evaluation, "measure", lambda self: {"eval_loss": next(figures)})
    _, result = run(eval_steps=1)
    assert result.best_step == 4
    figures = iter([math.nan] * 4)
    assert run(eval_steps=1)[1].best_step is None


def test_a_best_step_without_a_checkpoint_is_refused_before_the_first_step(tmp_path):
    options = {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    _, result = run(tmp_path / "a", **options, save_total_limit=None)
    assert result.best_step in checkpoint_steps(tmp_path / "a")
    last = str(tmp_path / "a" / "checkpoint-3")
    with pytest.raises(ValueError, match="load_best_model_at_end: the best step so far is"):
        run(tmp_path / "b", resume_from_checkpoint=last, **options)
    assert checkpoint_steps(tmp_path / "b") == []
    without = options | {"load_best_model_at_end": False}
    assert run(tmp_path / "b", resume_from_checkpoint=last, **without)[1].steps == 4
