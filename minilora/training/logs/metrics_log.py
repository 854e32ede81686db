"""The log of a run: output_dir/log.jsonl, the progress bar, and the trackers.

log.jsonl holds one JSON object a line. The first line holds the config. Lines with "step", "loss",
"learning_rate", ... follow every `logging_steps`, and lines with "step" and "eval_loss" after each
evaluation. The last line holds the totals, and the loss of the last step as "last_loss". Lines with
a step also go to the trackers of `report_to`. A resumed run keeps the lines up to its checkpoint and
continues the file, so that every step occurs once.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from minilora.common import path_in_errors, write_text
from minilora.common.notebook import Points
from minilora.common.progress import ProgressBar
from minilora.training.checkpoint import Progress
from minilora.training.config import TrainConfig
from minilora.training.logs.trackers import trackers


class Log:
    """The log file, progress bar and trackers of a run, and its clock.

    Attributes:
        path: The log file, or None.
        tokens: Tokens read in this session.
        seconds: Duration of this session's steps, without evaluation and saving.
        records: The lines of the log as dictionaries; without a file, those of this session.
    """

    def __init__(self, progress: Progress, total: int, config: TrainConfig, is_main: bool = True):
        """Open the log; cut an earlier log after the step that the run continues from.

        Args:
            progress: The run as it starts.
            total: Steps of the run.
            config: The run.
            is_main: False in processes other than the main one, which write and show nothing.
        """
        self.path: Path | None = None
        if config.output_dir and is_main:
            self.path = Path(config.output_dir) / "log.jsonl"
        self.tokens = 0
        self.seconds = 0.0
        self.records: list[dict[str, Any]] = []
        self._every = config.logging_steps
        self._trackers = trackers(config, progress.step) if is_main else []
        self._file: Any = None
        if self.path is not None:
            lines = _lines_until(self.path, progress.step)
            self.records += [json.loads(line) for line in lines]
            write_text(self.path, "".join(lines))
            # Buffering by line: a crash loses no complete line.
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
            if progress.step == 0:
                self.write(config=config.to_dict(), total_steps=total, data=progress.data)
        self._bar = ProgressBar(
            "train",
            total,
            "step",
            initial=progress.step,
            hidden=bool(config.disable_tqdm) or not is_main,
            line_every=config.logging_steps,
            curves=partial(_curves, progress),
        )

    def step(self, progress: Progress, tokens: int, seconds: float, **figures: float) -> None:
        """Record a step.

        In the file, the loss and further figures of the objective are means over the steps since
        the last line.

        Args:
            progress: The run after the step.
            tokens: Tokens read in the step.
            seconds: Duration of the step.
            **figures: Figures of this step alone, such as `learning_rate`. One that is not finite,
                as the gradient norm of a step that fp16 skipped, is left out of the file.
        """
        self.tokens += tokens
        self.seconds += seconds
        shown = {
            "loss": f"{progress.losses[-1]:.4f}",
            "lr": f"{figures['learning_rate']:.1e}",
            "tok/s": f"{tokens / seconds:.0f}",
        }
        self._bar.update(1, shown)
        if progress.step % self._every != 0:
            return
        record: dict[str, float] = {"step": progress.step}
        for name, values in {"loss": progress.losses, **progress.metrics}.items():
            record[name] = sum(values[-self._every :]) / self._every
        for name, value in figures.items():
            if math.isfinite(value):
                record[name] = value
        record["tokens"] = progress.tokens
        record["tokens_per_second"] = self.tokens_per_second
        self.write(**record)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this session's steps; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def totals(self, progress: Progress, interrupted: bool) -> None:
        """Write the last line of a run: its totals, and the loss of its last step.

        Args:
            progress: The run at its end.
            interrupted: True if Ctrl-C ended the run.
        """
        record: dict[str, Any] = {"steps": progress.step, "tokens": progress.tokens}
        if progress.losses:
            record["last_loss"] = progress.losses[-1]
        self.write(**record, seconds=self.seconds, interrupted=interrupted)

    def write(self, **record: Any) -> None:
        """Write one line; the numbers of a step also go to the trackers.

        Args:
            **record: The fields of the JSON object.
        """
        self.records.append(record)
        if self._file is not None:
            with path_in_errors(Path(self._file.name)):
                self._file.write(json.dumps(record) + "\n")
        if "step" not in record:
            return
        figures = {name: value for name, value in record.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(record["step"], figures)

    def __enter__(self) -> "Log":
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            with path_in_errors(Path(self._file.name)):
                self._file.close()


def _curves(progress: Progress) -> dict[str, Points]:
    """Return the points (step, loss) of the steps and of the evaluations."""
    evals = [(figures["step"], figures["eval_loss"]) for figures in progress.evals]
    return {"loss": list(enumerate(progress.losses, start=1)), "eval_loss": evals}


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the lines of an earlier log up to a step, without totals and incomplete lines."""
    if step == 0 or not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("}\n"):  # cut short by a crash
            continue
        record = json.loads(line)
        if "seconds" not in record and record.get("step", 0) <= step:
            lines.append(line)
    return lines
