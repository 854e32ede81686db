"""Proves that every example and notebook runs to its end under plain `python`, in its short form.

MINILORA_SHORT=1 asks a story to cut steps and rows; its own assertions stay.
"""

import os
import subprocess
import sys

import pytest

from source import ROOT, sources


@pytest.mark.slow
@pytest.mark.parametrize("path", sources("examples", "notebooks"))
def test_a_story_runs(path: str):
    env = os.environ | {"MINILORA_SHORT": "1", "MPLBACKEND": "Agg"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, path], env=env, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stderr[-4000:]
