"""Where else a run is shown: `report_to="wandb, tensorboard, trackio"`, each an optional extra that is imported here.

Every record of log.jsonl that belongs to a step goes to each of them, figure by figure under the same names. A resumed
run goes on where the log does: TensorBoard drops later steps, W&B continues the run whose id lies in output_dir.
W&B asks its own environment (WANDB_MODE=offline keeps everything here).
"""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.common import write_text
from minilora.training.config import TrainConfig

Figures = dict[str, float]


class Tracker:
    """`log(step, figures)` while the run goes, `close()` at its end."""

    def __init__(self, log: Callable[[int, Figures], Any], close: Callable[[], Any]):
        self.log, self.close = log, close


def trackers(config: TrainConfig, step: int) -> list[Tracker]:
    """Those that `report_to` names, opened for a run that stands at `step`. ValueError for one not installed."""
    found = []
    for name in config.trackers:
        try:
            found.append(_OPEN[name](config, step))
        except ImportError as error:
            raise ValueError(f"report_to: {name} is not installed ({error}): pip install 'minilora[track]'.") from error
    return found


def _wandb(config: TrainConfig, step: int) -> Tracker:
    import wandb

    folder = Path(config.output_dir) if config.output_dir else None
    note = folder / "wandb_run_id" if folder else None
    run_id = note.read_text(encoding="utf-8") if note and step and note.is_file() else uuid.uuid4().hex[:8]
    if note:
        write_text(note, run_id)
    run = wandb.init(
        project="minilora", id=run_id, resume="allow", dir=folder, config=config.to_dict(), name=folder and folder.name
    )
    return Tracker(lambda at, figures: run.log(figures, step=at), run.finish)


def _tensorboard(config: TrainConfig, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(config.output_dir and str(Path(config.output_dir) / "tensorboard"), purge_step=step + 1)

    def log(at: int, figures: Figures) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, at)

    return Tracker(log, writer.close)


def _trackio(config: TrainConfig, step: int) -> Tracker:
    import trackio

    name = Path(config.output_dir).name if config.output_dir else None
    run = trackio.init(project="minilora", name=name, resume="allow" if step else "never", config=config.to_dict())
    return Tracker(lambda at, figures: run.log(figures, step=at), run.finish)


_OPEN = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}
