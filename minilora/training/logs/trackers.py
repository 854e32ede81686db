"""Experiment trackers: `report_to="wandb, tensorboard, trackio"`, each an optional extra.

Every record of log.jsonl that belongs to a step goes to each tracker, figure by figure, under the
same names. A resumed run continues where the log does: TensorBoard drops later steps, and W&B
continues the run whose id is stored in output_dir. W&B reads its own environment variables;
WANDB_MODE=offline keeps all data on this machine.
"""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.common import write_text
from minilora.common.extras import require
from minilora.training.config import TrainConfig

Figures = dict[str, float]


class Tracker:
    """A tracker of one run.

    Attributes:
        log: Function of (step, figures) that records the figures of a step.
        close: Function that ends the run.
    """

    def __init__(self, log: Callable[[int, Figures], Any], close: Callable[[], Any]):
        """Store the two functions.

        Args:
            log: Records the figures of a step.
            close: Ends the run.
        """
        self.log = log
        self.close = close


def trackers(config: TrainConfig, step: int) -> list[Tracker]:
    """Open the trackers of a run.

    Args:
        config: The run; `report_to` names the trackers.
        step: The step that the run continues from.

    Returns:
        The open trackers, in the order of `report_to`.

    Raises:
        ImportError: If the package of a tracker is not installed.
    """
    check_trackers(config)
    return [_OPEN[name](config, step) for name in config.trackers]


def check_trackers(config: TrainConfig) -> None:
    """Raise an error if the package of a tracker is not installed.

    Args:
        config: The run; `report_to` names the trackers.

    Raises:
        ImportError: If a package is not installed.
    """
    for name in config.trackers:
        require(f"report_to: {name!r}", name)


def _wandb(config: TrainConfig, step: int) -> Tracker:
    """Open a W&B run; a resumed run continues the id that is stored in output_dir."""
    import wandb

    folder = Path(config.output_dir) if config.output_dir else None
    run = wandb.init(
        project="minilora",
        id=_wandb_id(folder, step),
        resume="allow",
        dir=folder,
        config=config.to_dict(),
        name=folder.name if folder else None,
    )

    def log(at: int, figures: Figures) -> None:
        run.log(figures, step=at)

    return Tracker(log, run.finish)


def _wandb_id(folder: Path | None, step: int) -> str:
    """Return the id of a W&B run: the stored one if the run is resumed, else a new one."""
    run_id = uuid.uuid4().hex[:8]
    if folder is None:
        return run_id
    file = folder / "wandb_run_id"
    if step and file.is_file():
        run_id = file.read_text(encoding="utf-8")
    write_text(file, run_id)
    return run_id


def _tensorboard(config: TrainConfig, step: int) -> Tracker:
    """Open a TensorBoard writer in output_dir that drops later steps of an earlier run."""
    from torch.utils.tensorboard import SummaryWriter

    folder = str(Path(config.output_dir) / "tensorboard") if config.output_dir else None
    writer = SummaryWriter(folder, purge_step=step + 1)

    def log(at: int, figures: Figures) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, at)

    return Tracker(log, writer.close)


def _trackio(config: TrainConfig, step: int) -> Tracker:
    """Open a trackio run with the name of output_dir."""
    import trackio

    run = trackio.init(
        project="minilora",
        name=Path(config.output_dir).name if config.output_dir else None,
        resume="allow" if step else "never",
        config=config.to_dict(),
    )

    def log(at: int, figures: Figures) -> None:
        run.log(figures, step=at)

    return Tracker(log, run.finish)


_OPEN = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}
