"""Proves that minilora works without Triton and without the modules of Linux and macOS.

The tests run on Linux: they hide the modules that another system does not have, and make `os` refuse
what Windows refuses. docs/platforms.md states what has run on a real system.
"""

import os
import sys
from pathlib import Path

import pytest

from helpers.source import ROOT
from helpers.tiny import python
from minilora.common import read_tensors, write_tensors

HIDDEN = """
import sys

sys.modules["triton"] = None  # an import raises ModuleNotFoundError, and find_spec returns None
import torch
import torch._dynamo  # for Windows, torch is another build

for name in {hidden!r}:
    sys.modules[name] = None
sys.platform = {platform!r}
sys.path.insert(0, {tests!r})
"""
STEP = """
import minilora as ml
from helpers import toy

model = toy.llama()
ml.quantize_model(model, blocksize=32)
toy.lora(model)
options = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, max_length=64)
folder = sys.argv[1]
result = ml.train(
    model, toy.Letters(), toy.rows(), ml.TrainConfig(output_dir=folder, optim=sys.argv[2], **options)
)
assert result.steps == 3 and result.losses[-1] < result.losses[0], result.losses
ml.save_adapter(model, folder + "/adapter")
other = toy.llama()
ml.quantize_model(other, blocksize=32)
ml.load_adapter(other, folder + "/adapter")
ids = torch.arange(3, 11)[None]
with torch.no_grad():
    assert torch.equal(model(ids), other(ids))
print("trained")
"""


# ---- property


@pytest.mark.slow  # two processes that import torch with its compiler
@pytest.mark.parametrize(
    ("platform", "hidden", "optim"),
    [
        ("linux", [], "adamw_8bit"),
        ("win32", ["resource", "fcntl", "pwd"], "adamw_torch"),
    ],
    ids=["without Triton", "as on Windows"],
)
def test_three_steps_train_with_modules_hidden(platform, hidden, optim, tmp_path: Path):
    tests = str(ROOT / "tests")
    code = HIDDEN.format(hidden=hidden, tests=tests, platform=platform) + STEP
    assert python(code, tmp_path / "out", optim).endswith("trained\n")


def test_files_are_written_where_the_system_opens_no_folder(tmp_path: Path, monkeypatch):
    """Windows opens no folder, and it flushes a file only if the descriptor may write."""
    import torch

    fcntl = pytest.importorskip("fcntl", reason="the real system refuses by itself")
    real_open = os.open
    real_fsync = os.fsync

    def open_file(path, flags, *rest):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags & ~getattr(os, "O_BINARY", 0), *rest)

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_fsync(descriptor)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    file = tmp_path / "a" / "x.safetensors"
    write_tensors(file, {"x": torch.arange(4.0)})
    write_tensors(file, {"x": torch.arange(5.0)})  # replaces the first file
    assert read_tensors(file)["x"].tolist() == [0, 1, 2, 3, 4]
