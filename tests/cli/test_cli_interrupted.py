"""Proves that `minilora train` loses nothing: folders, signals, and the exit status.

Real processes are interrupted and terminated in a step. Oracle: the run that was not stopped.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from helpers.source import ROOT
from minilora.cli.main import main
from minilora.training.run_folder import checkpoint_steps
from tests.cli.test_cli import ROWS, furnish

CODE = """
import os, signal, sys
# A shell's background jobs ignore SIGINT: both cases are set here.
handlers = {"heard": signal.default_int_handler, "ignored": signal.SIG_IGN}
signal.signal(signal.SIGINT, handlers[sys.argv[2]])
import minilora.training.session as session
from minilora.cli.main import main
number = int(sys.argv[1])
backward, steps = session.backward, []
def stop(*arguments, **keywords):
    steps.append(1)
    if len(steps) == 3:
        os.kill(os.getpid(), number)
    return backward(*arguments, **keywords)
session.backward = stop
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("place"), rows=ROWS)


def arguments(place, *further: str) -> list[str]:
    """Return a train command of 5 steps."""
    command = ["train", str(place / "model"), str(place / "rows.jsonl"), "--dtype", "float32"]
    return [*command, "--r", "2", "--max_steps", "5", *further]


def process(number: int, command: list[str], ctrl_c: str = "heard") -> subprocess.CompletedProcess:
    """Run a command that sends itself a signal in its third step."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        [sys.executable, "-c", CODE, str(number), ctrl_c, *command],
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_step_and_sets_the_status(place, tmp_path, number):
    out = tmp_path / "out"
    done = process(number, arguments(place, "--output_dir", str(out)))
    assert done.returncode == 128 + number, done.stderr
    assert checkpoint_steps(out) == [2]
    assert "Traceback" not in done.stderr
    assert "interrupted after 2 steps" in done.stdout
    assert "--resume_from_checkpoint last" in done.stdout.splitlines()[-1]
    resume = arguments(place, "--output_dir", str(out), "--resume_from_checkpoint", "last")
    assert main(resume) == 0
    assert main(arguments(place, "--adapter", str(tmp_path / "whole"))) == 0
    resumed = load_file(out / "adapter" / "adapter_model.safetensors")
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert all((resumed[name] == whole[name]).all() for name in whole)


@pytest.mark.slow
def test_a_background_job_ends_by_sigterm_and_ignores_ctrl_c(place, tmp_path):
    terminated = tmp_path / "terminated"
    done = process(signal.SIGTERM, arguments(place, "--output_dir", str(terminated)), "ignored")
    assert done.returncode == 143, done.stderr
    assert checkpoint_steps(terminated) == [2]
    whole = tmp_path / "whole"
    assert (
        process(signal.SIGINT, arguments(place, "--output_dir", str(whole)), "ignored").returncode
        == 0
    )
    assert checkpoint_steps(whole) == [5]


def test_without_an_output_dir_the_last_line_says_that_the_run_cannot_continue(place, tmp_path):
    done = process(signal.SIGINT, arguments(place, "--adapter", str(tmp_path / "a")))
    assert done.returncode == 130
    assert "cannot continue" in done.stdout.splitlines()[-1]
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_ctrl_c_while_loading_prints_no_traceback(place, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minilora.load_model", interrupt)
    assert main(arguments(place, "--adapter", str(tmp_path / "a"))) == 130
    assert capsys.readouterr().err == "minilora: interrupted\n"


def test_two_runs_write_two_adapters_and_a_third_is_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        assert main(arguments(place, "--output_dir", name)) == 0
        assert (tmp_path / name / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter").exists()
    assert main(arguments(place)) == 0
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(arguments(place, "--seed", "5")) == 1
    assert re.search(r"--adapter: adapter holds the weights", capsys.readouterr().err)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("option", ["--adapter", "--output_dir"])
def test_a_folder_that_cannot_be_written_is_found_before_loading(
    place, tmp_path, monkeypatch, capsys, option
):
    """A file stands in the way: this fails for every user, root too."""
    (tmp_path / "file").write_text("")

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("minilora.load_model", load)
    monkeypatch.chdir(tmp_path)
    assert main(arguments(place, option, str(tmp_path / "file" / "out"))) == 1
    assert f"minilora: {option}: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
