"""What a run says while it goes: one JSON object a line in output_dir/log.jsonl, and a progress bar on a terminal.

The first line holds the config; then come {"step", "loss", "learning_rate", ...} every `logging_steps` and {"step",
"eval_loss"}; the last line holds the totals. What belongs to a step also goes to the trackers of `report_to`. A resumed
run keeps the lines up to its checkpoint and continues the file, so that every step stands there once.
"""

import json
import math
from pathlib import Path
from typing import Any

from minilora.common import naming, write_text
from minilora.training.checkpoint import Progress
from minilora.training.config import TrainConfig
from minilora.training.trackers import trackers


class Log:
    """Also the clock: `tokens_per_second` of this session's steps, without evaluation and saving."""

    def __init__(self, progress: Progress, total: int, config: TrainConfig, is_main: bool = True):
        from tqdm import tqdm

        self.path = Path(config.output_dir) / "log.jsonl" if config.output_dir and is_main else None
        self.every, self.tokens, self.seconds, self.file = config.logging_steps, 0, 0.0, None
        self.trackers: list[Any] = []
        if is_main and config.trackers:
            self.trackers = trackers(config, progress.step)
        if self.path is not None:
            write_text(self.path, "".join(_lines_until(self.path, progress.step)))
            self.file = self.path.open("a", buffering=1, encoding="utf-8")  # line by line: a crash loses none
            if progress.step == 0:
                self.write(config=config.to_dict(), total_steps=total, data=progress.data)
        off = config.disable_tqdm if is_main else True
        self.bar = tqdm(initial=progress.step, total=total, unit="step", disable=off, dynamic_ncols=True)

    def step(self, progress: Progress, tokens: int, seconds: float, **figures: float) -> None:
        """A step is done: in the file, `loss` and what else the objective measures are means since the line before.

        figures: of this step alone; an infinite one (fp16 skipped the step) is left out of the file.
        """
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        shown = {
            "loss": f"{progress.losses[-1]:.4f}",
            "lr": f"{figures['learning_rate']:.1e}",
            "tok/s": f"{tokens / seconds:.0f}",
        }
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if progress.step % self.every == 0:
            series = {"loss": progress.losses, **progress.metrics}
            means = {name: sum(values[-self.every :]) / self.every for name, values in series.items()}
            figures = {name: value for name, value in figures.items() if math.isfinite(value)}
            total = {"tokens": progress.tokens, "tokens_per_second": self.tokens_per_second}
            self.write(step=progress.step, **means, **figures, **total)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def write(self, **record: Any) -> None:
        """One line; the numbers of a step go to the trackers too."""
        if self.file is not None:
            with naming(Path(self.file.name)):
                self.file.write(json.dumps(record) + "\n")
        if "step" in record:
            figures = {name: value for name, value in record.items() if name != "step"}
            for tracker in self.trackers:
                tracker.log(record["step"], figures)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if self.file is not None:
            with naming(Path(self.file.name)):
                self.file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """An earlier log up to `step`: without later steps, the totals, or a line that a crash cut short."""
    if step == 0 or not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
    return [line for line in whole if "seconds" not in (record := json.loads(line)) and record.get("step", 0) <= step]
