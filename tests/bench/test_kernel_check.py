"""Tests of kernel_bench.py's check of the kernels, in Triton's interpreter.

All kernels pass, no kernel is left out, and if one number of a kernel is wrong, the check names the
kernel and nothing is timed.

Triton interprets kernels in separate processes, because other tests in this process may have Triton
compile them.
"""

import pytest
import torch

from benchmarks.gpu_kernels.check_parts import Mismatch, same_bits
from benchmarks.gpu_kernels.kernel_check import check_dequantize, dense_of, within_bound
from minilora_kernels.triton.launch import TILES
from tests.bench.test_kernel_bench import last_line, python

# In the interpreter: the jobs that are timed on a GPU, compared with plain torch; a short tuning
# run; the check.
RIGHT = """
import torch
from benchmarks.gpu_kernels import kernel_bench, kernel_jobs, kernel_tune
from benchmarks._lib.bench_timing import CpuClock
from minilora_kernels.triton.launch import tile

cpu, kernel_jobs.cpu = torch.device("cpu"), None  # run the launchers, not the functions for a CPU
for job in kernel_jobs.jobs((48, 64), cpu, CpuClock(), ["eager"]):
    # raises if the bits differ from plain torch
    row = kernel_bench.row_of(job, (48, 64), [], CpuClock(), rounds=1)
    # a product may differ by the rounding of W and y to bf16
    assert row["differs"]["eager"] <= (2**-7 if job.name in kernel_jobs.PRODUCTS else 0), row
kernel_tune.LARGE = kernel_tune.SMALL = (32, 64)
grid = {
    "double_quantize_nf4": [tile(4, ROWS=2), tile(4, ROWS=3)],
    "rms_norm_weight": [tile(2, ROWS=4, COLUMNS=64)],
}
default_only = "matmul_nf4", "cross_entropy", "adamw_8bit", "rms_norm", "rotate", "gated_backward"
grid |= dict.fromkeys((*default_only, "matmul_nf4_many"), [])
kernel_tune.tune(cpu, CpuClock(), 1, grid)
kernel_bench.main(["--check"])
"""


@pytest.mark.slow
def test_the_check_passes_and_leaves_no_kernel_out():
    done = python("-c", RIGHT, interpret=True)
    document = last_line(done)
    assert document["checked"] == list(TILES) and "rows" not in document
    assert "tile(4, ROWS=3) LEFT OUT" in done.stdout
    assert (
        '"interpreter": tile(4, ROWS=2)' in done.stdout
        or "no tile is 3% faster; now tile(4, ROWS=4)" in done.stdout
    )


def test_the_bound_lets_one_rounding_through_and_nothing_more():
    W, x, bias = torch.randn(3, 64), torch.randn(64).bfloat16(), torch.ones(3).bfloat16()
    right = (W.double() @ x.double() + bias.double()).bfloat16()
    within_bound("right", right, W, x, bias)
    within_bound("right, in fp32", W @ x.float() + bias.float(), W, x.float(), bias.float())
    for wrong in (
        (right.view(torch.int16) + 2).view(torch.bfloat16),
        right - bias,
        right * torch.nan,
    ):
        with pytest.raises(Mismatch, match=r"3 of 3 are off, first \[0\]"):
            within_bound("wrong", wrong, W, x, bias)


def test_writes_past_the_end_and_the_sign_of_zero_are_reported():
    def careless(*arguments):
        out = arguments[-1]
        dequantize_right(*arguments)
        out.as_strided((1,), (1,), out.numel()).fill_(0)

    def dequantize_right(*arguments):
        *parts, blocksize, out = arguments
        double = parts[2] is not None
        out.copy_(dense_of(tuple(out.shape), blocksize, double, out.dtype))

    check_dequantize("right", dequantize_right, torch.device("cpu"))
    with pytest.raises(
        Mismatch, match=r"past its end: 1 of 64 differ from the reference, first \[0\]"
    ):
        check_dequantize("careless", careless, torch.device("cpu"))
    with pytest.raises(Mismatch, match=r"first \[1\]: got -0.0, expected 0.0"):
        same_bits("zeros", torch.tensor([0.0, -0.0]), torch.zeros(2))


# Each table that a launcher passes to its kernel is wrong by one unit in the last place, the
# smallest possible mistake. The thresholds of the second level are wrong by 1 in 1000, because no
# sample value is that close to a threshold.
WRONG = """
import torch
from benchmarks.gpu_kernels import kernel_bench, kernel_check
from benchmarks.gpu_kernels.check_parts import Mismatch
from minilora_kernels.triton import nf4_dequantize, nf4_quantize
from minilora_kernels.triton import adamw_8bit, cross_entropy, swiglu, rms_norm, rope

up = lambda table: torch.nextafter(table, torch.full_like(table, 2))
bits_up = lambda table: table + (torch.arange(64) < 32)  # the thresholds, not the counts
for module, constant, bend, kernels in (
    (nf4_quantize, "_bin_table", bits_up, ["quantize_nf4"]),
    (nf4_quantize, "nf4_thresholds", up, ["quantize_nf4_textbook"]),
    (nf4_quantize, "_nested_thresholds", lambda table: table * 0.999, ["double_quantize_nf4"]),
    (adamw_8bit, "_signed_midpoints", up, ["adamw_8bit"]),
    (adamw_8bit, "_unsigned_midpoints", lambda table: table * 0.999, ["adamw_8bit"]),
    (adamw_8bit, "_signed_map", up, ["adamw_8bit"]),
    (
        nf4_dequantize,
        "nf4_codebook",
        up,
        [
            "gemv_nf4",
            "gemv_nf4_small",
            "gemv_nf4_textbook",
            "matmul_nf4",
            "matmul_nf4_many",
            "dequantize_nf4_textbook",
            "dequantize_nf4",
        ],
    ),
):
    right = getattr(module, constant)
    setattr(module, constant, lambda: bend(right()))
    for kernel in kernels:
        try:
            kernel_check.CHECKS[kernel](kernel, torch.device("cpu"))
        except Mismatch as error:
            print("caught", error)
    if module is not nf4_dequantize:
        setattr(module, constant, right)
# kernels without a table: each number that a launcher passes on is slightly wrong
def off(module, launcher, kernel, bend):
    right = getattr(module, launcher)
    setattr(module, launcher, lambda *arguments: right(*bend(*arguments)))
    try:
        kernel_check.CHECKS[kernel](kernel, torch.device("cpu"))
    except Mismatch as error:
        print("caught", error)
    setattr(module, launcher, right)

head = cross_entropy, "cross_entropy", "cross_entropy"
off(*head, lambda logits, labels, loss, *_: (logits, labels, loss, True, 1.0001))
off(*head, lambda logits, labels, loss, *_: (logits, labels + 1, loss, True, 1))
off(rms_norm, "rms_norm", "rms_norm", lambda x, w, eps, gemma: (x, w, eps + 1e-3, gemma))
off(
    rms_norm,
    "rms_norm_backward",
    "rms_norm_backward",
    lambda x, w, r, dy, gemma: (x, w, r * 1.0001, dy, gemma),
)
off(rms_norm, "rms_norm_weight", "rms_norm_weight", lambda x, r, dy: (x, r * 1.0001, dy))
off(rope, "rotate", "rotate", lambda x, cos, sin, sign: (x, cos, sin, sign * (1 + 2**-20)))
off(swiglu, "gated", "gated", lambda gate, up, gelu: (gate, up, not gelu))
off(
    swiglu,
    "gated_backward",
    "gated_backward",
    lambda gate, up, dy, gelu: (gate, up, dy * (1 + 2**-7), gelu),
)
kernel_bench.main(["--check"])
"""


def test_a_wrong_kernel_is_named_and_nothing_is_timed():
    done = python("-c", WRONG, interpret=True)
    caught = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("caught")]
    # AdamW has three tables, and cross-entropy has two faults.
    assert set(caught) == set(TILES) and len(caught) == len(TILES) + 3
    assert (
        done.returncode == 1
        and "nothing is timed: dequantize_nf4 (7, 129) in blocks of 64" in done.stderr
    )
    assert ": got " in done.stderr and ", expected " in done.stderr
