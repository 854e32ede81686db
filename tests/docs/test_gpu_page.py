"""Tests of docs/gpu.md and of the form for benchmark results.

The page's table is the output of expected.py, which computes times as bytes over bandwidth. The
commands on the page exist. The form contains every result once, as one JSON document per line.
"""

import json
import re
import sys

import pytest

from benchmarks.gpu_kernels import bench_form, kernel_bench
from benchmarks.gpu_kernels.bench_form import form, smi
from benchmarks.gpu_model.expected import KERNELS, expectations, linear_weights, table
from benchmarks.gpu_model.roofline import CARDS
from helpers.source import ROOT, text
from tests.bench.test_kernel_bench import python

PAGE = "docs/gpu.md"


@pytest.mark.slow  # compiles three kernels for six targets
@pytest.mark.strict
def test_the_table_is_the_output_of_the_script():
    stdout = python("benchmarks/gpu_model/expected.py").stdout
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(CARDS)
    assert re.findall(r"A token of .* kernels\.", stdout) == re.findall(
        r"A token of .* kernels\.", text(PAGE)
    )
    assert (
        text(PAGE)
        .partition("<!-- expected -->")[2]
        .partition("<!-- /expected -->")[0]
        .strip()
        .splitlines()
        == lines
    )


def test_expected_times_are_bytes_over_bandwidth_or_name_the_bottleneck():
    """Llama-3-8B: all parameters minus embedding, head and 65 norms are the linear weights."""
    weights = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert linear_weights() == weights
    counted = [
        {
            "kernel": kernel,
            "target": card.target,
            "bytes_per_element": 0.5,
            "pipes": {"issue": 0.01},
        }
        for kernel in KERNELS
        for card in CARDS.values()
    ]
    for row in (row for row in counted if row["target"] == "sm_90"):
        row["pipes"] = {"issue": 60.0}
    found = {row["card"]: row for row in expectations(counted)}
    seconds = (weights / 2 + 2 * 128256 * 4096) / 1008e9
    assert found["RTX 4090"]["tokens_per_s"] == pytest.approx(1 / seconds)
    us = 4096 * 14336 / 2 / 1008e3
    lines = table([found["RTX 4090"], found["H100 SXM"]])
    assert lines[2] == f"| RTX 4090 | 1008 | {us:.0f} | {us:.0f} | {us:.0f} | {1 / seconds:.0f} |"
    assert lines[3].count("(issue)") == 3


def test_the_five_commands_of_the_page_exist():
    (block,) = re.findall(r"^```bash\n(.*?)^```", text(PAGE), flags=re.M | re.S)
    commands = block.splitlines()
    assert len(commands) == 5
    for script, options in re.findall(r"python (benchmarks/\w+\.py)((?: --\w+)*)", text(PAGE)):
        assert (ROOT / script).exists() and all(
            option in text(script) for option in options.split()
        )
    extras = re.findall(r"-e '\.\[([\w,]+)\]'", block)[0].split(",")
    assert all(re.search(rf"^{extra} = \[", text("pyproject.toml"), flags=re.M) for extra in extras)
    for page in ("README.md", "kernels/README.md"):
        assert "docs/gpu.md)" in text(page)


def lines_of(block: str) -> list[dict]:
    """Return the JSON documents in a fenced block, one per line."""
    first, *lines, last = block.splitlines()
    assert (first, last) == ("```json", "```")
    return [json.loads(line) for line in lines]


def test_the_form_holds_every_result_once(capsys):
    kernel_bench.main("--device cpu --peers= --rounds 1 --tokens 0 --form".split())
    printed = capsys.readouterr().out
    lines = lines_of(printed[printed.index("```json") :].strip())
    assert lines[0]["form"] == "minilora" and {"python", "system", "commit"} < set(lines[0])
    assert {"device", "torch", "triton", "copy_gb_per_s"} <= set(lines[1])
    keys = [next(iter(line)) for line in lines[2:]]
    assert keys == ["smi", "checked", "decode", *["row"] * keys.count("row")]
    jobs = [(line["row"]["job"], *line["row"]["shape"]) for line in lines if "row" in line]
    assert len(jobs) == len(set(jobs)) >= 4 and all(
        line["row"]["us"] for line in lines if "row" in line
    )


@pytest.mark.parametrize(("cards", "expected"), [(1, "550.54"), (2, "of several cards")])
def test_smi_reads_the_output_of_nvidia_smi(cards, expected, monkeypatch):
    """Replace nvidia-smi by a program that prints one line per card with the requested values."""
    line = "NVIDIA X, 550.54, 2520, 2600, 10501, 10501, 300.5, 450.00, 61"
    run = bench_form.subprocess.run
    echo = [sys.executable, "-c", f"print({line!r}, *[{line!r}] * {cards - 1}, sep='\\n')"]
    monkeypatch.setattr(
        bench_form.subprocess, "run", lambda command, **options: run(echo, **options)
    )
    found = smi()
    assert isinstance(found, dict) and (
        found.get("driver_version") == expected or expected in found
    )
    assert cards > 1 or found["temperature.gpu"] == "61" and len(found) == len(bench_form.ASKED)


def test_the_form_without_nvidia_smi_and_git_reports_it(monkeypatch):
    def missing(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(bench_form.subprocess, "run", missing)
    lines = lines_of(
        form({"benchmark": "kernel_bench", "device": "a card", "rows": [{"us": 1}], "decode": {}})
    )
    assert lines[0]["commit"] is None and lines[1] == {"device": "a card"}
    assert "by hand" in lines[2]["smi"] and lines[3:] == [{"decode": {}}, {"row": {"us": 1}}]
