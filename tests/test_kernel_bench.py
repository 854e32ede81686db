"""Proves that kernel_bench.py times the layers that it names, counts their bytes right, times nothing while a kernel
is wrong, and runs to its end: the check in Triton's interpreter, the rest on a CPU, all of it where there is a GPU.

What Triton interprets runs in processes of its own: here another test may have it compile.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import bench_timing
import kernel_bench
from bench_timing import CpuClock, GpuClock, buffers, layers, measure, shapes_of
from check_parts import Mismatch, same_bits
from kernel_check import check_dequantize, dense_of, within_bound
from kernel_jobs import DEQUANTISE, GEMV, OPERATIONS, OURS, QUANTISE, QUANTISE_TWICE, jobs
from minilora_kernels.launch import TILES
from source import ROOT

SCRIPT = "benchmarks/kernel_bench.py"


def python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds the library and the benchmarks, and no GPU."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    env |= {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess) -> dict:
    """The JSON document."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- layers and bytes, against what is published and worked out


def test_layers_are_those_of_the_published_models():
    """As the weights' shapes stand in the checkpoints: q and o, k and v, gate and up, down."""
    assert layers("Llama-3-8B") == layers("Mistral-7B") == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    assert layers("Qwen2.5-7B") == [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)]
    assert layers("SmolLM2-135M") == [(576, 576), (192, 576), (1536, 576), (576, 1536)]


@pytest.mark.parametrize(
    ("model", "blocks", "vocabulary", "tied", "extra", "parameters"),
    [  # extra: biases of q, k, v in a block; parameters as the models' pages have them
        ("Llama-3-8B", 32, 128256, False, 0, 8_030_261_248),
        ("Mistral-7B", 32, 32000, False, 0, 7_241_732_096),
        ("Qwen2.5-7B", 28, 152064, False, 3584 + 2 * 512, 7_615_616_512),
        ("SmolLM2-135M", 30, 49152, True, 0, 134_515_008),
    ],
)
def test_layers_add_up_to_the_published_number_of_parameters(model, blocks, vocabulary, tied, extra, parameters):
    (queries, hidden), (keys, _), (intermediate, _), _ = layers(model)
    block = 2 * queries * hidden + 2 * keys * hidden + 3 * intermediate * hidden + 2 * hidden + extra  # two norms
    assert blocks * block + vocabulary * hidden * (1 if tied else 2) + hidden == parameters


def test_bytes_of_a_call():
    """4096 x 4096: n/2 bytes of codes, n/64 of scales, 4 a group of 256 scales, 4 of offset; 2 n of bf16."""
    n = 4096 * 4096
    weight = n / 2 + n / 64 + 4 * n / (64 * 256) + 4
    moved = {job.name: job.bytes for job in jobs((4096, 4096), torch.device("cpu"), CpuClock(), ())}
    assert moved[DEQUANTISE] == moved[QUANTISE_TWICE] == weight + 2 * n
    assert round(moved[DEQUANTISE] / n, 4) == 2.5159
    assert moved[QUANTISE] / n == 2.5 + 4 / 64  # fp32 absmax
    assert moved[GEMV] == weight + 2 * (4096 + 4096)  # x and y


def test_models_that_share_a_shape_share_its_row():
    found = shapes_of(["Mistral-7B", "SmolLM2-135M", "Llama-3-8B"])
    assert len(found) == 8 and found[1024, 4096] == ["Mistral-7B", "Llama-3-8B"]
    assert found[576, 576] == ["SmolLM2-135M"]


# ---- clocks


def test_buffers_exceed_three_times_the_cache():
    clock = SimpleNamespace(cache=50 << 20, turns=16)
    for size in (1, 10 << 20, 30 << 20, 1 << 30):
        count = buffers(size, clock)
        assert 2 <= count <= clock.turns
        assert count * size >= 3 * clock.cache or count == clock.turns


def test_a_batch_takes_its_buffers_in_turn_and_the_first_round_does_not_count():
    seen, batches = [], []

    class Clock(CpuClock):
        def batch(self, call: Callable, first: int) -> float:
            batches.append(first)
            super().batch(call, first)
            return float(first)

    times = measure(Clock(), {"a": seen.append, "b": lambda turn: None}, rounds=3)
    assert seen == list(range(8)) and batches == [0, 0, 2, 2, 4, 4, 6, 6]
    assert times == {"a": [2.0, 4.0, 6.0], "b": [2.0, 4.0, 6.0]}


def test_the_gpu_clock_fills_the_queue_before_it_starts(monkeypatch):
    """Its steps, on a GPU that is not there: a rehearsal, copies for as long as it took, and the same calls timed."""
    steps = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            steps.append("event")

        def synchronize(self) -> None:
            steps.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 3.2  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 10))
    monkeypatch.setattr(bench_timing, "COPIED", 1 << 12)
    clock = GpuClock(torch.device("cpu"))
    monkeypatch.setattr(clock, "copy", lambda turn: steps.append("copy"))
    steps.clear()
    assert clock.batch(steps.append, 32) == pytest.approx(3200 / 16)
    turns = list(range(32, 48))
    copies = steps.count("copy")
    assert copies >= 1 and steps == ["wait", *turns, *["copy"] * copies, "event", *turns, "event", "wait"]


# ---- the script


def test_without_a_gpu_it_says_so():
    done = python(SCRIPT)
    assert last_line(done) == {"benchmark": "kernel_bench", "device": None, "rows": []}
    assert "no GPU here: nothing was run" in done.stdout and "TRITON_INTERPRET=1" in done.stdout


def test_a_check_that_cannot_run_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel_bench.launch, "interpreted", lambda: False)
    for options in (["--check"], ["--check", "--device", "cpu"]):
        with pytest.raises(SystemExit, match="nothing was checked"):
            kernel_bench.main(options)


# In the interpreter: what is timed on a GPU, against plain torch; a little tuning; the check.
RIGHT = """
import torch, kernel_bench, kernel_jobs, kernel_tune
from bench_timing import CpuClock
from minilora_kernels.launch import tile

cpu, kernel_jobs.cpu = torch.device("cpu"), None  # the launchers must run, not what runs on a CPU otherwise
for job in kernel_jobs.jobs((48, 64), cpu, CpuClock(), ["eager"]):
    row = kernel_bench.row_of(job, (48, 64), [], CpuClock(), rounds=1)  # raises where plain torch has other bits
    assert row["differs"]["eager"] <= (2**-7 if job.name == "GEMV" else 0), row  # roundings of W and y to bf16
kernel_tune.LARGE = kernel_tune.SMALL = (32, 64)
grid = {"double_quantize_nf4": [tile(4, ROWS=2), tile(4, ROWS=3)], "rms_norm_weight": [tile(2, ROWS=4, COLUMNS=64)]}
grid |= dict.fromkeys(("cross_entropy", "adamw_8bit", "rms_norm", "rotate", "gated_backward"), [])
kernel_tune.tune(cpu, CpuClock(), 1, grid)
kernel_bench.main(["--check"])
"""


def test_the_check_passes_and_leaves_no_kernel_out():
    done = python("-c", RIGHT, interpret=True)
    document = last_line(done)
    assert document["checked"] == list(TILES) and "rows" not in document
    assert "tile(4, ROWS=3) LEFT OUT" in done.stdout
    assert '"interpreter": tile(4, ROWS=2)' in done.stdout or "no tile is 3% faster; now tile(4, ROWS=4)" in done.stdout


def test_the_bound_lets_one_rounding_through_and_nothing_more():
    W, x, bias = torch.randn(3, 64), torch.randn(64).bfloat16(), torch.ones(3).bfloat16()
    right = (W.double() @ x.double() + bias.double()).bfloat16()
    within_bound("right", right, W, x, bias)
    within_bound("right, in fp32", W @ x.float() + bias.float(), W, x.float(), bias.float())
    for wrong in ((right.view(torch.int16) + 2).view(torch.bfloat16), right - bias, right * torch.nan):
        with pytest.raises(Mismatch, match=r"3 of 3 are off, first \[0\]"):
            within_bound("wrong", wrong, W, x, bias)


def test_what_is_written_past_the_end_and_a_zeros_sign_are_differences():
    def careless(*arguments):
        out = arguments[-1]
        dequantize_right(*arguments)
        out.as_strided((1,), (1,), out.numel()).fill_(0)

    def dequantize_right(*arguments):
        *parts, blocksize, out = arguments
        double = parts[2] is not None
        out.copy_(dense_of(tuple(out.shape), blocksize, double, out.dtype))

    check_dequantize("right", dequantize_right, torch.device("cpu"))
    with pytest.raises(Mismatch, match=r"past its end: 1 of 64 differ from the reference, first \[0\]"):
        check_dequantize("careless", careless, torch.device("cpu"))
    with pytest.raises(Mismatch, match=r"first \[1\]: got -0.0, expected 0.0"):
        same_bits("zeros", torch.tensor([0.0, -0.0]), torch.zeros(2))


# Each table that a launcher hands to its kernel, one unit in the last place off: as small as a mistake can be. (The
# thresholds of the second level, which no sample meets so closely, 1 in 1000 off.)
WRONG = """
import torch, kernel_bench, kernel_check
from check_parts import Mismatch
from minilora_kernels import nf4_dequantize, nf4_quantize
from minilora_kernels.steps import adam8bit, cross_entropy, gates, norm, rotation

up = lambda table: torch.nextafter(table, torch.full_like(table, 2))
bits_up = lambda table: table + (1 << 32)
for module, constant, bend, kernels in (
    (nf4_quantize, "_bin_table", bits_up, ["quantize_nf4"]),
    (nf4_quantize, "nf4_thresholds", up, ["quantize_nf4_textbook"]),
    (nf4_quantize, "_nested_thresholds", lambda table: table * 0.999, ["double_quantize_nf4"]),
    (adam8bit, "_signed_midpoints", up, ["adamw_8bit"]),
    (adam8bit, "_unsigned_midpoints", lambda table: table * 0.999, ["adamw_8bit"]),
    (adam8bit, "_signed_map", up, ["adamw_8bit"]),
    (
        nf4_dequantize,
        "nf4_codebook",
        up,
        ["gemv_nf4", "gemv_nf4_small", "gemv_nf4_textbook", "dequantize_nf4_textbook", "dequantize_nf4"],
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
# those without a table: each number that a launcher hands on, a little off
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
off(norm, "rms_norm", "rms_norm", lambda x, w, eps, gemma: (x, w, eps + 1e-3, gemma))
off(norm, "rms_norm_backward", "rms_norm_backward", lambda x, w, r, dy, gemma: (x, w, r * 1.0001, dy, gemma))
off(norm, "rms_norm_weight", "rms_norm_weight", lambda x, r, dy: (x, r * 1.0001, dy))
off(rotation, "rotate", "rotate", lambda x, cos, sin, sign: (x, cos, sin, sign * (1 + 2**-20)))
off(gates, "gated", "gated", lambda gate, up, gelu: (gate, up, not gelu))
off(gates, "gated_backward", "gated_backward", lambda gate, up, dy, gelu: (gate, up, dy * (1 + 2**-7), gelu))
kernel_bench.main(["--check"])
"""


def test_a_wrong_kernel_is_named_and_nothing_is_timed():
    done = python("-c", WRONG, interpret=True)
    caught = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("caught")]
    assert set(caught) == set(TILES) and len(caught) == len(TILES) + 3  # three tables of AdamW, two faults of a head
    assert done.returncode == 1 and "nothing is timed: dequantize_nf4 (7, 129) in blocks of 64" in done.stderr
    assert ": got " in done.stderr and ", expected " in done.stderr


def test_the_whole_way_on_a_cpu(tmp_path):
    picture = tmp_path / "roofline.png"
    options = ("--peers", "eager,bitsandbytes", "--rounds", "1", "--tokens", "0", "--plot", str(picture))
    done = python(SCRIPT, "--device", "cpu", *options)
    document = last_line(done)
    assert "prove nothing about a GPU" in done.stdout and "NOT CHECKED" in done.stdout and not document["checked"]
    assert [row["job"] for row in document["rows"]] == [*OPERATIONS] * len(layers("tiny"))
    for row in document["rows"]:
        ours = row["us"][OURS]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / ours / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / document["copy_gb_per_s"])
        assert row["ratio"] == pytest.approx({name: us / ours for name, us in row["us"].items()})
        assert row["operations"] == math.prod(row["shape"]) * OPERATIONS[row["job"]]
        assert {"eager", "bitsandbytes"} < set(row["us"]) and not row["missing"]
        # all do the same job; a GEMV up to the rounding of W and of the result, 2^-8 each in bf16
        assert max(row["differs"].values()) <= (2**-7 if row["job"] == GEMV else 0), row
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_options_that_make_no_sense_are_refused(capsys):
    for options in (["--models", "Llama-9"], ["--peers", "unsloth"], ["--rounds", "0"], ["--device=cpu", "--tune"]):
        with pytest.raises(SystemExit, match="2"):
            kernel_bench.main(options)
        said = capsys.readouterr().err
        assert options[-1] in said and "expected" in said


@pytest.mark.gpu
@pytest.mark.slow
def test_the_whole_way_on_a_gpu(tmp_path):
    options = ["--models", "SmolLM2-135M", "--rounds", "3", "--tokens", "8", "--plot", str(tmp_path / "roofline.png")]
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, SCRIPT, *options]
    document = last_line(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True))
    assert document["checked"] == list(TILES)
    for row in document["rows"]:
        assert row["us"][OURS] > 0 and row["differs"]["eager"] <= (2**-7 if row["job"] == GEMV else 0), row
    assert document["decode"].get("path", "triton") == "triton"
