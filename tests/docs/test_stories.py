"""Tests that run every example and notebook with `python`, in its short form.

MINILORA_SHORT=1 reduces steps and rows; the assertions in the file stay. The code of a notebook's
solutions, which are in <details> folds, runs after the notebook with its variables.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.source import ROOT, sources, text


def solutions(source: str) -> str:
    """Return the ```python blocks in the <details> folds of a notebook, without comment signs."""
    folds = re.findall(r"^# <details>.*?^# </details>", source, flags=re.M | re.S)
    blocks = re.findall(r"^# ```python\n(.*?)^# ```$", "\n".join(folds), flags=re.M | re.S)
    return "".join(re.sub(r"^# ?", "", block, flags=re.M) for block in blocks)


def test_solutions_are_found():
    plain = "# ```python\n# never\n# ```\n"
    fold = (
        "# <details><summary>Solution</summary>\n#\n"
        "# ```python\n# if a:\n#     b()\n#\n# c()\n# ```\n# </details>\n"
    )
    assert solutions(plain + fold + plain + fold) == 2 * "if a:\n    b()\n\nc()\n"


@pytest.mark.parametrize("path", sources("notebooks"))
def test_a_notebook_has_all_of_its_parts(path: str):
    """The parts are a question, an assert, a picture, and an exercise with a folded solution."""
    parts = (
        "# **Question:**",
        "\nassert ",
        "plt.show()",
        "**Exercise",
        "# <details><summary>Solution</summary>",
    )
    missing = [part for part in (*parts, "# </details>") if part not in text(path)]
    assert not missing, f"{path} has no {missing}"


@pytest.mark.slow
@pytest.mark.parametrize("path", sources("examples", "notebooks"))
def test_an_example_or_notebook_runs(path: str, tmp_path: Path):
    story = ROOT / path
    if path.startswith("notebooks/"):
        story = tmp_path / story.name
        story.write_text(f"{text(path)}\n{solutions(text(path))}", encoding="utf-8")
    env = os.environ | {"MINILORA_SHORT": "1", "MPLBACKEND": "Agg"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(story)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stderr[-4000:]
