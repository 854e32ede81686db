"""Tests of the Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors.

A separate process runs tests/gpu/interpreted/, which tests each kernel, and the ordinary tests of
NF4 with MINILORA_NF4=triton. So the tests of the CPU path (bits and files of bitsandbytes,
autograd, torch.compile) also run with Triton. The fast tests run a few cases of each test.
`make test-all` runs every case, and a few of tests/gpu/interpreted/ with the versions of Triton that
the Makefile names; `make check-demo` runs every case with those too.
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
    """Run pytest with Triton's interpreter and return its output.

    At least one test must pass and none may fail.
    """
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


INTERPRETED = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/gpu/interpreted/test_*.py")
)
ORDINARY = [
    "tests/nf4/test_nf4_quantize.py",
    "tests/nf4/test_nf4_ops.py",
    "tests/quant/test_nf4_linear.py",
]
# Ordinary tests that are slow in the interpreter, with their cases that are fast. None: no case.
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
    """Return pytest's -k for all ordinary tests except the slow cases of SLOW_HERE."""
    left_out = []
    for name, cases in SLOW_HERE.items():
        whole = f"{name}[" if cases else name  # "[" excludes tests with a longer name
        left_out.append(f"({whole} and not ({cases}))" if cases else whole)
    return f"not ({' or '.join(left_out)})"


def test_few_cases_in_the_interpreter():
    """One process for both kinds. The tests in SLOW_HERE exist, and the other tests run whole."""
    options = ["-m", "not slow", "-k", fast_here(), "-vv"]
    found = interpreted("tests/gpu/interpreted", *ORDINARY, *options, MINILORA_NF4="triton")
    assert "::test_gemv_of_a_one_hot_x_gives_a_column[" in found
    for name, cases in SLOW_HERE.items():
        assert any(f"def {name}(" in (ROOT / path).read_text() for path in ORDINARY), name
        ran = len(re.findall(rf"::{name}(?:\[| )", found))
        assert ran == (len(cases.split(" or ")) if cases else 0), (name, ran)


@pytest.mark.slow
@pytest.mark.parametrize("path", [*INTERPRETED, *ORDINARY])
def test_kernels_in_the_interpreter(path: str):
    interpreted(path, MINILORA_NF4="triton")


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize(
    "cases",
    [pytest.param("not slow", id="few"), pytest.param("", id="all", marks=pytest.mark.demo)],
)
def test_kernels_in_another_triton(version: str, cases: str):
    folder = Path(sys.prefix) / f"triton-{version}"
    if not folder.exists():
        pytest.skip(
            f"triton {version} is not at {folder.name}: NOT TESTED; `make tritons` installs it"
        )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # conftest.py prints the version
    assert f"triton {version}" in interpreted(
        "tests/gpu/interpreted", "-m", cases, PYTHONPATH=path, MINILORA_NF4="triton"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([path, str(ROOT), str(ROOT / "kernels")])}
    command = [
        sys.executable,
        "benchmarks/gpu_model/kernel_report.py",
        "--targets",
        "sm_75,sm_86,sm_120",
    ]
    # All kernels compile. The figures may differ.
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["triton"] == version
