"""Proves the Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors, in a process of its own.

The process runs tests/gpu/interpreted/, which knows the kernels, those of training beside their
plain forms too, and the ordinary tests of NF4 with MINILORA_NF4=triton, so that what holds for the
CPU path (bitsandbytes' bits, bitsandbytes' files, autograd, torch.compile) holds for Triton's. The
fast tests run few cases of each idea. `make test-all` runs every case. It repeats the kernels' own
on the Tritons that the Makefile names, laid over the pinned one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.source import ROOT

TRITONS = re.search(r"^TRITONS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()


def interpreted(*arguments: str, **env: str) -> str:
    """What pytest printed under the interpreter; it must have run something and failed nothing."""
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"TRITON_INTERPRET": "1"}
        | env
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout.splitlines()[-1]
    return done.stdout


ORDINARY = [
    "tests/nf4/test_nf4_quantize.py",
    "tests/nf4/test_nf4_ops.py",
    "tests/quant/test_nf4_linear.py",
]
# Ordinary tests that are slow in the interpreter, and those of their cases that are fast all the
# same. None: no case is.
SLOW_HERE = {
    "test_codes_scales_and_values_are_bitsandbytes": "[32-dtype2] or [64-dtype0] or [4096-dtype1]",
    "test_nested_scales_are_bitsandbytes_give_or_take_a_code": None,
    "test_the_offset_is_the_same_for_any_number_of_threads": None,  # its code is plain torch
    "test_quantising_again_changes_nothing": None,
    "test_the_error_is_at_most_half_the_widest_gap": None,
    "test_opcheck": "[shape0-True] or [shape2-False]",
    "test_opcheck_of_few_tokens": "[shape0-tokens1-True-True] or [shape2-tokens0-False-False]",
    "test_any_size_block_and_bias": None,
}


def fast_here() -> str:
    """pytest's -k for all ordinary tests but those of SLOW_HERE, of which some cases stay."""
    left_out = []
    for name, cases in SLOW_HERE.items():
        whole = f"{name}[" if cases else name  # with cases: not the test whose name goes on
        left_out.append(f"({whole} and not ({cases}))" if cases else whole)
    return f"not ({' or '.join(left_out)})"


def test_few_cases_of_the_kernels_in_the_interpreter():
    interpreted("tests/gpu/interpreted", "-m", "not slow", MINILORA_NF4="triton")


def test_few_ordinary_cases_in_the_interpreter():
    """What SLOW_HERE names is there, and of all else every case runs."""
    found = interpreted(
        *ORDINARY, "-m", "not slow", "-k", fast_here(), "-vv", MINILORA_NF4="triton"
    )
    for name, cases in SLOW_HERE.items():
        assert any(f"def {name}(" in (ROOT / path).read_text() for path in ORDINARY), name
        ran = len(re.findall(rf"::{name}(?:\[| )", found))
        assert ran == (len(cases.split(" or ")) if cases else 0), (name, ran)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["tests/gpu/interpreted", *ORDINARY])
def test_kernels_in_the_interpreter(path: str):
    interpreted(path, MINILORA_NF4="triton")


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
def test_kernels_in_another_triton(version: str):
    folder = Path(sys.prefix) / f"triton-{version}"
    if not folder.exists():
        pytest.skip(
            f"triton {version} is not at {folder.name}: NOT TESTED; `make tritons` puts it there"
        )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # conftest.py prints which one
    assert f"triton {version}" in interpreted(
        "tests/gpu/interpreted", PYTHONPATH=path, MINILORA_NF4="triton"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([path, str(ROOT), str(ROOT / "kernels")])}
    command = [
        sys.executable,
        "benchmarks/gpu_model/kernel_report.py",
        "--targets",
        "sm_75,sm_86,sm_120",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True
    )  # all compile; figures may differ
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["triton"] == version
