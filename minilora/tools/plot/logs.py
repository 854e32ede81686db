"""Curves of training runs, drawn from their log.jsonl.

Each quantity has a panel: the training loss with the evaluation loss as dots, the learning rate,
the gradient norm, the speed, and the other metrics of evaluations.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.tools.plot.style import MARKERS, canvas, line

PANELS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Read the records of a run.

    Args:
        run: The run's output_dir, or its log.jsonl.

    Returns:
        One dictionary for each line of the log.

    Raises:
        ValueError: If the file does not exist, or is not a log.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "log.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{path}: no such log exists. Expected the output_dir of a run, or its log.jsonl."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(text) for text in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected one JSON object a line ({error}).") from error


def runs(runs: Sequence[str | Path], path: str | Path | None = None) -> Any:
    """Draw the logs of one or several runs in one picture.

    Args:
        runs: The output_dir or log.jsonl of each run; a single one needs no list.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If a run has no log, or its log has no training step.
    """
    paths = [runs] if isinstance(runs, str | Path) else runs
    return draw_runs({str(run): read_log(run) for run in paths}, path)


def draw_runs(records: Mapping[str, list[dict[str, Any]]], path: str | Path | None = None) -> Any:
    """Draw the records of one or several runs in one picture.

    Args:
        records: For each name of a run, the records of its log.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If a run has no training step.
    """
    for run, lines in records.items():
        if not any("loss" in record for record in lines):
            raise ValueError(
                f"{run}: the log holds no step yet. logging_steps sets how often one is written."
            )
    panels = [name for name in PANELS if _has(records, name)] + _evaluation_metrics(records)
    rows = -(-len(panels) // 2)
    with canvas(9, 2.6 * rows + 0.3 * len(records), path) as figure:
        grid = figure.subplots(rows, 2, squeeze=False).flat
        for axes, name in zip(grid, panels, strict=False):
            _draw_panel(axes, name, records)
        for axes in figure.axes[len(panels) :]:
            axes.remove()
        if len(records) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def _has(records: Mapping[str, list[dict[str, Any]]], name: str) -> bool:
    """Return True if a record of a run contains the quantity."""
    return any(name in record for lines in records.values() for record in lines)


def _evaluation_metrics(records: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Return the names of all evaluation metrics but the loss, in alphabetical order."""
    names = set()
    for lines in records.values():
        for record in lines:
            names.update(name for name in record if name.startswith("eval_"))
    return sorted(names - {"eval_loss"})


def _draw_panel(axes: Any, name: str, records: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draw one quantity of all runs; the panel of the loss also shows eval_loss as dots."""
    for number, (run, lines) in enumerate(records.items()):
        marker = MARKERS[number % len(MARKERS)]
        style = line(number)
        axes.plot(
            *_series(lines, name),
            label=run,
            marker=marker if name.startswith("eval") else "",
            **style,
        )
        if name == "loss":
            axes.plot(
                *_series(lines, "eval_loss"), linestyle="", color=style["color"], marker=marker
            )
    title = name.replace("_", " ")
    if name == "loss":
        title += " (markers: evaluation)"
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the records that contain a quantity."""
    steps = []
    values = []
    for record in lines:
        if "step" in record and record.get(name) is not None:
            steps.append(record["step"])
            values.append(record[name])
    return steps, values
