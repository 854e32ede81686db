"""Checks that every objective must pass.

The gradient does not depend on the micro-batches of a step, the evaluation does not depend on the
batch size, and a resumed run equals an uninterrupted run.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.toy import FAST, Letters, adapters, alone
from minilora.lora.layer import LoRALayer
from minilora.losses.sft import Objective, means
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from minilora.training.optim.gradients import backward


def stirred(model: Any) -> Any:
    """Give every B random values, because with B = 0 half of the gradients are zero."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            layer.adapters["default"].lora_B.data.normal_(std=0.05, generator=generator)
    return model


def check_splits(model: Any, objective: Objective, rows: list) -> None:
    examples = objective.encode(rows, Letters(), 64)
    found = []
    for size in (len(examples), 3, 1):
        samples = [examples[i : i + size] for i in range(0, len(examples), size)]
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses, further = backward(
            alone(model, objective),
            objective,
            samples,
            torch.autocast("cpu", enabled=False),
            scaler,
        )
        numbers = {
            "loss": losses.sum().item(),
            **{name: value.item() for name, value in further.items()},
        }
        found.append(
            (
                numbers,
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    (numbers, whole), *others = found
    # the figures of an evaluation
    assert means(model, examples, 4, objective)[0] == pytest.approx(numbers, rel=1e-5)
    total = math.sqrt(sum(g.norm().item() ** 2 for g in whole.values()))
    assert total > 0
    for other, gradients in others:
        assert other == pytest.approx(numbers, rel=1e-5)
        # The micro-batches are summed in fp32 in another order.
        assert (
            math.sqrt(sum((gradients[k] - g).norm().item() ** 2 for k, g in whole.items()))
            < 1e-5 * total
        )


def check_eval_batches(model: Any, objective: Objective, rows: list) -> None:
    examples = objective.encode(rows, Letters(), 64)
    found = [means(model, examples, size, objective) for size in (1, 3, 100)]
    for numbers, count in found[1:]:
        assert numbers == pytest.approx(found[0][0], rel=1e-5) and count == found[0][1]


def check_resume(
    model: Callable[[], Any], objective: Objective, rows: list, folder: Path, **more: Any
) -> None:
    """Compare five steps with two steps and three more from the checkpoint.

    Weights and figures have the same bits.
    """
    fields = FAST | {"per_device_train_batch_size": 3, "save_steps": 2, "eval_steps": 2} | more
    whole, again = model(), model()
    expected = train(
        whole,
        Letters(),
        rows,
        TrainConfig(output_dir=folder, **fields),
        objective=objective,
        eval_dataset=rows,
    )
    config = TrainConfig(resume_from_checkpoint=folder / "checkpoint-2", **fields)
    result = train(again, Letters(), rows, config, objective=objective, eval_dataset=rows)
    trained, same = adapters(whole), adapters(again)
    assert trained.keys() == same.keys() and all(
        torch.equal(trained[key], same[key]) for key in trained
    )
    assert (result.losses, result.metrics) == (expected.losses, expected.metrics)
    assert result.evals == expected.evals and [figures["step"] for figures in result.evals] == [
        2,
        4,
        5,
    ]
    assert all(len(values) == 5 for values in result.metrics.values())
