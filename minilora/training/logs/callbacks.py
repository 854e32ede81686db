"""Callbacks: the caller's code that runs after a step, an evaluation and a save.

    class Stop(ml.Callback):
        def on_step(self, step):
            if step.loss < 0.1:
                raise KeyboardInterrupt  # ends the run as Ctrl-C does

    ml.train(model, tokenizer, rows, config, callbacks=[Stop()])

A callback runs in the main process only. An exception ends the run like any other error, and the
last complete step is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.common import unknown_name


@dataclass(frozen=True)
class StepInfo:
    """The figures of one optimiser step.

    Attributes:
        step: Number of the step, from 1.
        total_steps: Steps of the run.
        loss: Loss of this step.
        learning_rate: Learning rate of this step's update, without the ratio of LoRA+.
        grad_norm: Norm of the gradients before clipping.
        tokens: Tokens read since the start of the run, without padding.
        seconds: Duration of the step.
        metrics: Further figures of the objective in this step.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    metrics: dict[str, float]


class Callback:
    """Base class of callbacks; each method does nothing until a subclass defines it.

    An object of another class is a callback too if it has one of these methods.
    """

    def on_step(self, step: StepInfo) -> None:
        """Run after an optimiser step, before its save and its evaluation.

        Args:
            step: The figures of the step.
        """

    def on_evaluate(self, scores: dict[str, float]) -> None:
        """Run after an evaluation.

        Args:
            scores: "step" and the figures, such as "eval_loss".
        """

    def on_save(self, path: Path, step: int) -> None:
        """Run after a checkpoint was written.

        Args:
            path: Folder of the checkpoint.
            step: Its step.
        """


METHODS = ("on_step", "on_evaluate", "on_save")


class Callbacks:
    """The callbacks of one run."""

    def __init__(self, callbacks: Sequence[Any], is_main: bool):
        """Store the callbacks.

        Args:
            callbacks: Objects that `check_callbacks` accepts.
            is_main: False in processes other than the main one, which call nothing.
        """
        self._callbacks = list(callbacks) if is_main else []

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of each callback that has it, in their order.

        Args:
            method: A name in METHODS.
            *arguments: The arguments of the method.
        """
        for callback in self._callbacks:
            function = getattr(callback, method, None)
            if function is not None:
                function(*arguments)


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse objects that are not callbacks.

    Args:
        callbacks: Objects with at least one of the methods of `Callback`.

    Raises:
        ValueError: An object has no such method, or one with an unknown name `on_…`.
    """
    for callback in callbacks:
        _check(callback)


def _check(callback: Any) -> None:
    """Raise ValueError for an object that is not a callback."""
    names = [name for name in dir(callback) if name.startswith("on_")]
    for name in names:
        if name not in METHODS:
            raise unknown_name("callbacks", name, METHODS)
    if not names or isinstance(callback, type):
        kind = "the class" if isinstance(callback, type) else "an object of the class"
        class_name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
        raise ValueError(
            f"callbacks: expected objects with {', '.join(METHODS)}, got {kind} {class_name}."
        )
