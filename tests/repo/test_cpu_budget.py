"""Proves that every folder of tests has a CPU budget, and that a folder over it fails the run."""

import os
import subprocess
import sys
from pathlib import Path

from helpers.cpu_budget import BUDGET, SLACK, cpu_seconds, over_budget, room_of
from helpers.source import ROOT

ROOMS = {path.parent.name for path in ROOT.glob("tests/*/test_*.py")}


def test_every_folder_with_fast_tests_has_a_budget_and_no_other():
    assert BUDGET.keys() == ROOMS - {"clients"}  # its tests are slow


def test_only_a_folder_over_its_budget_is_named():
    within = {room: float(SLACK * seconds) for room, seconds in BUDGET.items()}
    assert over_budget(within) == []
    (sentence,) = over_budget(within | {"lora": SLACK * BUDGET["lora"] + 1.0})
    assert sentence.startswith("tests/lora needed")
    assert over_budget({"attic": 1.0}) == [
        "tests/attic has no budget in tests/helpers/cpu_budget.py"
    ]


def test_the_folder_of_a_test_is_that_under_tests():
    assert room_of(ROOT / "tests" / "gpu" / "interpreted" / "test_kernels.py", ROOT) == "gpu"
    assert room_of(ROOT / "tests" / "conftest.py", ROOT) is None
    assert room_of(Path("/elsewhere/tests/lora/test_a.py"), ROOT) is None


def test_the_seconds_of_a_child_count():
    before = cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cpu_seconds() - before >= 0.25


def test_a_run_over_its_budget_fails_with_the_reason(tmp_path):
    """A real run, with a worker, of one file in a folder whose budget is nothing.

    With -q there is no header, and the end of the run reports the processor once.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import helpers.cpu_budget\n"
        "helpers.cpu_budget.BUDGET['common'] = 0\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/common/test_sequences.py"],
        cwd=ROOT,
        env=env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    assert "passed" in done.stdout and "failed" not in done.stdout.splitlines()[-1]
    assert "tests/common needed" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("cpu: ")]) == 1
