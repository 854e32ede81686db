"""Checkpoints, from which a run continues as if it had never stopped.

    output_dir/checkpoint-N/
        adapter_config.json, adapter_model.safetensors   the adapter as PEFT files (for several
                                                         adapters, a folder each)
        config.json, model.safetensors                   instead: the model, if every parameter is
                                                         trained
        trainer_state.safetensors                        "parameter:<name>" and the optimiser's
                                                         "exp_avg:<name>", ..., parameters in fp32
        trainer_state.json                               step, losses, loss scale, and the values
                                                         that a position in the data depends on

No random state is saved: the order of the data and the dropout of a step are functions of
(seed, step). The folder is written atomically (`common.py`), so a crash at any moment leaves the
earlier checkpoints unchanged.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import read_tensors, whole, write_tensors, write_text
from minilora.lora.files.save_load import save_adapter
from minilora.lora.layer import LoRALayer
from minilora.models.decoder import CausalLM
from minilora.models.save import save_model
from minilora.training.config import TrainConfig
from minilora.training.process import Process

STATE = "trainer_state.json"
TENSORS = "trainer_state.safetensors"


@dataclass
class Progress:
    """The progress of a run, as trainer_state.json stores it.

    Attributes:
        data: The values that give a step number its meaning. A run is resumed only if they are
            the same.
        step: Optimiser steps done.
        tokens: Tokens read, without padding.
        losses: The loss of each step.
        evals: The figures of each evaluation, and its "step".
        metrics: Further figures of the objective, one list each, with one value a step.
        scaler: State of fp16's loss scaler.
    """

    data: dict[str, Any]
    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


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

    def resume(self, data: dict[str, Any]) -> Progress:
        """Return the progress to continue from, and load its weights and moments.

        Args:
            data: The values that give a step number its meaning.

        Returns:
            The progress of the checkpoint in `resume_from_checkpoint`, or that of a new run.

        Raises:
            ValueError: If the checkpoint does not exist, is damaged or belongs to another run.
        """
        data = data | {"optim": self.config.optim}
        self.newest = find_checkpoint(self.folder, self.config.resume_from_checkpoint)
        if self.newest is None:
            return Progress(data)
        progress = load_checkpoint(self.newest, self.model, self.optimizer, data)
        self.scaler.load_state_dict(progress.scaler)
        return progress

    def due(self, progress: Progress, best: dict[str, float] | None) -> bool:
        """Return True if this step is to be saved: every `save_steps`, and the best step.

        Args:
            progress: The run.
            best: The best evaluation so far. It counts with `load_best_model_at_end` only.
        """
        if self.config.load_best_model_at_end and best is not None:
            if best["step"] == progress.step:
                return True
        every = self.config.save_steps
        return every is not None and progress.step % every == 0

    def save(self, progress: Progress, best: dict[str, float] | None) -> None:
        """Save this step and delete the checkpoints that are not to be kept.

        Nothing happens at step 0, or if the step is already saved.

        Args:
            progress: The run.
            best: The best evaluation so far; its checkpoint is kept with `load_best_model_at_end`.
        """
        if self.folder is None or progress.step == 0:
            return
        folder = self._folder_of(progress.step)
        if self.newest == folder:
            return
        progress.scaler = self.scaler.state_dict()
        self.newest = folder
        # Later steps can exist: a run that is resumed from an early checkpoint leaves them there.
        protected = {progress.step}
        if best is not None and self.config.load_best_model_at_end:
            protected.add(int(best["step"]))
        with self.parallel.full_tensors(self.optimizer):
            if self.parallel.is_main:
                save_checkpoint(folder, self.model, self.optimizer, progress)
                delete_old_checkpoints(self.folder, self.config.save_total_limit, protected)

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


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint, completely or not at all.

    Args:
        folder: Folder to write.
        model: The model; its trainable parameters are saved.
        optimizer: The optimiser, for its moments.
        progress: The run.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        tensors[f"parameter:{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}:{name}"] = value
    with whole(folder) as temporary:
        temporary.mkdir()
        _save_weights(temporary, model)
        write_tensors(temporary / TENSORS, tensors)
        values = asdict(progress)
        values["crc32"] = _crc32(temporary / TENSORS)
        write_text(temporary / STATE, json.dumps(values, indent=1))


def _save_weights(folder: Path, model: nn.Module) -> None:
    """Save the active adapters, or a model whose every parameter trains, for use elsewhere."""
    names: set[str] = set()
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            names.update(layer.active)
    for name in sorted(names):
        save_adapter(model, folder if len(names) == 1 else folder / name, name=name)
    if names or not isinstance(model, CausalLM):
        return
    if all(parameter.requires_grad for parameter in model.parameters()):
        save_model(model, folder)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any]
) -> Progress:
    """Load the weights and moments of a checkpoint.

    Args:
        folder: The checkpoint.
        model: A model with the trainable parameters of the saved run.
        optimizer: An optimiser over `trainable_parameters(model)`.
        data: The values that give a step number its meaning; they must equal those of the
            checkpoint.

    Returns:
        The progress of the saved run.

    Raises:
        ValueError: If the checkpoint is damaged, or belongs to other data or other parameters.
    """
    progress = read_progress(folder)
    _check_data(folder, progress, data)
    state = _read_state(folder)
    parameters = trainable_parameters(model)
    _check_shapes(folder, parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name].pop("parameter"))
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = []
    for group in optimizer.param_groups:
        order += [names[id(parameter)] for parameter in group["params"]]
    moments = {index: state[name] for index, name in enumerate(order)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return progress


def _read_state(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return {parameter name: {"parameter", "step", "exp_avg", "exp_avg_sq", ...}}."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / TENSORS).items():
        kind, _, name = key.partition(":")
        state.setdefault(name, {})[kind] = tensor
    return state


def _check_data(folder: Path, progress: Progress, data: dict[str, Any]) -> None:
    """Refuse a checkpoint whose step number means another position in the data."""
    changes = []
    for name, value in data.items():
        saved = progress.data.get(name)
        if saved != value:
            changes.append(f"{name} was {saved}, is {value}")
    if changes:
        raise ValueError(
            f"resume_from_checkpoint: {', '.join(changes)}: step {progress.step} would be another "
            f"place in the data. Resume {folder} with the options that it was started with."
        )


def _check_shapes(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    state: dict[str, dict[str, Tensor]],
) -> None:
    """Refuse a checkpoint with other trainable parameters, by name or shape."""
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = {name: tuple(values["parameter"].shape) for name, values in state.items()}
    names = sorted(expected | saved)
    different = [name for name in names if expected.get(name) != saved.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"resume_from_checkpoint: {folder} was trained with other parameters: {name} is "
            f"{saved.get(name)} there, {expected.get(name)} here ({len(different)} differ). Inject "
            "the adapter with the config of that run."
        )


def read_progress(folder: Path) -> Progress:
    """Return the progress that a checkpoint stores.

    Args:
        folder: The checkpoint.

    Returns:
        The progress of the saved run.

    Raises:
        ValueError: If the folder is not a checkpoint, or its files are damaged.
    """
    if not (folder / STATE).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder} is not a checkpoint: expected {STATE} and {TENSORS} "
            "in it."
        )
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        crc32 = values.pop("crc32")
        progress = Progress(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / STATE} is damaged ({error}). Resume from an earlier checkpoint."
        ) from error
    if crc32 != _crc32(folder / TENSORS):
        raise ValueError(f"{folder / TENSORS} is damaged. Resume from an earlier checkpoint.")
    return progress


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
        f'resume_from_checkpoint="last": {output_dir} holds no {missing}. Leave it None to start a '
        "new run."
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


def _crc32(path: Path) -> int:
    """Return the CRC-32 of a file, read in parts of 4 MiB."""
    crc = 0
    with path.open("rb") as file:
        while True:
            part = file.read(1 << 22)
            if not part:
                return crc
            crc = zlib.crc32(part, crc)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad, by name.

    Args:
        model: The model to be trained.

    Returns:
        At least one parameter, all in fp32.

    Raises:
        ValueError: If no parameter requires grad, or one that does is not in fp32.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "no parameter of the model requires grad: inject an adapter first, "
            "minilora.inject(model, ...)."
        )
    other_dtypes = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if other_dtypes:
        name = other_dtypes[0]
        raise ValueError(
            f"{name} trains in {parameters[name].dtype}, where small updates round to nothing: "
            f"expected fp32 ({len(other_dtypes)} of {len(parameters)} are not). Cast them with "
            ".float(), or freeze them."
        )
    return parameters
