"""A checkpoint: everything from which a run goes on as if it had never stopped.

    output_dir/checkpoint-N/
        adapter_config.json, adapter_model.safetensors   the adapter in PEFT's format, for use (several: a folder each)
        config.json, model.safetensors                   in their stead the whole model, where that is what trains
        trainer_state.safetensors                        "parameter:<name>", and AdamW's "exp_avg:<name>" ..., in fp32
        trainer_state.json                               step, losses, loss scale, and what the data position rests on

There is no random state to save: the order of the data and the dropout of a step are functions of (seed, step). The
folder appears whole or not at all (common.py), so a crash at any moment leaves the checkpoints before it.
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

STATE, TENSORS = "trainer_state.json", "trainer_state.safetensors"


@dataclass
class Progress:
    """How far a run is. `data` says what step numbers refer to: a run is resumed only where that is the same."""

    data: dict[str, Any]
    step: int = 0  # optimiser steps done
    tokens: int = 0  # read so far, padding aside
    losses: list[float] = field(default_factory=list)  # one a step
    evals: list[dict[str, float]] = field(default_factory=list)  # "step" and the figures of each evaluation
    metrics: dict[str, list[float]] = field(default_factory=dict)  # what else the objective measures, one a step
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16's loss scale


class Checkpoints:
    """The checkpoints of one run in config.output_dir; without one, nothing is written."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 config: TrainConfig, parallel: Process):  # fmt: skip
        self.parallel = parallel
        self.model, self.optimizer, self.scaler, self.config = model, optimizer, scaler, config
        self.folder = Path(config.output_dir) if config.output_dir is not None else None
        self.newest: Path | None = None
        if config.load_best_model_at_end and self.folder is None:
            raise ValueError("load_best_model_at_end takes the best weights from output_dir, which is None: set it.")

    def resume(self, data: dict[str, Any]) -> Progress:
        """Where to go on: at the start, or as `resume_from_checkpoint` says. ValueError where that cannot be."""
        data = data | {"optim": self.config.optim}
        self.newest = find_checkpoint(self.folder, self.config.resume_from_checkpoint)
        if self.newest is None:
            return Progress(data)
        progress = load_checkpoint(self.newest, self.model, self.optimizer, data)
        self.scaler.load_state_dict(progress.scaler)
        return progress

    def due(self, progress: Progress, best: dict[str, float] | None) -> bool:
        """Whether this step is to be kept: every `save_steps`, and the best one where the run is to end with it."""
        every, keep_best = self.config.save_steps, self.config.load_best_model_at_end
        is_best = keep_best and best is not None and best["step"] == progress.step
        return is_best or (every is not None and progress.step % every == 0)

    def save(self, progress: Progress, best: dict[str, float] | None) -> None:
        """Save this step, unless it is saved or nothing was trained, and delete what is not to be kept."""
        if self.folder is None or progress.step == 0 or self.newest == self._of(progress.step):
            return
        progress.scaler = self.scaler.state_dict()
        self.newest = self._of(progress.step)
        kept = {progress.step}  # others may have later steps: those of a run that was resumed from before them
        kept |= {int(best["step"])} if best is not None and self.config.load_best_model_at_end else set()
        with self.parallel.whole(self.optimizer):
            if self.parallel.is_main:
                save_checkpoint(self.newest, self.model, self.optimizer, progress)
                delete_old_checkpoints(self.folder, self.config.save_total_limit, kept)

    def restore(self, step: int) -> None:
        """Put that step's weights, and its moments, back."""
        folder = self._of(step)
        load_checkpoint(folder, self.model, self.optimizer, read_progress(folder).data)

    def _of(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"checkpoint-{step}"


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write `folder`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        tensors[f"parameter:{name}"] = parameter
        tensors |= {f"{key}:{name}": value for key, value in optimizer.state[parameter].items()}
    adapters = sorted({name for layer in model.modules() if isinstance(layer, LoRALayer) for name in layer.active})
    with whole(folder) as temporary:
        temporary.mkdir()
        for name in adapters:
            save_adapter(model, temporary if len(adapters) == 1 else temporary / name, name=name)
        if not adapters and isinstance(model, CausalLM) and all(p.requires_grad for p in model.parameters()):
            save_model(model, temporary)
        write_tensors(temporary / TENSORS, tensors)
        values = asdict(progress) | {"crc32": _crc32(temporary / TENSORS)}
        write_text(temporary / STATE, json.dumps(values, indent=1))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> Progress:
    """Put a checkpoint's weights and moments into model and optimizer. ValueError where they do not belong together.

    The optimizer's parameters are those of `trainable_parameters(model)`.
    """
    progress = read_progress(folder)
    then = progress.data
    if changed := [f"{key} was {then.get(key)}, is {data[key]}" for key in data if then.get(key) != data[key]]:
        raise ValueError(
            f"resume_from_checkpoint: {', '.join(changed)}: step {progress.step} would be another place in the data. "
            f"Resume {folder} with what it was started with."
        )
    state: dict[str, dict[str, Tensor]] = {}  # parameter's name → {"parameter", "step", "exp_avg", "exp_avg_sq"}
    for key, tensor in read_tensors(folder / TENSORS).items():
        kind, _, name = key.partition(":")
        state.setdefault(name, {})[kind] = tensor
    parameters = trainable_parameters(model)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tuple(values["parameter"].shape) for name, values in state.items()}
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        name = different[0]
        raise ValueError(
            f"resume_from_checkpoint: {folder} was trained with other parameters: {name} is {found.get(name)} there, "
            f"{expected.get(name)} here ({len(different)} differ). Inject the adapter with the config of that run."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name].pop("parameter"))
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: state[name] for i, name in enumerate(order)}, "param_groups": groups})
    return progress


def read_progress(folder: Path) -> Progress:
    """How far a checkpoint is. ValueError if it is none, or not as it was written."""
    if not (folder / STATE).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} is no checkpoint: expected {STATE} and {TENSORS} in it.")
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        crc32, progress = values.pop("crc32"), Progress(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}). Resume from an earlier checkpoint.") from error
    if crc32 != _crc32(folder / TENSORS):
        raise ValueError(f"{folder / TENSORS} is damaged. Resume from an earlier checkpoint.")
    return progress


def find_checkpoint(output_dir: Path | None, resume: str | None) -> Path | None:
    """The folder to resume from; "last" passes over damaged ones, and says so.

    ValueError where there is none, or where a new run would mix with an older one's.
    """
    steps = checkpoint_steps(output_dir)
    if resume is None and steps:
        raise ValueError(
            f"output_dir: {output_dir} holds checkpoints of an earlier run, up to step {steps[-1]}. Go on with it by "
            'resume_from_checkpoint="last", or delete it, or name another folder.'
        )
    if resume != "last":
        return Path(resume) if resume is not None else None
    for step in reversed(steps):
        folder = Path(output_dir or "") / f"checkpoint-{step}"
        try:
            read_progress(folder)
            return folder
        except ValueError as error:
            print(f"resume_from_checkpoint: {error}")
    what = "whole checkpoint" if steps else "checkpoint"
    raise ValueError(f'resume_from_checkpoint="last": {output_dir} holds no {what}. Leave it None to start anew.')


def checkpoint_steps(output_dir: Path | None) -> list[int]:
    """The steps that have a checkpoint, in order."""
    names = [path.name for path in output_dir.iterdir()] if output_dir and output_dir.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name)))


def delete_old_checkpoints(output_dir: Path, keep: int | None, kept: Container[int] = ()) -> None:
    """Leave the newest `keep` (None: all) and the steps `kept`, and nothing that a killed run left half-written."""
    for stale in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(stale)
    for step in checkpoint_steps(output_dir)[: -keep if keep else 0]:
        if step not in kept:  # gone at once, and then bit by bit
            os.replace(output_dir / f"checkpoint-{step}", gone := output_dir / f".checkpoint-{step}.tmp")
            shutil.rmtree(gone)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of all that requires grad. ValueError if there is none, or one is not in fp32."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "no parameter of the model requires grad: inject an adapter first, minilora.lora.inject(model, ...)."
        )
    if low := [name for name, p in parameters.items() if p.dtype != torch.float32]:
        raise ValueError(
            f"{low[0]} trains in {parameters[low[0]].dtype}, where small updates round to nothing: expected fp32 "
            f"({len(low)} of {len(parameters)} are not). Cast them with .float(), or freeze them."
        )
    return parameters
