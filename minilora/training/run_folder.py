"""The checkpoints of a run in its folder: when to write one, which to keep, which to resume from."""

import os
import re
import shutil
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.common import check_writable
from minilora.training.checkpoint import (
    Progress,
    load_checkpoint,
    read_progress,
    save_checkpoint,
    write_progress,
)
from minilora.training.config import TrainConfig
from minilora.training.folder_lock import folder_lock
from minilora.training.optim.lr_schedule import learning_rate
from minilora.training.process import Process, is_main_process

# The options that each update depends on. A run is resumed with the same ones.
OPTIMISATION = (
    "optim",
    "learning_rate",
    "loraplus_lr_ratio",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
)


class Checkpoints:
    """The checkpoints of one run in `config.output_dir`; without a folder nothing is written.

    Attributes:
        newest: The newest checkpoint, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: TrainConfig,
        parallel: Process,
    ):
        """Prepare the checkpoints of a run; write nothing.

        Args:
            model: The model that was passed to `train`.
            optimizer: The optimiser over its trainable parameters.
            scaler: The loss scaler.
            config: The run.
            parallel: This process; only the main one writes.

        Raises:
            ValueError: If `load_best_model_at_end` is set without an `output_dir`.
        """
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.config = config
        self.parallel = parallel
        self.folder = None if config.output_dir is None else Path(config.output_dir)
        self.newest: Path | None = None
        if config.load_best_model_at_end and self.folder is None:
            raise ValueError(
                "load_best_model_at_end takes the best weights from output_dir, which is None: "
                "set it."
            )

    def resume(self, data: dict[str, Any], total: int) -> Progress:
        """Return the progress to continue from, and load its weights and moments.

        Args:
            data: The values that give a step number its meaning.
            total: Steps of the run.

        Returns:
            The progress of the checkpoint in `resume_from_checkpoint`, or that of a new run.

        Raises:
            ValueError: If the checkpoint does not exist, is damaged or belongs to another run.
        """
        data = data | {name: getattr(self.config, name) for name in OPTIMISATION}
        self.newest = find_checkpoint(self.folder, self.config.resume_from_checkpoint)
        if self.newest is None:
            return Progress(data | {"total_steps": total})
        progress = load_checkpoint(self.newest, self.model, self.optimizer, data)
        self.scaler.load_state_dict(progress.scaler)
        _warn_of_another_length(self.config, progress, total)
        progress.data["total_steps"] = total
        return progress

    @property
    def keeps_best(self) -> bool:
        """True if the best step is saved, and its weights are loaded at the end."""
        return self.folder is not None and self.config.load_best_model_at_end

    def check_best(self, best: dict[str, float] | None) -> None:
        """Refuse to resume a run whose best step so far has no checkpoint.

        Args:
            best: The best evaluation of the checkpoint that the run continues from, or None.

        Raises:
            ValueError: If `load_best_model_at_end` could not load this step at the end.
        """
        if best is None or not self.keeps_best:
            return
        folder = self._folder_of(int(best["step"]))
        if not folder.is_dir():
            raise ValueError(
                f"load_best_model_at_end: the best step so far is {int(best['step'])}, and "
                f"{folder} does not exist. Copy that checkpoint into output_dir, or set "
                "load_best_model_at_end to False."
            )

    def due(self, progress: Progress) -> bool:
        """Return True if this step is to be saved: every `save_steps`.

        Args:
            progress: The run.
        """
        every = self.config.save_steps
        return every is not None and progress.step % every == 0

    def save_figures(self, progress: Progress) -> None:
        """Add the figures of an evaluation to the checkpoint of this step, if it is saved.

        Args:
            progress: The run.
        """
        if self.folder is None:
            return
        folder = self._folder_of(progress.step)
        if self.newest == folder and self.parallel.is_main:
            write_progress(folder, progress)

    def save(self, progress: Progress, best: dict[str, float] | None) -> Path | None:
        """Save this step and delete the checkpoints that are not to be kept.

        Nothing happens at step 0, or if the step is already saved.

        Args:
            progress: The run.
            best: The best evaluation so far; its checkpoint is kept with `load_best_model_at_end`.

        Returns:
            The checkpoint, if this call wrote it; else None.
        """
        if self.folder is None or progress.step == 0:
            return None
        folder = self._folder_of(progress.step)
        is_new = self.newest != folder
        if is_new:
            self._write(folder, progress)
        # Later steps can exist: a run that is resumed from an early checkpoint leaves them there.
        protected = {progress.step}
        if best is not None and self.config.load_best_model_at_end:
            protected.add(int(best["step"]))
        if self.parallel.is_main:
            delete_old_checkpoints(self.folder, self.config.save_total_limit, protected)
        return folder if is_new else None

    def _write(self, folder: Path, progress: Progress) -> None:
        """Write the checkpoint of this step."""
        progress.scaler = self.scaler.state_dict()
        with self.parallel.full_tensors(self.optimizer):
            if self.parallel.is_main:
                save_checkpoint(folder, self.model, self.optimizer, progress)
        self.newest = folder

    def restore(self, step: int) -> None:
        """Load the weights and moments of a saved step.

        Args:
            step: A step with a checkpoint.
        """
        folder = self._folder_of(step)
        load_checkpoint(folder, self.model, self.optimizer, read_progress(folder).data)

    def _folder_of(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        assert self.folder is not None
        return self.folder / f"checkpoint-{step}"


def _warn_of_another_length(config: TrainConfig, progress: Progress, total: int) -> None:
    """Warn if a resumed run has another number of steps, and so other learning rates."""
    before = progress.data.get("total_steps", total)  # older checkpoints have no such value
    for step in range(min(before, total)):
        rate = learning_rate(config, step, total)
        earlier = learning_rate(config, step, before)
        if rate != earlier:
            warnings.warn(
                f"resume_from_checkpoint: the run had {before} steps in all and has {total} now. "
                f"The {config.lr_scheduler_type} schedule and its warm-up follow the new number, so "
                f"this run does not equal one that was never stopped: step {step + 1}, for "
                f"example, had the rate {earlier:.3g} and would have {rate:.3g}.",
                stacklevel=2,
            )
            return


def find_checkpoint(output_dir: Path | None, resume: str | None) -> Path | None:
    """Return the checkpoint to resume from.

    Args:
        output_dir: Folder of the run's checkpoints.
        resume: A checkpoint, None for a new run, or "last" for the newest in `output_dir` that is
            not damaged. Each damaged one is reported.

    Returns:
        A folder, or None for a new run.

    Raises:
        ValueError: If `resume` is "last" and no checkpoint is usable, or if it is None and
            `output_dir` contains checkpoints of an earlier run.
    """
    steps = checkpoint_steps(output_dir)
    if resume is None and steps:
        raise ValueError(
            f"output_dir: {output_dir} holds checkpoints of an earlier run, up to step "
            f'{steps[-1]}. Continue it with resume_from_checkpoint="last", or delete the folder, '
            "or choose another one."
        )
    if resume is None:
        return None
    if resume != "last":
        return Path(resume)
    for step in reversed(steps):
        folder = Path(output_dir or "") / f"checkpoint-{step}"
        try:
            read_progress(folder)
            return folder
        except ValueError as error:
            print(f"resume_from_checkpoint: {error}")
    missing = "undamaged checkpoint" if steps else "checkpoint"
    raise ValueError(
        f'resume_from_checkpoint="last": {output_dir} holds no {missing}. Leave it out to start a '
        "new run."
    )


@contextmanager
def checked_folder(config: TrainConfig) -> Iterator[None]:
    """Check the folder of a run, and keep other runs out of it inside the block.

    With several processes, the main one holds the lock.

    Args:
        config: The options of the run; without an `output_dir` only the checkpoint to resume from
            is checked.

    Raises:
        ValueError: If the folder cannot be written, another run is writing to it, it contains an
            earlier run that is not resumed, or there is nothing to resume.
    """
    lock = nullcontext()
    if config.output_dir is not None and is_main_process():
        folder = Path(config.output_dir)
        check_writable(folder, "output_dir")
        lock = folder_lock(folder)
    with lock:
        check_resumable(config.output_dir, config.resume_from_checkpoint)
        yield


def check_resumable(output_dir: str | None, resume: str | None) -> None:
    """Check that a checkpoint exists for a run to resume, or that a new run overwrites none.

    Damage is found when the run begins.

    Args:
        output_dir: Folder of the run's checkpoints.
        resume: A checkpoint, "last", or None for a new run.

    Raises:
        ValueError: If there is nothing to resume, or `output_dir` contains an earlier run.
    """
    folder = None if output_dir is None else Path(output_dir)
    if resume is None or (resume == "last" and not checkpoint_steps(folder)):
        find_checkpoint(folder, resume)  # raises, unless the run is new and its folder free
    elif resume != "last" and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {resume}. Expected the folder of a "
            f"checkpoint, such as {Path(output_dir or 'OUTPUT_DIR', 'checkpoint-100')}, or "
            '"last".'
        )


def checkpoint_steps(output_dir: Path | None) -> list[int]:
    """Return the steps that have a checkpoint, in order.

    Args:
        output_dir: Folder of a run; it need not exist.
    """
    if output_dir is None or not output_dir.is_dir():
        return []
    steps = []
    for path in output_dir.iterdir():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            steps.append(int(match[1]))
    return sorted(steps)


def delete_old_checkpoints(
    output_dir: Path, keep: int | None, protected: Container[int] = ()
) -> None:
    """Delete old checkpoints, and the remains of a save that was killed.

    Args:
        output_dir: Folder of the run.
        keep: Number of newest checkpoints to keep; None keeps all.
        protected: Steps that are kept in any case.
    """
    for remains in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(remains)
    if keep is None:
        return
    for step in checkpoint_steps(output_dir)[:-keep]:
        if step in protected:
            continue
        # The rename removes the checkpoint in one operation; the deletion may be interrupted.
        folder = output_dir / f".checkpoint-{step}.tmp"
        os.replace(output_dir / f"checkpoint-{step}", folder)
        shutil.rmtree(folder)
