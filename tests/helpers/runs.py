"""Run folders as `minilora train` writes them, for the tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from helpers.chats import furnish
from helpers.kinds import shake


def make_runs(folder: Path, **datasets: list[dict]) -> Path:
    """Write a model, datasets, and two runs: out/adapter, trained in NF4, and full/model."""
    furnish(folder, **datasets)
    model = ml.load_model(
        folder / "model", quantize="nf4", double_quant=False, blocksize=32, dtype="float32"
    )
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"]))
    shake(model)
    ml.save_adapter(model, folder / "out" / "adapter")
    shutil.copytree(folder / "model", folder / "full" / "model")
    return folder


def broken_run(folder: Path, target: Path, base: Any) -> Path:
    """Copy the run out/ into another folder, with another base in its config."""
    shutil.copytree(folder / "out", target / "run")
    path = target / "run" / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values))
    return target / "run"


def same_state(one: Any, other: Any) -> bool:
    """Return True if two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
