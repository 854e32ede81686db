"""Proves that `make test ISA=avx2` and `ISA=default` set the CPU's instruction set, and report it.

The commands come from make itself. A fresh process shows the effect on torch, oneDNN and the C
compiler.
"""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch

from helpers.source import ROOT
from helpers.tiny import python
from minilora_kernels import dynamic_map, nf4_codebook

MARCHES = {"avx2": "x86-64-v3", "default": "x86-64"}

x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86"
)
make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def told(isa: str) -> dict[str, str]:
    """Return the variables that `make test ISA=…` sets for pytest, as `make -n` prints them."""
    done = subprocess.run(
        ["make", "-n", "test", f"ISA={isa}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = [line for line in done.stdout.splitlines() if "pytest" in line]
    return dict(re.findall(r"([A-Z_]+)=(\S+)", command.partition("python")[0]))


def skip_without(isa: str) -> None:
    """Skip the test if this processor lacks the instruction set."""
    if isa == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")


@make
def test_without_the_switch_nothing_is_set():
    assert told("").keys() == {"OMP_NUM_THREADS"}


@x86
@make
@pytest.mark.parametrize("isa", MARCHES)
def test_torch_and_the_c_compiler_use_the_chosen_set(isa):
    skip_without(isa)
    code = """
import torch
from minilora_kernels.c.compiler import machine_flags
print(torch.backends.cpu.get_cpu_capability(), machine_flags())
"""
    assert python(code, **told(isa)).split() == [isa.upper(), f"-march={MARCHES[isa]}"]


@x86
@make
def test_other_sets_round_other_bits():
    """Each set adds 1000 products in its own order, so the two results must differ."""
    skip_without("avx2")
    code = """
import torch
torch.manual_seed(0)
x = torch.randn(64, 1000)
print(*(x @ x.T).flatten().tolist(), *x.sum(1).tolist())
"""
    assert python(code, **told("avx2")) != python(code, **told("default"))


@make
def test_an_unknown_set_is_refused():
    done = subprocess.run(
        ["make", "-n", "test", "ISA=avx3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "ISA must be avx2 or default, got avx3" in done.stderr


@x86
@pytest.mark.slow  # tests/repo/test_cpu_budget.py has a run with -q
@pytest.mark.parametrize("options", [[], ["-q"]], ids=["header", "quiet"])
def test_a_run_reports_its_instruction_set_once(options, tmp_path, monkeypatch):
    """The header reports it, or the end of the run where -q leaves out the header."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("MINILORA_MARCH", "x86-64")
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    run = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", str(tmp_path)]
    folders = (ROOT, ROOT / "kernels", ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("cpu: ")]
    assert len(said) == 1 and said[0].endswith("; torch: DEFAULT; C: -march=x86-64")


@x86
def test_the_tables_have_the_same_bits_with_an_older_instruction_set(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    code = (
        "import json, torch; from minilora_kernels import dynamic_map, nf4_codebook;"
        "tables = [nf4_codebook(), dynamic_map(), dynamic_map(signed=False)];"
        "print(torch.backends.cpu.get_cpu_capability(), [table.tolist() for table in tables])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "kernels", capture_output=True, text=True
    )
    tables = [nf4_codebook(), dynamic_map(), dynamic_map(signed=False)]
    assert done.stdout == f"DEFAULT {[table.tolist() for table in tables]}\n", done.stderr
