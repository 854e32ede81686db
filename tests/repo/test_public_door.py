"""Proves that the public door is one door, and light.

`minilora.__all__`, what `dir` shows, what the file binds, docs/reference.md and the command line
name the same things; `import minilora` loads none of the packages that only some users need, and
costs little beside torch.
"""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

import minilora as ml
from helpers.source import ROOT, text, tree

HEAVY = (
    *("triton", "tokenizers", "transformers", "huggingface_hub", "safetensors", "jinja2", "tqdm"),
    *("gguf", "matplotlib", "pyarrow", "peft", "bitsandbytes", "hypothesis", "pytest"),
    *("fastapi", "uvicorn", "pydantic"),
)
IMPORT_SHARE = 0.2  # of what torch's import takes: machines differ, and this differs with them
COMMANDS = {
    "plan": "plan_memory",
    "push": "push_to_hub",
}  # the public function where the command is not named after it


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter at the repository root."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- one door


def test_all_is_sorted_and_importable():
    assert list(ml.__all__) == sorted(set(ml.__all__))
    for name in ml.__all__:
        assert getattr(ml, name) is not None, name
    with pytest.raises(AttributeError, match="quantise_model"):
        ml.quantise_model  # noqa: B018  # the lookup is the test


def test_dir_shows_the_door_and_nothing_else():
    shown = json.loads(python("import json, minilora; print(json.dumps(dir(minilora)))"))
    assert {name for name in shown if not name.startswith("_")} == {
        n for n in ml.__all__ if not n.startswith("_")
    }


def test_the_file_binds_what_all_names():
    """What editors complete is what `minilora/__init__.py` imports or assigns: nothing more, nothing less."""
    bound: set[str] = set()
    for node in ast.walk(tree("minilora/__init__.py")):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert {name for name in bound if not name.startswith("_")} == {
        n for n in ml.__all__ if not n.startswith("_")
    }


def page_names() -> set[str]:
    """Backticked names that open a table row of the page on the public door."""
    openings = re.findall(r"^\s*\|\s*(`.*?)\|", text("docs/reference.md"), flags=re.M)
    return {
        name
        for opening in openings
        for name in re.findall(r"`(?:ml\.|minilora\.)?(\w+)[^`]*`", opening)
    }


def test_the_page_lists_the_door():
    assert page_names() == {name for name in ml.__all__ if not name.startswith("_")}


def subcommands() -> set[str]:
    """What `minilora --help` offers."""
    usage = python(
        "import sys; from minilora.cli.main import main; sys.argv = ['minilora', '--help']; main()"
    )
    found = re.search(r"\{([\w,-]+)\}", usage)
    assert found, usage
    return set(found[1].split(","))


def page_commands() -> set[str]:
    """X of each `minilora X`, or `minilora X | Y`, that starts a line of code, inline or fenced, of docs/cli.md."""
    page = text("docs/cli.md")
    code = re.findall(r"^```[^\n]*\n(.*?)^```", page, flags=re.M | re.S) + re.findall(
        r"`([^`\n]+)`", page
    )
    lists = re.findall(
        r"^(?:\$ )?minilora ([a-z-]+(?: *\| *[a-z-]+)*)", "\n".join(code), flags=re.M
    )
    return {command.strip() for several in lists for command in several.split("|")}


def test_each_command_wraps_a_public_function_and_stands_on_its_page():
    offered = subcommands()
    for command in offered:
        assert COMMANDS.get(command, command.replace("-", "_")) in ml.__all__, (
            f"minilora {command} wraps nothing public"
        )
    assert page_commands() == offered


# ---- a light one


def test_import_loads_torch_and_numpy_only():
    code = "import sys, torch; before = set(sys.modules); import minilora; print(*(set(sys.modules) - before))"
    roots = {name.partition(".")[0] for name in python(code).split()}
    assert not roots & set(HEAVY)
    assert {"minilora"} <= roots


def test_import_is_quick(tmp_path, monkeypatch):
    """Processor seconds beside torch's: a busy machine stretches the wall clock. The least of four is the cost, as
    the first compiles the modules, which an installed package finds compiled."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    clock = "time.process_time()"
    code = f"import time; a = {clock}; import torch; b = {clock}; import minilora; print(b - a, {clock} - b)"
    torchs, ours = (
        min(times)
        for times in zip(*(map(float, python(code).split()) for _ in range(4)), strict=True)
    )
    assert ours <= IMPORT_SHARE * torchs, (
        f"import minilora costs {ours:.3f} s, torch {torchs:.3f} s"
    )
