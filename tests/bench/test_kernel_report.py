"""Tests of kernel_report.py: instruction counts of our kernels and of bitsandbytes'.

Our kernels compile to few, wide instructions on every supported GPU. The figures of bitsandbytes'
kernels equal a count by hand. The last line of the report is JSON.

The report runs in a separate process in which Triton compiles, because other tests in this process
may use Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version

import pytest

from benchmarks.gpu_model import kernel_report
from benchmarks.gpu_model.kernel_report import (
    BITSANDBYTES,
    estimates,
    figures,
    print_estimates,
    rows,
    three_launches,
)
from benchmarks.gpu_model.roofline import CARDS
from benchmarks.gpu_model.sass import Counts, Tally
from helpers.source import ROOT
from minilora_kernels.triton import nf4_matmul

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
KEYS = {
    "kernel", "target", "instructions_per_element", "load_bits", "store_bits",
    "registers", "spills", "shared_bytes", "occupancy",
}  # fmt: skip
# The largest number of instructions for one weight, logit, parameter or value. bitsandbytes 0.50.2
# needs 24.8 to 26.6 to dequantise (its double quantisation takes two more kernels), 65 to 72.5 to
# quantise, 7.8 to 8 for the GEMV and 448 to 506 for AdamW.
MOST = {
    "dequantize_nf4": 7.5,
    "dequantize_nf4_double_quant": 8.5,
    "quantize_nf4": 21.5,
    "gemv_nf4_double_quant": 6.5,
    "matmul_nf4": 6.5,
    "matmul_nf4_64_tokens": 8.5,
    "cross_entropy": 32,
    "adamw_8bit": 135,
    "rms_norm": 15,
    "rms_norm_backward": 20,
    "rms_norm_weight": 10,
    "rotate": 15,
    "gated": 20,
    "gated_backward": 28,
    "gated_gelu": 25,
    "gated_gelu_backward": 37,
}
# The most cycles of the load and store unit for 32 values, by executed addresses. DRAM takes 2.28 on
# an RTX 3060 and 2.45 on an RTX 3090 for 32 weights.
MOST_LSU = {"gemv_nf4_double_quant": 2.0, "matmul_nf4": 2.05, "quantize_nf4": 3.5}
# The fast tests count every kernel function once, on one target.
# The slow tests count all of MOST on all TARGETS.
FAST_TARGET = "sm_86"
FAST = (
    "dequantize_nf4_double_quant",
    "quantize_nf4",
    "gemv_nf4_double_quant",
    "matmul_nf4",
    "cross_entropy",
    "adamw_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_weight",
    "rotate",
    "gated",
    "gated_backward",
)
FAST_PEERS = ("dequantize_nf4", "gemv_nf4")  # bitsandbytes' kernels without and with a loop
# Kernels of a decoder layer's elementwise operations.
STEPS = [kernel for kernel in MOST if kernel.startswith(("rms", "rotate", "gated"))]
# A line of the table: kernel, instructions from and to, occupancy from and to.
QUOTED = r"\| `\w+` \| ([\d.]+) to ([\d.]+) \| (\d+) to (\d+) \|"
COUNT = (
    f"import json; from benchmarks.gpu_model import kernel_report; "
    f"print(json.dumps(kernel_report.rows({TARGETS}, {(*MOST,)})))"
)
COUNT_FEW = f"""
import json
from benchmarks.gpu_model import kernel_report
ours = kernel_report.rows(["{FAST_TARGET}"], {FAST})
theirs = kernel_report.bitsandbytes_rows(["{FAST_TARGET}"], {FAST_PEERS})
amd, _ = kernel_report.compiled(kernel_report.jobs()["gated"], "gfx942")
print(json.dumps({{"ours": ours, "theirs": theirs, "amd": amd.name}}))
"""


def python(*arguments: str) -> str:
    """Run a new Python process that can import library and benchmarks; return its stdout."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": path
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def goal_rows() -> list[dict]:
    """Return a row for each kernel of MOST and each target."""
    return json.loads(python("-c", COUNT).splitlines()[-1])


@cache
def few() -> dict:
    """Return the rows of FAST and FAST_PEERS on FAST_TARGET, and a kernel compiled for AMD."""
    return json.loads(python("-c", COUNT_FEW).splitlines()[-1])


@cache
def report() -> tuple[str, dict]:
    """Run the script for one NVIDIA and one AMD target; return its stdout and its document."""
    stdout = python("benchmarks/gpu_model/kernel_report.py", "--targets", "sm_86,gfx942")
    return stdout, json.loads(stdout.splitlines()[-1])


def reaches_its_goals(kernel: str, row: dict) -> None:
    """Assert that a kernel's machine code on one target is within its limits."""
    assert row["instructions_per_element"] <= MOST[kernel], row
    assert row["spills"] == 0, row
    assert row["load_bits"] >= 32, row
    assert row["pipes"]["lsu"] <= MOST_LSU.get(kernel, 100), row
    assert kernel != "cross_entropy" or row["occupancy"] == 1 and row["load_bits"] == 128, row
    assert kernel != "adamw_8bit" or row["store_bits"] >= 32 and row["shared_bytes"] <= 1024, row
    if kernel in STEPS:
        assert row["load_bits"] == 128 and row["occupancy"] >= 0.6, row
        # The norm kernels also store r and the sums of dw, which are narrow.
        assert row["store_bits"] == 128 or "norm" in kernel, row
    if kernel.startswith("dequantize"):
        assert row["store_bits"] == 128, row
    if kernel.startswith("gemv"):
        assert row["load_bits"] == 128 and row["occupancy"] >= 0.43, row
    if kernel.startswith("matmul"):
        # 12 warps an SM with 64 bytes of codes a lane on the way
        assert row["load_bits"] == 128 and row["occupancy"] >= 0.18, row


@pytest.mark.strict
@pytest.mark.parametrize("kernel", FAST)
def test_our_kernels_reach_their_goals_on_one_target(kernel):
    (row,) = [row for row in few()["ours"] if row["kernel"] == kernel]
    assert row["target"] == FAST_TARGET
    reaches_its_goals(kernel, row)


@pytest.mark.slow
@pytest.mark.strict
@pytest.mark.parametrize("kernel", MOST)
def test_our_kernels_reach_their_goals(kernel):
    rows = [row for row in goal_rows() if row["kernel"] == kernel]
    assert [row["target"] for row in rows] == list(TARGETS)
    for row in rows:
        reaches_its_goals(kernel, row)


def bound_by_memory(bounds: list[dict]) -> bool:
    """Return True if DRAM is each kernel's bottleneck and the rest takes at most half its time."""
    return all(bound["binds"] == "DRAM" and bound["of_dram"] <= 0.5 for bound in bounds)


def test_layer_steps_are_memory_bound_on_the_cards_of_one_target():
    """The roofline model computes the bound at full layer size."""
    found = [bound for bound in estimates(few()["ours"]) if bound["kernel"] in STEPS]
    assert {bound["card"] for bound in found} == {"RTX 3060", "RTX 3090"}
    assert {bound["kernel"] for bound in found} == set(STEPS) & set(FAST)
    assert bound_by_memory(found), found


@pytest.mark.slow
def test_layer_steps_are_memory_bound_on_every_card():
    """The roofline model computes the bound at full layer size."""
    found = [bound for bound in estimates(goal_rows()) if bound["kernel"] in STEPS]
    assert {bound["card"] for bound in found} == CARDS.keys() - {"T4"}
    assert bound_by_memory(found), found


def quoted() -> list[str]:
    """Return the lines of the marked table in kernels/README.md, without its header."""
    table = (
        (ROOT / "kernels/README.md")
        .read_text()
        .partition("<!-- counts -->")[2]
        .partition("<!-- /counts -->")[0]
    )
    return table.strip().splitlines()[2:]


@pytest.mark.strict
def test_kernels_readme_ranges_include_the_counts_of_one_target():
    lines = {line.split("`")[1]: line for line in quoted()}
    assert list(lines) == list(MOST)
    peers = {row["kernel"]: row for row in few()["theirs"]}
    for row in few()["ours"]:
        least, most, lowest, highest = re.match(QUOTED, lines[row["kernel"]]).groups()
        assert float(least) <= round(row["instructions_per_element"], 2) <= float(most), row
        assert int(lowest) <= round(100 * row["occupancy"]) <= int(highest), row
    theirs = f"{peers['dequantize_nf4']['instructions_per_element']:.2f}"
    assert lines["dequantize_nf4"].endswith(f"| {theirs} |")


@pytest.mark.slow
@pytest.mark.strict
def test_kernels_readme_table_equals_the_counts():
    """Compare the table in kernels/README.md line by line."""
    lines = []
    for kernel in MOST:
        rows = [row for row in goal_rows() if row["kernel"] == kernel]
        counts = [row["instructions_per_element"] for row in rows]
        share = [round(100 * row["occupancy"]) for row in rows]
        peer = {row["kernel"]: row for row in report()[1]["bitsandbytes"]}.get(kernel)
        theirs = (
            f"{peer['instructions_per_element']:.2f}"
            if peer
            else "three launches"
            if "nf4" in kernel
            else "none"
        )
        lines.append(
            f"| `{kernel}` | {min(counts):.2f} to {max(counts):.2f} "
            f"| {min(share)} to {max(share)} | {theirs} |"
        )
    assert quoted() == lines, "\n".join(lines)


# Counted by hand in the disassembly of the wheel's libbitsandbytes_cuda132.so, sm_86: instructions
# per weight, registers, bytes of shared memory, occupancy.
BY_HAND = {
    # 432 lines minus 9 NOP and the jump to itself; 16 weights per thread
    "dequantize_nf4": (422 / 16, 40, 2656, 32 / 48),
    "quantize_nf4": (65.0, 24, 180, 16 / 48),
    "gemv_nf4": (293 / 32, 39, 32, 1.0),  # 293 instructions in the loop, 32 weights
    "gemv_nf4_double_quant": (250 / 32, 57, 0, 32 / 48),
    # 16 of the 128 HMMA instructions of a 32 x 64 x 128 product: 8 warps, 32 weights per thread.
    # 261 instructions minus 10 that load a scale, which not every warp executes.
    "matmul_nf4": (251 / 32, 64, 0, 32 / 48),
}


def counted_as_by_hand(found: list[dict], kernels: Iterable[str]) -> None:
    """Assert that the rows of `kernels` have the figures of BY_HAND."""
    if version("bitsandbytes") != "0.50.2":
        pytest.skip(
            f"the figures are of bitsandbytes 0.50.2, got version {version('bitsandbytes')}"
        )
    rows = {row["kernel"]: row for row in found}
    for kernel in kernels:
        row = rows[kernel]
        figures = (
            row["instructions_per_element"],
            row["registers"],
            row["shared_bytes"],
            row["occupancy"],
        )
        assert figures == pytest.approx(BY_HAND[kernel]), kernel
    # It loads packed weights as single bytes and stores single bf16 values. The codebook is in
    # global memory.
    assert rows["dequantize_nf4"]["loads"] == {"8": 8, "32": 17} and rows["dequantize_nf4"][
        "stores"
    ] == {"16": 16}


def test_two_kernels_of_bitsandbytes_are_counted_as_by_hand():
    counted_as_by_hand(few()["theirs"], FAST_PEERS)


@pytest.mark.slow
def test_bitsandbytes_is_counted_as_by_hand():
    counted_as_by_hand(report()[1]["bitsandbytes"], BY_HAND)


def test_the_last_line_is_json_with_the_figures_of_one_target(monkeypatch, capsys):
    """The script's last line contains the rows that `few` counted."""
    assert few()["amd"] == "_gated"  # compiled for AMD to machine code
    monkeypatch.setattr(kernel_report, "rows", lambda targets: few()["ours"])
    monkeypatch.setattr(kernel_report, "bitsandbytes_rows", lambda targets: few()["theirs"])
    monkeypatch.setattr(kernel_report, "three_launches", lambda found: [])  # needs all kernels
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--targets", FAST_TARGET])
    kernel_report.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["triton"] == version("triton")
    assert document["rows"] == few()["ours"] and document["bitsandbytes"] == few()["theirs"]
    assert tuple(row["kernel"] for row in document["rows"]) == FAST
    every_figure([*document["rows"], *document["bitsandbytes"]])
    cards = {bound["card"] for bound in document["roofline"]}
    assert cards == {"RTX 3060", "RTX 3090"}  # the cards with sm_86


def every_figure(rows: list[dict]) -> None:
    """Assert that each row is of sm_86 and has every figure."""
    for row in rows:
        assert row.keys() >= KEYS and row["target"] == "sm_86", row
        assert row["instructions_per_element"] > 0 and 0 < row["occupancy"] <= 1, row


@pytest.mark.slow
def test_the_last_line_is_json_with_every_figure():
    stdout, document = report()
    assert document["triton"] == version("triton")
    kernels = [row["kernel"] for row in document["rows"]]
    assert {*MOST, "double_quantize_nf4", "gemv_nf4_double_quant_small"} < set(kernels)
    assert {
        f"{kernel}_textbook" for kernel in MOST if "nf4" in kernel and "matmul" not in kernel
    } < set(kernels)
    every_figure([*document["rows"], *document["bitsandbytes"]])
    for kernel in kernels:
        assert f"{kernel} on gfx942" in stdout
    cards = {bound["card"] for bound in document["roofline"]}
    assert cards == {"RTX 3060", "RTX 3090"}  # the cards with sm_86


def test_kernels_not_used_on_a_card_are_left_out_and_reported(monkeypatch, capsys):
    assert rows(["sm_75"], ["matmul_nf4"]) == []
    monkeypatch.setattr(nf4_matmul, "OLD", True)
    assert rows(["sm_80"], ["matmul_nf4_64_tokens"]) == []
    said = [line.partition(": NOT COUNTED")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["matmul_nf4 on sm_75", "matmul_nf4_64_tokens on sm_80"]

    counted = [("on both", "sm_75"), ("on both", "sm_80"), ("on one", "sm_80")]
    row = {"bytes_per_element": 1.0, "pipes": {"issue": 1.0}}
    print_estimates(
        "title",
        estimates([{"kernel": kernel, "target": target} | row for kernel, target in counted]),
    )
    # time of LAYER bytes at 320 and 2039 GB/s
    expected = [
        ["T4", "A100-80"],
        ["183.5 issue 0.04", "28.8 issue 0.10"],
        ["-", "28.8 issue 0.10"],
    ]
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [[line[38:55].strip(), line[55:].strip()] for line in table] == expected


def test_figures_of_a_loop_and_of_the_code_around_it():
    """Count a path of 100 instructions of which 60 are the loop.

    40 elements in 4 iterations take 40 + 4 x 60 instructions.
    """
    path = Tally(100, {128: 3, 8: 2}, {16: 1, 32: 2}, 0, {"alu": 50})
    loop = Tally(60, {64: 1}, {}, 0, {"alu": 30})
    looped = figures(Counts(path, loop, 0, 32, 0), elements=40, trip=10)
    assert (looped["instructions_per_element"], looped["whole"]) == (6.0, 7.0)
    assert (looped["load_bits"], looped["store_bits"]) == (64, 16)
    assert looped["pipes"] == {"issue": 6.0, "alu": 3.0}
    straight = figures(Counts(path, loop, 0, 32, 0), elements=40, trip=0)
    assert (straight["instructions_per_element"], straight["whole"], straight["load_bits"]) == (
        2.5,
        2.5,
        128,
    )
    assert straight["pipes"] == {"issue": 2.5, "alu": 1.25}


def test_three_launches_take_the_time_of_their_bytes():
    """Count 2.7659 bytes per weight.

    Dequantisation moves 2 + 1/2 + 4/64. The two other kernels move 1 + 4 + 4/256 for each scale's
    code and 4 + 4 for each scale to add the mean.
    """
    rows = [
        {
            "kernel": name,
            "target": "sm_86",
            "bytes_per_element": peer.bytes,
            "pipes": {"issue": 1.0},
        }
        for name, peer in BITSANDBYTES.items()
    ]
    times = {bound["card"]: bound["microseconds"] for bound in three_launches(estimates(rows))}
    assert times == {
        "RTX 3060": pytest.approx(451.1, abs=0.06),
        "RTX 3090": pytest.approx(173.5, abs=0.06),
    }
