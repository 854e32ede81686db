"""Tests of `environment` and `minilora env`.

Oracle: the versions and choices of the functions that make them. Property: no secret and no name of
the user is printed.
"""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import minilora as ml
from minilora.cli.main import main
from minilora.models.loader import fast_dtype
from minilora.tools import environment as module


def test_env_prints_what_the_other_functions_choose(capsys):
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    found = ml.environment()
    assert found.sections["versions"]["torch"] == version("torch")
    assert f"  minilora              {ml.__version__}\n" in shown
    name, reason = fast_dtype(torch.device(found.sections["choices"]["device"]))
    assert f"{name}: {reason}" in shown
    for heading in found.sections:
        assert f"{heading}\n" in shown


def test_secrets_are_not_shown(monkeypatch):
    values = {"HF_TOKEN": "hf_abc", "MINILORA_API_KEY": "sesame", "HF_TOKEN_PATH": "/x/y"}
    values |= {"HF_ENDPOINT": "https://me:pass@host"}
    shown = {"HF_HOME": "/data", "OMP_NUM_THREADS": "3"}
    for name, value in (values | shown | {"PRIVATE": "p"}).items():
        monkeypatch.setenv(name, value)
    variables = ml.environment().sections["environment variables"]
    assert {variables[name] for name in values} == {"(set, not shown)"}
    assert {name: variables[name] for name in shown} == shown
    assert "PRIVATE" not in variables
    assert not any(value in str(ml.environment()) for value in values.values())


def test_the_user_is_not_named(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/ann"))
    text = "/Users/ann/.cache /Users/anna /data/ann/hub /Users/ann channel ann-x"
    monkeypatch.setenv("HF_HOME", "/Users/ann/hub")
    assert "HF_HOME               ~/hub" in str(ml.environment())
    assert module._without_user(text) == "~/.cache /Users/anna /data/USER/hub ~ channel ann-x"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CC", "no-such-compiler", {"C compiler": "none: plain torch runs in its place"}),
        ("MINILORA_NF4", "reference", {"NF4": "plain torch (reference)"}),
        ("MINILORA_NF4", "cpu", {"NF4": "plain torch"}),
        ("MINILORA_NF4", "fast", {"NF4": "MINILORA_NF4: expected auto, reference"}),
        ("MINILORA_STEPS", "torch", {"model operations": "plain torch (MINILORA_STEPS)"}),
    ],
)
def test_the_code_that_runs_follows_the_settings(name, value, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(name, value)
    choices = ml.environment().sections["choices"]
    for fact, text in expected.items():
        assert choices[fact].startswith(text)


def test_sizes_of_folders_count_files_and_not_links(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "blob").write_bytes(bytes(3_000_000))
    (tmp_path / "link").symlink_to(tmp_path / "a" / "blob")
    assert module._folder_size(tmp_path) == f"{tmp_path} (0.003 GB)"
    assert module._folder_size(tmp_path / "b").endswith("(does not exist)")


def test_an_extra_that_names_other_extras_is_no_package(monkeypatch):
    listed = ['gguf>=0.10; extra == "gguf"', 'minilora[gguf]; extra == "learn"']
    monkeypatch.setattr(module, "requires", lambda name: listed)
    packages = ml.environment().sections["versions"]["optional packages"]
    assert packages == f"gguf {version('gguf')}"
