"""Tests of executed.py: cycles of the load and store unit by the addresses of an executed launch.

Oracle: cycles computed by hand from the layout of a kernel's accesses.
"""

import json

import pytest

from benchmarks.gpu_model.executed import dram_cycles, table
from benchmarks.gpu_model.report_jobs import drawn
from benchmarks.gpu_model.roofline import CARDS, WEIGHT_DOUBLE_QUANT
from tests.bench.test_kernel_report import python

# Eight warps read and write 8 values of bf16 a lane: 4 lines for each tensor and warp.
GATED = 3 * 4 * 32 / (8 * 32)


def test_cycles_of_kernels_on_one_target():
    """The gate reads and writes full lines, and the dequantiser's stores are full sectors."""
    stdout = python(
        "benchmarks/gpu_model/executed.py",
        "--targets=sm_86",
        "gated",
        "dequantize_nf4_double_quant",
    )
    gated, dequantise = json.loads(stdout.splitlines()[-1])["rows"]
    assert gated["lsu_cycles"] == GATED
    assert gated["load_sectors_used"] == gated["store_sectors_used"] == 1
    assert gated["conflicts"] == []
    assert dequantise["store_sectors_used"] == 1
    # 4 words of 8 weights a lane: 1 line each; 32 look-ups and 4 stores of 4 lines; then the scales
    least = (4 * 1 + 32 + 4 * 4) / 32
    assert least < dequantise["lsu_cycles"] < 2 * least
    (line,) = [line for line in stdout.splitlines() if line.startswith("| `gated`")]
    share = GATED / (32 * 6 / (360 / 28 / 1.777))  # of an RTX 3060: 6 bytes a value
    assert line.startswith(f"| `gated` | {GATED:.2f} | 100% | 100% | {share:.2f} | ")


@pytest.mark.parametrize(
    ("card", "cycles"), [("RTX 3060", 2.28), ("RTX 3090", 2.45), ("RTX 4090", 5.28)]
)
def test_cycles_in_which_memory_moves_32_weights(card, cycles):
    """For example 28 SMs at 1.777 GHz share 360 GB/s: 7.235 bytes each, of 16.51 for 32 weights."""
    assert dram_cycles(CARDS[card], WEIGHT_DOUBLE_QUANT) == pytest.approx(cycles, abs=0.01)


def test_a_share_is_cycles_over_the_cycles_of_memory():
    row = {
        "kernel": "k",
        "target": "sm_86",
        "bytes": WEIGHT_DOUBLE_QUANT,
        "lsu_cycles": 2 * dram_cycles(CARDS["RTX 3060"], WEIGHT_DOUBLE_QUANT),
        "load_sectors_used": 0.5,
        "store_sectors_used": 1.0,
        "conflicts": [{"passes": 3.2, "where": "a line"}, {"passes": 1.6, "where": "a line"}],
    }
    cells = table([row])[2].split(" | ")
    assert cells[2:5] == ["50%", "100%", "2.00"] and cells[-1] == "3.2 |"


def test_drawn_values_repeat_after_their_first():
    values = drawn(3, 2**20)
    assert values.shape == (3, 2**20) and values[0].equal(values[2]) and values.std() > 0.9
