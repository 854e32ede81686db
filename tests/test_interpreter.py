"""Proves the Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors, in a process of its own.

The process runs tests/interpreted/, which knows the kernels, those of training beside their plain forms too, and the
ordinary tests of NF4 with MINILORA_NF4=triton, so that what holds for the CPU path (bitsandbytes' bits, bitsandbytes'
files, autograd, torch.compile) holds for Triton's.
`make test-all` repeats the kernels' own on the Tritons that the Makefile names, laid over the pinned one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from source import ROOT

TRITONS = re.search(r"^TRITONS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()


def interpreted(*arguments: str, **env: str) -> str:
    """What pytest printed under the interpreter; it must have run something and failed nothing."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"} | env
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout.splitlines()[-1]
    return done.stdout


@pytest.mark.parametrize(
    "path", ["tests/interpreted", "tests/test_nf4_quantize.py", "tests/test_nf4_ops.py", "tests/test_nf4_linear.py"]
)
def test_kernels_in_the_interpreter(path: str):
    interpreted(path, MINILORA_NF4="triton")


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
def test_kernels_in_another_triton(version: str):
    folder = Path(sys.prefix) / f"triton-{version}"
    if not folder.exists():
        pytest.skip(f"triton {version} is not at {folder.name}: NOT TESTED; `make tritons` puts it there")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # conftest.py prints which one
    assert f"triton {version}" in interpreted("tests/interpreted", PYTHONPATH=path, MINILORA_NF4="triton")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([path, str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "benchmarks/kernel_report.py", "--targets", "sm_75,sm_86,sm_120"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)  # all compile; figures may differ
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["triton"] == version
