"""Runs as pictures: the lines of log.jsonl, drawn by matplotlib (pip install 'minilora[plot]').

One colour and one dash a run, so that they are told apart in grey and by the colour-blind; a panel a figure: the
training loss with the eval loss as dots on it, the other figures of evaluations, learning rate and gradient norm.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
DASHES = ("-", "--", "-.", ":")
PANELS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run: its output_dir, or a log.jsonl. ValueError if there is none or it is damaged."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{path}: no such log. Expected the output_dir of a run, or its log.jsonl.")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not one JSON object a line ({error}).") from error


def plot_runs(runs: Sequence[str | Path], file: str | Path | None = None) -> Any:
    """A matplotlib Figure of one or several runs, saved to `file` (.svg, .png, .pdf) if given.

    ValueError for a run without a log or without a step in it; ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    records = {str(run): read_log(run) for run in runs}
    if empty := [run for run, lines in records.items() if not any("loss" in line for line in lines)]:
        raise ValueError(f"{empty[0]}: its log holds no step yet (logging_steps says how often one is written).")
    names = {name for lines in records.values() for line in lines for name in line if name.startswith("eval_")}
    panels = [*PANELS, *sorted(names - {"eval_loss"})]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        for number, (run, lines) in enumerate(records.items()):
            style = {"color": COLOURS[number % 6], "label": run}
            axes.plot(
                *_series(lines, name), linestyle=DASHES[number % 4], marker="o" * name.startswith("eval"), **style
            )
            if name == "loss":
                axes.plot(*_series(lines, "eval_loss"), "o", color=style["color"])
        axes.set(title=name.replace("_", " ") + " (dots: eval)" * (name == "loss"), xlabel="step")
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    if len(records) > 1:
        figure.axes[0].legend()
    if file is not None:
        figure.savefig(file)
    return figure


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None and "step" in line]
    return [step for step, _ in points], [value for _, value in points]
