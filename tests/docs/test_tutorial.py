"""Runs the commands and the client of docs/tutorial.md, in order, with a small random model."""

import csv
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import minilora as ml
from helpers.chats import furnish
from helpers.source import ROOT, text
from minilora.cli.main import main
from minilora.training.run_folder import checkpoint_steps
from tests.cli.test_cli_interrupted import process

PAGE = text("docs/tutorial.md")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)
COMMANDS = re.findall(r"^minilora .*$", "".join(BLOCKS), flags=re.M)
CONFIG = re.search(r"^```toml\n(.*?)^```", PAGE, flags=re.M | re.S)
CLIENT = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)[-1]
SHORTER = {
    "--max_steps 60": "--max_steps 5",
    "--save_steps 20": "--save_steps 1",
    "--eval_steps 30": "--eval_steps 5",
    "--max_steps 20": "--max_steps 2",
    "--per_device_train_batch_size 8": "--per_device_train_batch_size 2",
    "--test_size 80": "--test_size 4",
}
SECONDS = 120.0  # until the server answers; machines are shared


def words(command: str, model: Path) -> list[str]:
    """Return the arguments of a command, shortened and for the small model."""
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    return shlex.split(command.replace("sample:smollm2", str(model)))[1:]


def write_rows(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["diagnosis", "chapter"])
        writer.writerows([f"pain in ear {number}", "ear"] for number in range(count))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask_server(arguments: list[str], folder: Path) -> str:
    """Start the server, run the page's client, stop the server, and return the client's output."""
    port = free_port()
    arguments = [str(port) if word == "8000" else word for word in arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "minilora", *arguments]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE) as server:
        try:
            end = time.monotonic() + SECONDS
            while not is_ready(port) and time.monotonic() < end:
                time.sleep(0.2)
            client = CLIENT.replace(":8000", f":{port}")
            run = [sys.executable, "-c", client]
            done = subprocess.run(run, env=env, capture_output=True, text=True)
        finally:
            server.send_signal(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run_in_order(tmp_path, monkeypatch, capsys):
    model = furnish(tmp_path) / "model"
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "diagnoses.csv", 24)
    write_rows(tmp_path / "held_out.csv", 6)
    assert CONFIG
    (tmp_path / "data.toml").write_text(CONFIG[1])
    shown = {}
    for command in COMMANDS:
        arguments = words(command, model)
        name = arguments[0]
        if name == "train" and "--resume_from_checkpoint" not in arguments:
            done = process(signal.SIGINT, arguments)
            assert done.returncode == 128 + signal.SIGINT, done.stderr
            assert "--resume_from_checkpoint last" in done.stdout.splitlines()[-1]
            continue
        if name == "serve":
            assert ask_server(arguments, tmp_path).strip() in ("ear", "eye", "urinary", "injury")
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("pain in ear\n/reset\n/quit\n"))
        assert main(arguments) == 0, command
        shown[name] = capsys.readouterr().out

    assert checkpoint_steps(tmp_path / "out")[-1] == 5
    assert "rows better" in shown["evaluate"] and "lowest scores" in shown["evaluate"]
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6
    assert "learning_rate" in shown["runs"] and "trial" in shown["runs"]
    assert "merge into bfloat16: " in shown["merge"]
    assert ml.load_model(tmp_path / "model.gguf").config.vocab_size
    assert set(shown) == {
        *("preview", "train", "evaluate", "sweep", "runs", "merge", "export", "generate", "chat")
    }
