"""The number of steps of a run and the learning rate of each step.

    warm-up, step < w:     lr(step) = peak · step / w
    then, p = (step − w) / (total − w):
        linear             lr(step) = peak · (1 − p)
        cosine             lr(step) = peak · (1 + cos(π p)) / 2
        constant           lr(step) = peak

`step` counts the updates that are already made, so the first update of a warm-up has rate 0. The
rates equal those of transformers with one exception: its "constant" ignores a warm-up silently.
Here "constant" and "constant_with_warmup" are the same schedule.
"""

import math

from minilora.training.config import TrainConfig


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Return the number of optimiser steps in the run.

    Args:
        config: The run; `max_steps` takes precedence over `num_train_epochs`.
        steps_per_epoch: Steps in one pass over the data.

    Returns:
        The number of steps, rounded up where `num_train_epochs` is not a whole number.
    """
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of one update.

    Args:
        config: Peak rate, schedule and warm-up of the run.
        step: Number of updates made before this one.
        total: Number of updates in the run.

    Returns:
        The rate; LoRA+ multiplies it for B (`param_groups.py`).
    """
    peak = config.learning_rate
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "linear":
        return peak * max(0.0, 1 - progress)
    if config.lr_scheduler_type == "cosine":
        return peak * max(0.0, (1 + math.cos(math.pi * progress)) / 2)
    return peak
