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
(seed, step). The folder is written atomically (`common/atomic_files.py`), so a crash at any moment leaves the
earlier checkpoints unchanged.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import (
    atomic_write,
    named_parameters,
    read_tensors,
    write_tensors,
    write_text,
)
from minilora.lora.files.save_load import save_adapter
from minilora.lora.layer import LoRALayer
from minilora.models.decoder import CausalLM
from minilora.models.save import save_model

STATE = "trainer_state.json"
TENSORS = "trainer_state.safetensors"
# The values of Progress.data that the position in the data depends on; the others are options.
POSITION = (
    "samples",
    "tokens",
    "samples_per_step",
    "group_by_length",
    "packing",
    "seed",
    "rows",
)


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
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        _save_weights(temporary, model)
        write_tensors(temporary / TENSORS, tensors)
        write_progress(temporary, progress)


def write_progress(folder: Path, progress: Progress) -> None:
    """Write trainer_state.json of a checkpoint whose tensors are written.

    Args:
        folder: The checkpoint.
        progress: The run.
    """
    values = asdict(progress)
    values["crc32"] = _crc32(folder / TENSORS)
    write_text(folder / STATE, json.dumps(values, indent=1))


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
    """Refuse a checkpoint of other rows or options; older ones do not have every value."""
    changes = []
    moved = False  # True if the step number means another position in the data
    for name, value in data.items():
        saved = progress.data.get(name, value)
        if saved == value:
            continue
        if name == "rows":
            changes.append("the rows or their order changed")
        else:
            changes.append(f"{name} was {saved}, is {value}")
        moved = moved or name in POSITION
    if not changes:
        return
    problem = "the steps that are left would not continue this run"
    if moved:
        problem = f"step {progress.step} would be another place in the data"
    raise ValueError(
        f"resume_from_checkpoint: {', '.join(changes)}: {problem}. Resume {folder} with the rows and "
        "options that it was started with. For other options, start a new run from its weights: "
        "minilora.load_adapter(model, checkpoint) instead of inject."
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
    parameters = {name: p for name, p in named_parameters(model) if p.requires_grad}
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
