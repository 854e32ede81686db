"""Runs as pictures: the lines of log.jsonl.

A panel a figure: the training loss with the eval loss as dots on it, learning rate, gradient norm, speed, and the other
figures of evaluations.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.tools.plot.style import MARKERS, canvas, line

PANELS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run: its output_dir, or a log.jsonl. ValueError if there is none or it is damaged."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{path}: no such log. Expected the output_dir of a run, or its log.jsonl.")
    try:
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not one JSON object a line ({error}).") from error


def runs(runs: Sequence[str | Path], path: str | Path | None = None) -> Any:
    """The logs of one or several runs in one picture; each is an output_dir, or its log.jsonl.

    ValueError for a run without a log or without a step in it.
    """
    records = {str(run): read_log(run) for run in ([runs] if isinstance(runs, str | Path) else runs)}
    if empty := [run for run, lines in records.items() if not any("loss" in found for found in lines)]:
        raise ValueError(f"{empty[0]}: its log holds no step yet (logging_steps says how often one is written).")
    names = {name for lines in records.values() for found in lines for name in found if name.startswith("eval_")}
    panels = [*PANELS, *sorted(names - {"eval_loss"})]
    rows = -(-len(panels) // 2)
    with canvas(9, 2.6 * rows + 0.3 * len(records), path) as figure:
        for axes, name in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
            for number, (run, lines) in enumerate(records.items()):
                marker = MARKERS[number % len(MARKERS)] if name.startswith("eval") else ""
                axes.plot(*_series(lines, name), label=run, marker=marker, **line(number))
                if name == "loss":
                    style = {"color": line(number)["color"], "marker": MARKERS[number % len(MARKERS)]}
                    axes.plot(*_series(lines, "eval_loss"), linestyle="", **style)
            axes.set(title=name.replace("_", " ") + " (dots: eval)" * (name == "loss"), xlabel="step")
            axes.grid(alpha=0.3)
        for axes in figure.axes[len(panels) :]:
            axes.remove()
        if len(records) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(found["step"], found[name]) for found in lines if found.get(name) is not None and "step" in found]
    return [step for step, _ in points], [value for _, value in points]
