"""A table of several runs: the options that differ, and the last figures.

    run      r   learning_rate   steps    loss   eval_loss   seconds
    out-a    8          0.0002     100   1.204       1.310      41.2
    out-b   16          0.0002     100   1.187       1.295      44.0

The options come from run.json, or for a run of an earlier version from the first line of log.jsonl.
The figures are those of the last step and of the last evaluation in log.jsonl. A line of the log
holds the mean loss of `logging_steps` steps. If the last line with a loss is not about the last
step, its step follows in brackets: 1.204 (step 90). A run that ended before its first such line
shows the loss of its last step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.common import column_widths
from minilora.common.notebook import html_table
from minilora.tools.plot.logs import read_log
from minilora.training.logs.run_facts import read_run

# Options that name a run or its output, and do not change its result.
IGNORED = {"output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "dataset_cache"}
TOTALS = ("steps", "tokens", "seconds")


@dataclass(frozen=True)
class RunSummary:
    """The options and the last figures of one run.

    Attributes:
        name: The path that was given.
        options: Value of each option.
        figures: Value of each figure; a run that has not ended has no "seconds".
        state: "done", "interrupted" or "not ended".
        loss_step: Step of the logged loss; None if no loss is logged.
    """

    name: str
    options: dict[str, Any]
    figures: dict[str, float]
    state: str
    loss_step: int | None = None

    def figure_text(self, name: str) -> str:
        """Return a figure as the text of a cell; a loss of an earlier step names its step.

        Args:
            name: Name of the figure.
        """
        text = _text(self.figures.get(name))
        if name == "loss" and self.loss_step not in (None, self.figures.get("steps")):
            text += f" (step {self.loss_step})"
        return text


@dataclass(frozen=True)
class RunComparison:
    """Several runs; prints as a table.

    Attributes:
        runs: The runs, in the order in which they were given.
        left_out: The paths without a log.
    """

    runs: tuple[RunSummary, ...]
    left_out: tuple[str, ...] = ()

    @property
    def differing(self) -> list[str]:
        """The names of the options that differ between the runs."""
        names = dict.fromkeys(name for run in self.runs for name in run.options)
        differing = []
        for name in names:
            values = [run.options.get(name) for run in self.runs]
            if any(value != values[0] for value in values):
                differing.append(name)
        return differing

    def _table(self) -> list[list[str]]:
        """Return the cells of the table, with its header."""
        figures = list(dict.fromkeys(name for run in self.runs for name in run.figures))
        figures.sort(key=_figure_order)
        has_state = any(run.state != "done" for run in self.runs)
        cells = [["run", *self.differing, *figures]]
        for run in self.runs:
            line = [run.name]
            line += [_text(run.options.get(name)) for name in self.differing]
            line += [run.figure_text(name) for name in figures]
            cells.append(line)
        if has_state:
            states = ["state", *(run.state for run in self.runs)]
            for line, state in zip(cells, states, strict=True):
                line.append(state)
        return cells

    def _remarks(self) -> list[str]:
        remarks = []
        if len(self.runs) > 1 and not self.differing:
            remarks.append("All options are equal.")
        for path in self.left_out:
            remarks.append(f"left out: {path} has no log.jsonl, so it is not the folder of a run")
        return remarks

    def __str__(self) -> str:
        cells = self._table()
        widths = column_widths(cells)
        lines = []
        for first, *others in cells:
            line = f"{first:<{widths[0]}}"
            for text, width in zip(others, widths[1:], strict=True):
                line += f"  {text:>{width}}"
            lines.append(line.rstrip())
        return "\n".join(lines + self._remarks())

    def _repr_html_(self) -> str:
        header, *lines = self._table()
        return html_table(header, lines, self._remarks())


def compare_runs(runs: Sequence[str | Path]) -> RunComparison:
    """Compare runs of `train` by their options and their last figures.

    Args:
        runs: The output_dir of each run; paths without a log.jsonl are reported as left out.

    Returns:
        The runs, which print as a table.

    Raises:
        ValueError: No path is the output_dir of a run, or a file is damaged.
    """
    paths = [Path(run) for run in runs]
    summaries = []
    left_out = []
    for path in paths:
        if (path / "log.jsonl").is_file():
            summaries.append(_summary(path))
        else:
            left_out.append(str(path))
    if not summaries:
        raise ValueError(
            f"compare_runs: none of {', '.join(left_out) or '(no path)'} has a log.jsonl. Expected "
            "the output_dir of runs."
        )
    return RunComparison(tuple(summaries), tuple(left_out))


def _summary(folder: Path) -> RunSummary:
    """Return the options and figures of one run."""
    records = read_log(folder)
    facts = read_run(folder)
    if not facts and records:
        facts = {"config": records[0].get("config", {})}
    figures: dict[str, float] = {}
    state = "not ended"
    loss_step = None
    for record in records:
        if "step" in record:
            figures["steps"] = record["step"]
            if "loss" in record:
                figures["loss"] = record["loss"]
                loss_step = record["step"]
            figures |= {name: value for name, value in record.items() if name.startswith("eval_")}
        elif "seconds" in record:
            figures |= {name: record[name] for name in TOTALS}
            state = "interrupted" if record["interrupted"] else "done"
            if loss_step is None and "last_loss" in record:
                figures["loss"] = record["last_loss"]
                loss_step = record["steps"]
    return RunSummary(str(folder), _options(facts), figures, state, loss_step)


def _options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run by name, from its facts."""
    options: dict[str, Any] = {}
    model = facts.get("model", {})
    for name in ("source", "dtype", "storage"):
        if name in model:
            options["model" if name == "source" else name] = model[name]
    adapters = facts.get("adapters", {})
    for adapter, values in adapters.items():
        prefix = f"{adapter}." if len(adapters) > 1 else ""
        options |= {prefix + name: value for name, value in values.items()}
    objective = dict(facts.get("objective", {}))
    if objective:
        options["objective"] = objective.pop("name")
    options |= objective
    for name in ("dataset", "eval_dataset"):
        for key, value in (facts.get(name) or {}).items():
            options[name if key == "source" else f"{name} {key}"] = value
    options |= facts.get("config", {})
    for name, value in facts.get("versions", {}).items():
        options[f"version of {name}"] = value
    for name in ("device", "processes"):
        if name in facts:
            options[name] = facts[name]
    return {name: value for name, value in options.items() if name not in IGNORED}


def _figure_order(name: str) -> tuple[int, str]:
    """Return the sort key of a figure: steps, losses, other figures, tokens and seconds."""
    order = {"steps": 0, "loss": 1, "eval_loss": 2, "tokens": 4, "seconds": 5}
    return order.get(name, 3), name


def _text(value: Any) -> str:
    """Return a value as the text of a cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        shown = [str(item) for item in value.values() if item is not None]
        return " ".join(shown) or "–"
    return str(value)
