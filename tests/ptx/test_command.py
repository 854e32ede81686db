"""Tests of `python -m minilora_ptx`: run, step and count."""

import pytest

from minilora_kernels.triton import launch
from minilora_ptx.command import main

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="Triton interprets its kernels here")


def test_run_compares_with_the_reference(capsys):
    main(["run", "gated", "dequantize_nf4"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("equals its reference" in line for line in said)


def test_run_names_an_unknown_kernel():
    with pytest.raises(SystemExit, match="no kernel gate: choose from dequantize_nf4"):
        main(["run", "gate"])


def test_run_fails_if_a_result_is_wrong(capsys, monkeypatch):
    from minilora_ptx import examples

    monkeypatch.setattr(examples.Result, "right", lambda self: False)
    with pytest.raises(SystemExit):
        main(["run", "gated"])
    assert "WRONG: y" in capsys.readouterr().out


def test_step_shows_python_ptx_values_and_addresses(capsys):
    main(["step", "gated", "--warp", "1", "--lanes", "0,31"])
    said = capsys.readouterr().out
    assert "swiglu.py:" in said and "sigmoid = 1 / (1 + tl.exp2(z * -LOG2_E))" in said
    assert "ex2.approx.ftz.f32" in said and "address 0x" in said
    start = said.index(", %tid.x;")
    assert said[start:].splitlines()[1:3] == [
        "        lane  0  %" + said[:start].rpartition("%")[2] + " = 0x20",
        "        lane 31  %" + said[:start].rpartition("%")[2] + " = 0x3f",
    ]


def test_step_of_some_lines(capsys):
    main(["step", "gated", "--lanes", "3", "--lines", "1"])
    assert capsys.readouterr().out == ""


def test_count_prints_a_row_for_each_kernel(capsys):
    main(["count", "dequantize_nf4"])
    head, names, row = capsys.readouterr().out.splitlines()
    assert "sm_86" in head and names.split()[1] == "instructions"
    values = dict(zip(names.split()[1:], map(int, row.split()[1:]), strict=True))
    assert values["sectors"] * 32 >= values["bytes"] / 8 and values["passes"] >= values["shared"]
