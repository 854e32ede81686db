"""Proves that a killed run, or a run on a full disk, keeps all saved files and leaves none half.

Oracle: the undisturbed run, file by file. Processes really kill themselves (SIGKILL): at seeded
calls of the file system, most of them in the middle of a save, and at seeded times. Writes really
fail: with RLIMIT_FSIZE the kernel refuses longer files.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.toy import Letters, llama, lora, rows
from minilora.lora.files.save_load import save_adapter
from minilora.models import safetensors_writer
from minilora.models.loader import load_model
from minilora.models.save import save_model
from minilora.training import run_folder
from minilora.training.config import TrainConfig
from minilora.training.loop import train

RUN = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 5,
    "lr_scheduler_type": "constant",
    "save_steps": 1,
}
RUN |= {"save_total_limit": 2}
KILLS = [("call", number) for number in random.Random(0).sample(range(1, 200), 4)]
KILLS += [("seconds", random.Random(seed).uniform(0.05, 0.6)) for seed in range(2)]

# Trains without end. The process is killed in the given call of fsync, replace or unlink, or after
# some seconds.
KILLED = """
import os, signal, sys, threading
sys.path[:0] = {path!r}
from tests.training.test_crash import RUN, run
left = {after}
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def doomed(function):
    def call(*arguments, **named):
        global left
        left -= 1
        return kill() if left == 0 else function(*arguments, **named)
    return call
if {what!r} == "seconds":
    threading.Timer(left, kill).start()
else:
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, doomed(getattr(os, name)))
run({folder!r}, 100000)
"""

# Makes a run for each case. When the second step is logged, files become limited to `limit` bytes.
# Prints the errors.
FULL = """
import json, resource, sys
sys.path[:0] = {path!r}
from pathlib import Path
from tests.training.test_crash import FIRST, run
from minilora.training.logs.metrics_log import Log
write, found = Log.write, {{}}
def limited(self, **record):
    if record.get("step") == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    write(self, **record)
Log.write = limited
for file, (method, limit) in FIRST.items():
    try:
        run(Path({folder!r}) / file, 7, method, logging_steps=1)
    except OSError as error:
        found[file] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(found))
"""
FIRST = {  # first file that does not fit -> method of training, limit in bytes
    "log.jsonl": ("lora", 1_000),
    "adapter_model.safetensors": ("lora", 8_000),
    "trainer_state.safetensors": ("lora", 40_000),
    "model.safetensors": ("full", 40_000),
}

# Writes every kind of file twice, the second time with a limit. Prints name -> error, contents
# before and after.
WRITERS = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from tests.training.test_crash import contents, writers
folder, found = Path({folder!r}), {{}}
for name, write in writers(folder).items():
    write(1)
    before, error = contents(folder / name), "none"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        write(2)
    except OSError as failed:
        error = str(failed)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found[name] = error, before, contents(folder / name)
print(json.dumps(found))
"""


def run(folder: object, steps: int, method: str = "lora", **fields):
    """Train a fresh model for so many steps; a LoRA model has dropout."""
    model = lora(dropout=0.3) if method == "lora" else llama()
    config = TrainConfig(output_dir=str(folder), max_steps=steps, method=method, **(RUN | fields))
    return train(model, Letters(), rows(23), config)


def start(script: str, **values: object) -> subprocess.Popen:
    """Start a process with as many threads as this one, so that torch sums in the same order."""
    code = script.format(path=sys.path, **values)
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def state_of(checkpoint: Path) -> dict[str, object]:
    """Return the bytes of each file; of trainer_state.json all but the total number of steps."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["data"]["total_steps"], state["crc32"]
    return found | {"trainer_state.json": state}


def resume(folder: Path, undisturbed: Path, steps: int, method: str = "lora") -> None:
    """Resume to that step and compare the checkpoint with the undisturbed run's, bit for bit.

    Only the total number of steps may differ. No temporary file may be left.
    """
    at = run_folder.checkpoint_steps(folder)
    result = run(folder, steps, method, resume_from_checkpoint="last" if at else None)
    assert result.steps == steps and run_folder.checkpoint_steps(folder)[-1] == steps
    ours = state_of(folder / f"checkpoint-{steps}")
    assert ours == state_of(undisturbed / f"checkpoint-{steps}"), (steps, at)
    assert not [path for path in folder.rglob(".*")]


@pytest.mark.slow
def test_a_run_killed_at_random_and_resumed_equals_an_undisturbed_run(tmp_path):
    processes, reached = {}, {}
    for what, after in KILLS:
        name = f"{what} {after:.3g}"
        processes[name] = start(KILLED, what=what, after=after, folder=str(tmp_path / name))
    for name, process in processes.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode == -9, (name, err)
        reached[name] = (run_folder.checkpoint_steps(tmp_path / name) or [0])[-1]
    assert max(reached.values()) > 2  # some made several steps
    last = max(reached.values()) + 2
    run(tmp_path / "undisturbed", last, save_total_limit=None)
    # some were killed during a save
    assert any(list((tmp_path / name).glob(".checkpoint-*.tmp")) for name in reached)
    for name, step in reached.items():
        resume(tmp_path / name, tmp_path / "undisturbed", step + 2)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_what_was_saved_before(tmp_path):
    out, err = start(FULL, folder=str(tmp_path)).communicate(timeout=120)
    errors = json.loads(out.splitlines()[-1]) if out else pytest.fail(err)
    assert errors.keys() == FIRST.keys()
    for method in ("lora", "full"):
        run(tmp_path / method, 7, method)
    for file, (method, _) in FIRST.items():
        folder = tmp_path / file
        named = errors[file].rpartition("/")[2].strip(".'").removesuffix(".tmp")
        assert "ile too large" in errors[file] and named == file, errors[file]
        assert sorted(path.name for path in folder.iterdir()) == [
            "checkpoint-1",
            "log.jsonl",
            "run.json",
        ]
        resume(folder, tmp_path / method, 7, method)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        # after the resume only every 10th step is logged
        assert [line["step"] for line in lines if "step" in line] == [1]


def writers(folder: Path) -> dict[str, Callable[[int], None]]:
    """Return functions that write files into a folder of their name, with values from a seed."""
    return {
        "adapter": lambda seed: save_adapter(lora(llama(seed)), folder / "adapter"),
        "dense": lambda seed: save_model(llama(seed), folder / "dense"),
        "shards": lambda seed: save_model(llama(seed), folder / "shards", shard_bytes=40_000),
        "gguf": lambda seed: save_model(llama(seed), folder / "gguf", format="gguf"),
    }


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of each file in a folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_a_full_disk_leaves_the_old_files_of_every_kind(tmp_path):
    out, err = start(WRITERS, folder=str(tmp_path)).communicate(timeout=120)
    assert not err, err
    for name, (error, before, after) in json.loads(out).items():
        assert "ile too large" in error or "requested and" in error, (name, error)
        assert str(tmp_path / name) in error, error
        assert before == after, name


def test_a_run_resumed_from_an_early_step_keeps_its_checkpoints(tmp_path):
    """The folder also has later steps of the run before, which are the newest by number."""
    run(tmp_path, 6, save_total_limit=None)
    early = str(tmp_path / "checkpoint-2")
    result = run(tmp_path, 4, resume_from_checkpoint=early, save_total_limit=1)
    assert result.checkpoint == tmp_path / "checkpoint-4" and result.checkpoint.is_dir()
    assert run_folder.checkpoint_steps(tmp_path) == [4, 6]


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_a_crash_between_two_shards_never_leaves_a_mixture(tmp_path, monkeypatch, moment):
    """The new shards have the names of the old ones.

    While they are written, the old model is intact. While they are moved, there is no model.
    """
    writers(tmp_path)["shards"](1)
    folder, calls = tmp_path / "shards", []
    before = contents(folder)
    owner, name = (
        (safetensors_writer, "_write_safetensors") if moment == "writing" else (os, "replace")
    )
    real = getattr(owner, name)

    def crash(path, other, *rest):
        if moment == "writing" or (other.parent == folder and other.name in before):
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return real(path, other, *rest)

    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(KeyboardInterrupt):
        writers(tmp_path)["shards"](2)
    monkeypatch.undo()
    if moment == "writing":
        assert contents(folder) == before
    else:
        with pytest.raises(ValueError, match="holds no weights: expected"):
            load_model(folder)
    writers(tmp_path)["shards"](2)
    assert contents(folder).keys() == before.keys()
    for name, value in load_model(folder, dtype="float32", device="cpu").state_dict().items():
        assert torch.equal(value, llama(2).state_dict()[name])
