"""Proves that every example and notebook runs to its end under plain `python`, in its short form.

MINILORA_SHORT=1 asks a story to cut steps and rows; its own assertions stay. A notebook is the py:percent script
beside it, so the two are compared as well.
"""

import os
import subprocess
import sys

import pytest

from source import ROOT, sources

NOTEBOOKS = [path for path in sources("notebooks") if (ROOT / path).with_suffix(".ipynb").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("path", sources("examples", "notebooks"))
def test_a_story_runs(path: str):
    env = os.environ | {"MINILORA_SHORT": "1", "MPLBACKEND": "Agg"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, path], env=env, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_is_its_script(path: str):
    """Cell for cell; `make notebooks` builds the one from the other."""
    import jupytext

    script, book = jupytext.read(ROOT / path), jupytext.read((ROOT / path).with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in script.cells] == [(c.cell_type, c.source) for c in book.cells]
