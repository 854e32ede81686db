"""The facts of a run, in output_dir/run.json: every option, the model, the data, the versions.

    model         source, type, dtype, storage, trainable and total parameters
    adapters      the LoRAConfig of each adapter
    objective     the loss and its options
    dataset       path or kind, number of samples, hash of their content; also for held-out rows
    config        every field of TrainConfig
    versions      minilora, Python, torch
    device        device of the model; processes: their number

`minilora runs` and `compare_runs` read this file. A resumed run writes it again.
"""

import json
import platform
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.common import __version__, read_json, write_text
from minilora.lora.registry import lora_configs
from minilora.models.parameter_count import count_parameters
from minilora.quant.storage import base_storage
from minilora.training.config import TrainConfig

FILE = "run.json"


def describe_run(
    model: nn.Module,
    dataset: Any,
    eval_dataset: Any,
    objective: Any,
    config: TrainConfig,
    **data: Any,
) -> dict[str, Any]:
    """Return the facts of a run as plain values.

    Args:
        model: The model to be trained, without wrappers.
        dataset: The rows as given to `train`.
        eval_dataset: The held-out rows as given to `train`.
        objective: The objective of the run.
        config: The options of the run.
        **data: Facts about the encoded rows, such as their number.
    """
    count = count_parameters(model)
    parameter = next(model.parameters())
    model_config = getattr(model, "config", None)
    source = getattr(model, "name_or_path", None) or getattr(model_config, "_name_or_path", None)
    return {
        "model": {
            "source": source,
            "type": getattr(model_config, "model_type", type(model).__name__),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "storage": base_storage(model),
            "trainable": count.trainable,
            "total": count.total,
        },
        "adapters": {name: values.to_dict() for name, values in lora_configs(model).items()},
        "objective": _objective(objective),
        "dataset": _source(dataset) | data,
        "eval_dataset": None if eval_dataset is None else _source(eval_dataset),
        "config": config.to_dict(),
        "versions": {
            "minilora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "device": str(parameter.device),
    }


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts of a run.

    Args:
        folder: The run's output_dir.
        facts: The facts, from `describe_run`.
    """
    write_text(folder / FILE, json.dumps(facts, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the facts of a run; empty for the folder of an earlier version.

    Args:
        folder: The run's output_dir.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / FILE
    return read_json(path) if path.is_file() else {}


def _objective(objective: Any) -> dict[str, Any]:
    """Return the name of an objective, and its options that JSON can hold."""
    facts: dict[str, Any] = {"name": type(objective).__name__}
    if not is_dataclass(objective):
        return facts
    for name, value in vars(objective).items():
        if isinstance(value, str | int | float | bool | list | None):
            facts[name] = value
    return facts


def _source(dataset: Any) -> dict[str, Any]:
    """Return where rows come from: a path, the names of several sets, or the kind of object."""
    if isinstance(dataset, str | Path):
        return {"source": str(dataset)}
    if isinstance(dataset, dict):
        return {"source": {name: _source(rows)["source"] for name, rows in dataset.items()}}
    return {"source": type(dataset).__name__}
