"""Proves that torch's default dtype changes no result: each constant of the library names its dtype.

The oracle is the same function under the default dtype fp32, on inputs of explicit dtype, in a fresh
process. "Warm" runs all functions under fp32 first in the same process, so that cached tables exist.
"""

import json
import os
from pathlib import Path

import pytest

from helpers.default_dtype import write_model
from helpers.source import ROOT
from helpers.tiny import python

OTHERS = ("float16", "bfloat16", "float64")
CODE = (ROOT / "tests/helpers/default_dtype.py").read_text()


def results(folder: Path, *dtypes: str, parts: str = "all") -> list[dict[str, str]]:
    """Return {function: hash of its result} for each default dtype, all of one process."""
    roots = os.pathsep.join([str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")])
    printed = python(CODE, parts, folder, *dtypes, PYTHONPATH=roots)
    lines = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("default_dtype") / "model"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def warm(folder: Path) -> list[dict[str, str]]:
    """Return the results under fp32 and then under each other dtype, in one process."""
    return results(folder, "float32", *OTHERS)


def changed(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the functions whose results differ."""
    assert expected.keys() == found.keys() and expected
    return [name for name in expected if expected[name] != found[name]]


def test_quantisation_under_another_default_dtype(folder: Path):
    expected, warm = results(folder, "float32", "float16", parts="quantization")
    cold = results(folder, "float16", parts="quantization")[0]
    assert changed(expected, warm) == changed(expected, cold) == []


@pytest.mark.slow
def test_results_repeat_in_another_process(folder: Path, warm: list[dict[str, str]]):
    assert changed(warm[0], results(folder, "float32")[0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", OTHERS)
def test_results_equal_under_another_default_dtype_warm(dtype: str, warm: list[dict[str, str]]):
    assert changed(warm[0], warm[1 + OTHERS.index(dtype)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", OTHERS)
def test_results_equal_under_another_default_dtype_cold(
    dtype: str, folder: Path, warm: list[dict[str, str]]
):
    assert changed(warm[0], results(folder, dtype)[0]) == []
