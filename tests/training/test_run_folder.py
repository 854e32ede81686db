"""Proves that a run refuses a folder that it must not use, before it reads its data.

One of these folders is that of another run which has not ended: it is locked until its process ends.
"""

import re
import signal
import subprocess
import sys

import pytest

from helpers.toy import FAST, Letters, lora, rows
from minilora.training import folder_lock
from minilora.training.config import TrainConfig
from minilora.training.folder_lock import LOCK_FILE
from minilora.training.loop import train
from minilora.training.run_folder import checkpoint_steps


def unread():
    """Return rows that must not be read."""
    raise AssertionError("the rows were read")
    yield


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("a_file", {}, "output_dir: .*a_file is not writable .* Choose another folder"),
        ("earlier", {}, "holds checkpoints of an earlier run, up to step 3"),
        ("new", {"resume_from_checkpoint": "last"}, "holds no checkpoint"),
        ("new", {"resume_from_checkpoint": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_the_folder_of_a_run_is_checked_before_its_rows_are_read(
    tmp_path, folder, options, message
):
    (tmp_path / "a_file").touch()
    (tmp_path / "earlier" / "checkpoint-3").mkdir(parents=True)
    config = TrainConfig(output_dir=tmp_path / folder, **FAST, **options)
    with pytest.raises(ValueError, match=message):
        train(lora(), Letters(), unread(), config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_file", "earlier"]


RUN = """
import sys
sys.path[:] = {path!r}
from helpers.toy import Letters, lora, rows
from minilora.training.config import TrainConfig
from minilora.training.loop import train

class Report:
    def on_step(self, info):
        print(info.step, flush=True)

options = {{"learning_rate": 1e-2, "max_steps": 10**9, "save_steps": 1, "save_total_limit": 2}}
config = TrainConfig(output_dir=sys.argv[1], **options)
train(lora(), Letters(), rows(4), config, callbacks=[Report()])
"""


def run(folder, **options):
    return train(lora(), Letters(), rows(4), TrainConfig(output_dir=folder, **(FAST | options)))


def test_a_folder_is_refused_until_the_process_of_its_run_is_killed(tmp_path):
    message = f"another run is writing to {re.escape(str(tmp_path))}. Wait"
    code = RUN.format(path=sys.path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            while other.stdout.readline() != "2\n":
                assert other.poll() is None
            for options in ({}, {"resume_from_checkpoint": "last"}):
                with pytest.raises(ValueError, match=message):
                    run(tmp_path, **options)
        finally:
            other.send_signal(signal.SIGKILL)
    steps = checkpoint_steps(tmp_path)[-1]
    result = run(tmp_path, resume_from_checkpoint="last", max_steps=steps + 1)
    assert result.steps == steps + 1 and not (tmp_path / LOCK_FILE).exists()


def test_runs_one_after_the_other_in_a_process_share_a_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    with pytest.raises(ValueError, match="at least one row"):
        train(lora(), Letters(), [], TrainConfig(output_dir=folder, **FAST))
    assert not list(tmp_path.iterdir())
    first = run(folder, max_steps=1)
    second = run(folder, max_steps=2, resume_from_checkpoint="last")
    assert (first.steps, second.steps) == (1, 2)
    assert not (folder / LOCK_FILE).exists()


def test_a_system_without_locks_trains_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with folder_lock.folder_lock(tmp_path):
        assert run(tmp_path).steps == FAST["max_steps"]
