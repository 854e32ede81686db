"""Proves that the public interface is the same everywhere, and that its import is quick.

`minilora.__all__`, `dir(minilora)`, the names that the file binds, docs/reference.md and the
command line agree. `import minilora` loads none of the packages that only some users need, and
takes little time compared with torch.
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
IMPORT_SHARE = 0.2  # of torch's import time, which differs between machines in the same way
# command -> public function of another name
COMMANDS = {
    "chat": "stream_generate",
    "env": "environment",
    "export": "save_model",
    "plan": "plan_memory",
    "push": "push_to_hub",
    "runs": "compare_runs",
}


def python(code: str) -> str:
    """Run code in a fresh interpreter at the repository root and return its output."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- one public interface


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


def test_the_file_binds_exactly_the_names_in_all():
    """Editors complete the names that `minilora/__init__.py` imports or assigns."""
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
    """Return the backticked names that open a table row of docs/reference.md."""
    openings = re.findall(r"^\s*\|\s*(`.*?)\|", text("docs/reference.md"), flags=re.M)
    return {
        name
        for opening in openings
        for name in re.findall(r"`(?:ml\.|minilora\.)?(\w+)[^`]*`", opening)
    }


def test_the_page_lists_the_door():
    assert page_names() == {name for name in ml.__all__ if not name.startswith("_")}


def subcommands() -> set[str]:
    """Return the commands that `minilora --help` lists."""
    usage = python(
        "import sys; from minilora.cli.main import main; sys.argv = ['minilora', '--help']; main()"
    )
    found = re.search(r"\{([\w,-]+)\}", usage)
    assert found, usage
    return set(found[1].split(","))


def page_commands() -> set[str]:
    """Return each X of `minilora X`, or `minilora X | Y`, at the start of code in docs/cli.md.

    The code is inline or fenced.
    """
    page = text("docs/cli.md")
    code = re.findall(r"^```[^\n]*\n(.*?)^```", page, flags=re.M | re.S) + re.findall(
        r"`([^`\n]+)`", page
    )
    lists = re.findall(
        r"^(?:\$ )?minilora ([a-z-]+(?: *\| *[a-z-]+)*)", "\n".join(code), flags=re.M
    )
    return {command.strip() for several in lists for command in several.split("|")}


def test_each_command_wraps_a_public_function_and_is_documented():
    offered = subcommands()
    for command in offered:
        assert COMMANDS.get(command, command.replace("-", "_")) in ml.__all__, (
            f"minilora {command} wraps no public function"
        )
    assert page_commands() == offered


# ---- a quick import


def test_import_loads_torch_and_numpy_only():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import minilora; print(*(set(sys.modules) - before))"
    )
    roots = {name.partition(".")[0] for name in python(code).split()}
    assert not roots & set(HEAVY)
    assert {"minilora"} <= roots


@pytest.mark.slow
def test_import_is_quick(tmp_path, monkeypatch):
    """Compare processor seconds with torch's, since a busy machine stretches the wall clock.

    The least of four runs counts: the first compiles the modules, which an installed package has
    compiled already.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    clock = "time.process_time()"
    code = (
        f"import time; a = {clock}; import torch; b = {clock}; "
        f"import minilora; print(b - a, {clock} - b)"
    )
    torchs, ours = (
        min(times)
        for times in zip(*(map(float, python(code).split()) for _ in range(4)), strict=True)
    )
    assert ours <= IMPORT_SHARE * torchs, (
        f"import minilora costs {ours:.3f} s, torch {torchs:.3f} s"
    )
