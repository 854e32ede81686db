"""The outcome of a run: `TrainResult`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.common.notebook import html_table
from minilora.training.validation import Figures


@dataclass
class TrainResult:
    """The outcome of a run. Losses are means over supervised tokens.

    Attributes:
        steps: Optimiser steps done.
        loss: Loss of the last step, or None before the first.
        eval_loss: Loss of the last evaluation, or None.
        tokens: Tokens read, without padding.
        tokens_per_second: Speed of this session's steps, without evaluation and saving.
        seconds: Duration of the call to `train`.
        peak_memory_bytes: Peak memory of the device, or of the process on a CPU.
        interrupted: True if Ctrl-C ended the run.
        checkpoint: The newest checkpoint, or None.
        best_step: The best evaluated step by `metric_for_best_model`, or None.
        log: The log file, or None.
        losses: Loss of each step.
        evals: "step" and the figures of each evaluation.
        metrics: Further figures of the objective, one list each, with one value a step.
        history: The records of log.jsonl; without `output_dir`, those of this session.
    """

    steps: int
    loss: float | None
    eval_loss: float | None
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    interrupted: bool
    checkpoint: Path | None
    best_step: int | None
    log: Path | None
    losses: list[float] = field(repr=False)
    evals: list[Figures] = field(repr=False)
    metrics: dict[str, list[float]] = field(repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        """(step, eval_loss) of each evaluation."""
        return [(int(figures["step"]), figures["eval_loss"]) for figures in self.evals]

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the losses and the other figures of the run.

        Args:
            path: File to save the picture to; None saves nothing.

        Returns:
            A matplotlib Figure.
        """
        from minilora.tools.plot.logs import draw_runs

        name = "run" if self.log is None else self.log.parent.name
        return draw_runs({name: self.records()}, path)

    def records(self) -> list[dict[str, Any]]:
        """Return the history; if `logging_steps` was too large for a line, the loss of each step."""
        if any("loss" in record for record in self.history):
            return self.history
        steps = [{"step": step, "loss": loss} for step, loss in enumerate(self.losses, start=1)]
        return [*steps, *self.evals]

    def figures(self) -> dict[str, str]:
        """Return the figures of the run as texts by name."""
        shown = {"steps": f"{self.steps:,}"}
        if self.interrupted:
            shown["steps"] += " (interrupted)"
        if self.loss is not None:
            shown["loss of the last step"] = f"{self.loss:.4f}"
        if self.evals:
            for name, value in self.evals[-1].items():
                if name != "step":
                    shown[name] = f"{value:.4f}"
        if self.best_step is not None:
            shown["best step"] = f"{self.best_step:,}"
        shown["tokens"] = f"{self.tokens:,}"
        shown["tokens per second"] = f"{self.tokens_per_second:,.0f}"
        shown["seconds"] = f"{self.seconds:.1f}"
        shown["peak memory"] = f"{self.peak_memory_bytes / 1e9:.2f} GB"
        for name, path in (("checkpoint", self.checkpoint), ("log", self.log)):
            if path is not None:
                shown[name] = str(path)
        return shown

    def __str__(self) -> str:
        lines = [f"{name:<24}{value}" for name, value in self.figures().items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table([], list(self.figures().items()))
