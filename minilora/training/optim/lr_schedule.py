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
import warnings

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
    warmup = warmup_length(config, total)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "linear":
        return peak * max(0.0, 1 - progress)
    if config.lr_scheduler_type == "cosine":
        return peak * max(0.0, (1 + math.cos(math.pi * progress)) / 2)
    return peak


def warmup_length(config: TrainConfig, total: int) -> int:
    """Return the number of steps over which the rate rises.

    Args:
        config: The run.
        total: Number of updates in the run.
    """
    return config.warmup_steps or math.ceil(config.warmup_ratio * total)


def check_schedule(config: TrainConfig, total: int) -> None:
    """Refuse a warm-up that leaves no update above rate 0; warn of one that never ends.

    Args:
        config: The run.
        total: Number of updates in the run.

    Raises:
        ValueError: If the rate of every update is 0 because of the warm-up.
    """
    if config.learning_rate == 0:
        warnings.warn("learning_rate is 0: no step changes a weight.", stacklevel=2)
        return
    refuse_schedule(config, total)
    if warmup_length(config, total) < total:
        return
    reached = learning_rate(config, total - 1, total)
    warnings.warn(
        f"{_too_long(config, total)}. The learning rate ends at {reached:.3g} and never reaches "
        f"{config.learning_rate:.3g}: shorten the warm-up, or train for more steps.",
        stacklevel=2,
    )


def refuse_schedule(config: TrainConfig, total: int) -> None:
    """Refuse a warm-up that leaves no update above rate 0.

    Args:
        config: The run.
        total: Number of updates in the run.

    Raises:
        ValueError: If the rate of every update is 0 because of the warm-up.
    """
    if total == 1 and config.learning_rate > 0 and warmup_length(config, total) >= total:
        raise ValueError(
            f"{_too_long(config, total)}. The first step of a warm-up has rate 0, so this run "
            "would learn nothing. Set warmup_steps and warmup_ratio to 0, or train for more steps."
        )


def _too_long(config: TrainConfig, total: int) -> str:
    """Return a sentence on a warm-up that is as long as the run."""
    given = f"warmup_ratio {config.warmup_ratio}"
    if config.warmup_steps:
        given = f"warmup_steps {config.warmup_steps}"
    warmup = warmup_length(config, total)
    steps = "step" if warmup == 1 else "steps"
    return f"{given}: the warm-up has {warmup} {steps}, and the run has {total}"
