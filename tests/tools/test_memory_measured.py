"""Proves that planned peaks equal measured peaks, on a CPU and on a GPU.

SmolLM2 is trained in separate processes. On a CPU this runs benchmarks/training/plan_check.py; on a
GPU it compares the same runs with torch.cuda.max_memory_allocated.
"""

import json
import subprocess
import sys

import pytest

from helpers.source import ROOT


def check(*options: str) -> dict[str, dict]:
    """Return the planned and measured bytes of each run of the benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / "training" / "plan_check.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["runs"]


@pytest.mark.slow
@pytest.mark.demo  # several processes train the real model for minutes: make check-demo
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    sys.platform != "linux",
    reason="reads anonymous memory from /proc, which only Linux has: NOT TESTED here",
)
def test_planned_peaks_are_measured_peaks():
    """Allow 10 % of a process, since the plan omits buffers that kernels make for themselves."""
    for name, run in check().items():
        assert abs(run["measured"] / run["planned"] - 1) <= 0.1, (name, run)


@pytest.mark.gpu
def test_planned_peaks_are_allocated_on_a_gpu():
    """The plan follows the CPU's code path.

    cuBLAS's workspace and rounding to 512 bytes are added on a GPU.
    """
    for name, run in check("--batch=8").items():
        assert run["device"] == "cuda"
        assert abs(run["measured"] / run["planned"] - 1) <= 0.1, (name, run)
