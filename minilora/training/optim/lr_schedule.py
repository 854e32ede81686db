"""How many steps a run has, and the learning rate of each.

    warm-up, step < w:     lr(step) = peak * step / w
    then, p = (step - w) / (total - w):
        linear             lr(step) = peak * (1 - p)
        cosine             lr(step) = peak * (1 + cos(pi p)) / 2
        constant           lr(step) = peak

`step` counts the updates already made, so the first update of a warm-up has rate 0, as in transformers, whose numbers
these are exactly. Only its "constant", which drops a warm-up silently, differs: here it is "constant_with_warmup".
"""

import math

from minilora.training.config import TrainConfig


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    return config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of the update that follows `step` updates."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * max(0.0, (1 + math.cos(math.pi * progress)) / 2)
    return config.learning_rate
