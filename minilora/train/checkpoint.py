"""A checkpoint: everything from which a run goes on as if it had never stopped.

    output_dir/checkpoint-N/
        adapter_config.json, adapter_model.safetensors   the adapter in PEFT's format, for use (several: a folder each)
        trainer_state.safetensors                        "parameter:<name>", and AdamW's "exp_avg:<name>" ..., in fp32
        trainer_state.json                               step, losses, loss scale, and what the data position rests on

There is no random state to save: the order of the data and the dropout of a step are functions of (seed, step). The
folder appears whole or not at all (storage.py), so a crash at any moment leaves the checkpoints before it.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import save_adapter
from minilora.lora import LoRALayer
from minilora.storage import read_tensors, whole, write_tensors, write_text

STATE, TENSORS = "trainer_state.json", "trainer_state.safetensors"


@dataclass
class Progress:
    """How far a run is. `data` says what step numbers refer to: a run is resumed only where that is the same."""

    data: dict[str, Any]
    step: int = 0  # optimiser steps done
    tokens: int = 0  # read so far, padding aside
    losses: list[float] = field(default_factory=list)  # one a step
    eval_losses: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16's loss scale


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
        write_tensors(temporary / TENSORS, tensors)
        write_text(temporary / STATE, json.dumps(asdict(progress), indent=1))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> Progress:
    """Put a checkpoint's weights and moments into model and optimizer. ValueError where they do not belong together.

    The optimizer's parameters are those of `trainable_parameters(model)`, in that order.
    """
    if not (folder / STATE).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} is no checkpoint: expected {STATE} and {TENSORS} in it.")
    progress = Progress(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    progress.eval_losses = [(step, loss) for step, loss in progress.eval_losses]
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
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: state[name] for i, name in enumerate(parameters)}, "param_groups": groups})
    return progress


def find_checkpoint(output_dir: Path | None, resume: str | None) -> Path | None:
    """The folder to resume from. ValueError where there is none, or where a new run would mix with an older one's."""
    steps = checkpoint_steps(output_dir)
    if resume is None and steps:
        raise ValueError(
            f"output_dir: {output_dir} holds checkpoints of an earlier run, up to step {steps[-1]}. Go on with it by "
            'resume_from_checkpoint="last", or delete it, or name another folder.'
        )
    if resume != "last":
        return Path(resume) if resume is not None else None
    if output_dir is None or not steps:
        raise ValueError(
            f'resume_from_checkpoint="last": {output_dir} holds no checkpoint. Leave it None to start anew.'
        )
    return output_dir / f"checkpoint-{steps[-1]}"


def checkpoint_steps(output_dir: Path | None) -> list[int]:
    """The steps that have a checkpoint, in order."""
    names = [path.name for path in output_dir.iterdir()] if output_dir and output_dir.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name)))


def delete_old_checkpoints(output_dir: Path, keep: int | None) -> None:
    """Leave the newest `keep` (None: all), and nothing that a killed run left half-written."""
    for stale in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(stale)
    for step in checkpoint_steps(output_dir)[: -keep if keep else 0]:
        shutil.rmtree(output_dir / f"checkpoint-{step}")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of all that requires grad. ValueError if there is none, or one is not in fp32."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "no parameter of the model requires grad: inject an adapter first, minilora.inject(model, ...)."
        )
    if low := [name for name, p in parameters.items() if p.dtype != torch.float32]:
        raise ValueError(
            f"{low[0]} trains in {parameters[low[0]].dtype}, where small updates round to nothing: expected fp32 "
            f"({len(low)} of {len(parameters)} are not). Cast them with .float(), or freeze them."
        )
    return parameters
