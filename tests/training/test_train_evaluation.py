"""Proves that evaluation during training equals `evaluate`.

The best step and early stopping follow from its figures alone. Oracles: `mean_loss` and `evaluate`
after a run that stops there, and a choice by hand from the list of figures.
"""

import json
import math

import pytest
import torch

from helpers.toy import FAST, Letters, adapters, lora, rows
from minilora.data import encode_dataset
from minilora.evaluation.evaluate import evaluate
from minilora.evaluation.samples import json_valid
from minilora.losses.sft import mean_loss
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.process import Process
from minilora.training.validation import Evaluation

TEXT = [{"text": f"{word} {word[::-1]}"} for word in ("alpha", "beta", "gamma", "delta")]


def run(model=None, eval_dataset=None, **fields):
    model = lora() if model is None else model
    held_out = rows(6, seed=1) if eval_dataset is None else eval_dataset
    return model, train(
        model, Letters(), rows(), TrainConfig(**(FAST | fields)), eval_dataset=held_out
    )


def decide(losses, **fields):
    """Return (best step, whether to stop) after evaluations with these losses, from step 1 on."""
    chosen = Evaluation(
        Process(torch.device("cpu")), Letters(), rows(2), *_sft(), TrainConfig(**fields)
    )
    evals = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    best = chosen.best(evals)
    return best and best["step"], chosen.exhausted(evals)


def _sft():
    from minilora.losses.sft import SFT

    return (SFT(),)


# ---- oracle


def test_figures_are_those_of_evaluate():
    held_out = rows(6, seed=1)
    model, result = run(
        eval_metrics="exact_match, token_f1,json_valid", eval_answers=4, eval_steps=5, max_steps=5
    )
    scores = evaluate(model, Letters(), held_out[:4], metrics={"json_valid": json_valid})
    loss, _ = mean_loss(model, encode_dataset(held_out, Letters(), 1024), 8)
    assert result.evals == [
        {
            "step": 5,
            "eval_loss": pytest.approx(loss, rel=1e-6),
            "eval_exact_match": scores.exact_match,
        }
        | {"eval_token_f1": scores.token_f1, "eval_json_valid": scores.metrics["json_valid"]}
    ]


def test_general_text_is_measured_next_to_the_task(tmp_path):
    model, result = run(
        eval_dataset={"task": rows(6, seed=1), "general": TEXT},
        eval_steps=2,
        max_steps=4,
        output_dir=tmp_path,
    )
    loss, _ = mean_loss(model, encode_dataset(TEXT, Letters(), 1024), 8)
    assert [sorted(f) for f in result.evals] == [
        ["eval_general_loss", "eval_general_perplexity", "eval_loss", "step"]
    ] * 2
    assert result.evals[-1]["eval_general_loss"] == pytest.approx(loss, rel=1e-6)
    assert result.evals[-1]["eval_general_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line for line in lines if "eval_loss" in line] == result.evals


def test_evaluation_does_not_change_the_trained_weights():
    with_it, _ = run(eval_steps=1, eval_metrics="exact_match")
    model = lora()
    train(model, Letters(), rows(), TrainConfig(**FAST))
    assert all(
        torch.equal(a, b)
        for a, b in zip(adapters(with_it).values(), adapters(model).values(), strict=True)
    )


# ---- property


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 2, (None, False)),
        ([3.0], 1, (1, False)),
        ([3.0, 2.0, 2.5], 2, (2, False)),
        ([3.0, 2.0, 2.5, 2.0], 2, (2, True)),  # an equal loss is not better
        ([3.0, 2.0, 2.5, 1.0], 2, (4, False)),
        ([3.0, 2.0, 2.5, 2.6], None, (2, False)),
    ],
)
def test_the_best_step_and_the_early_stop(losses, patience, expected):
    assert decide(losses, early_stopping_patience=patience) == expected


def test_a_higher_accuracy_and_a_lower_loss_are_better():
    evals = [
        {"step": 1, "eval_loss": 1.0, "eval_exact_match": 0.1},
        {"step": 2, "eval_loss": 2.0, "eval_exact_match": 0.9},
    ]
    for metric, step in (("eval_loss", 1), ("eval_exact_match", 2)):
        config = TrainConfig(
            metric_for_best_model=metric, eval_metrics="exact_match", load_best_model_at_end=True
        )
        best = Evaluation(Process(torch.device("cpu")), Letters(), rows(2), *_sft(), config).best(
            evals
        )
        assert best is not None and best["step"] == step


OVERSHOOTS = {
    "learning_rate": 0.2,
    "lr_scheduler_type": "constant",
    "max_steps": 12,
    "eval_steps": 2,
}


def test_a_run_stops_early_and_ends_with_its_best_weights(tmp_path):
    fields = OVERSHOOTS | {
        "early_stopping_patience": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    model, result = run(output_dir=tmp_path, save_steps=1, **fields)
    losses = dict(result.eval_losses)
    assert result.best_step == min(losses, key=losses.__getitem__) == result.steps - 4
    loss, _ = mean_loss(model, encode_dataset(rows(6, seed=1), Letters(), 1024), 8)
    assert loss == pytest.approx(losses[result.best_step], rel=1e-6)
    assert {f"checkpoint-{result.best_step}", f"checkpoint-{result.steps}"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert sum(p.is_dir() for p in tmp_path.iterdir()) == 2


# ---- round trip


def test_a_resumed_run_stops_where_the_other_did(tmp_path):
    fields = OVERSHOOTS | {"early_stopping_patience": 2}
    _, whole = run(output_dir=tmp_path, save_steps=1, **fields)
    model, again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"), **fields)
    assert again.evals == whole.evals and again.steps == whole.steps < 12
    finished, nothing = run(output_dir=tmp_path, resume_from_checkpoint="last", **fields)
    assert nothing.steps == whole.steps
    assert all(
        torch.equal(a, b)
        for a, b in zip(adapters(model).values(), adapters(finished).values(), strict=True)
    )


# ---- error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"eval_metrics": "exact_mach"},
            "eval_metrics: 'exact_mach' matches nothing. Nearest: 'exact_match'",
        ),
        (
            {"metric_for_best_model": "eval_f1", "early_stopping_patience": 1},
            "metric_for_best_model .* Nearest: 'eval_loss'",
        ),
        ({"load_best_model_at_end": True}, "takes the best weights from output_dir, which is None"),
    ],
)
def test_errors_come_before_training(fields, message):
    model = lora()
    before = adapters(model)
    with pytest.raises(ValueError, match=message):
        run(model, **fields)
    assert all(torch.equal(before[name], value) for name, value in adapters(model).items())


def test_early_stopping_without_eval_dataset_raises():
    with pytest.raises(ValueError, match=r"it needs eval_dataset.*There are none"):
        train(lora(), Letters(), rows(), TrainConfig(early_stopping_patience=1, **FAST))
