"""Tests of kernel_bench.py: layer shapes, byte counts, clocks, and full runs on a CPU and a GPU.

Its check of the kernels' results is tested in test_kernel_check.py.
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

from benchmarks._lib import bench_timing
from benchmarks._lib.bench_timing import CpuClock, GpuClock, buffers, layers, measure, shapes_of
from benchmarks.gpu_kernels import kernel_bench
from benchmarks.gpu_kernels.kernel_jobs import (
    DEQUANTISE,
    FEW,
    GEMV,
    OPERATIONS,
    OURS,
    PRODUCTS,
    QUANTISE,
    QUANTISE_TWICE,
    jobs,
)
from helpers.source import ROOT
from minilora_kernels.triton.launch import TILES

SCRIPT = "benchmarks/gpu_kernels/kernel_bench.py"


def python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    """Run a new Python process that can import the library and the benchmarks and sees no GPU."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    env |= {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True
    )


def last_line(done: subprocess.CompletedProcess) -> dict:
    """Return the JSON document on the last line of stdout."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- layers and bytes, compared with published numbers and with a count by hand


def test_layers_are_those_of_the_published_models():
    """Shapes of the weights in the checkpoints: q and o, k and v, gate and up, down."""
    assert (
        layers("Llama-3-8B")
        == layers("Mistral-7B")
        == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    )
    assert layers("Qwen2.5-7B") == [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)]
    assert layers("SmolLM2-135M") == [(576, 576), (192, 576), (1536, 576), (576, 1536)]


@pytest.mark.parametrize(
    ("model", "blocks", "vocabulary", "tied", "extra", "parameters"),
    [  # extra: biases of q, k and v in a block; parameters: published on the models' pages
        ("Llama-3-8B", 32, 128256, False, 0, 8_030_261_248),
        ("Mistral-7B", 32, 32000, False, 0, 7_241_732_096),
        ("Qwen2.5-7B", 28, 152064, False, 3584 + 2 * 512, 7_615_616_512),
        ("SmolLM2-135M", 30, 49152, True, 0, 134_515_008),
    ],
)
def test_layers_add_up_to_the_published_number_of_parameters(
    model, blocks, vocabulary, tied, extra, parameters
):
    (queries, hidden), (keys, _), (intermediate, _), _ = layers(model)
    # q and o; k and v; gate, up and down; two norms; biases
    block = (
        2 * queries * hidden + 2 * keys * hidden + 3 * intermediate * hidden + 2 * hidden + extra
    )
    assert blocks * block + vocabulary * hidden * (1 if tied else 2) + hidden == parameters


def test_bytes_of_a_call():
    """Count the bytes of a 4096 x 4096 weight, n values, by hand.

    Codes take n/2 bytes, scales n/64, each group of 256 scales 4, the offset 4, and bf16 values 2n.
    """
    n = 4096 * 4096
    weight = n / 2 + n / 64 + 4 * n / (64 * 256) + 4
    moved = {job.name: job.bytes for job in jobs((4096, 4096), torch.device("cpu"), CpuClock(), ())}
    assert moved[DEQUANTISE] == moved[QUANTISE_TWICE] == weight + 2 * n
    assert round(moved[DEQUANTISE] / n, 4) == 2.5159
    assert moved[QUANTISE] / n == 2.5 + 4 / 64  # fp32 absmax
    assert moved[GEMV] == weight + 2 * (4096 + 4096)  # x and y
    assert moved[FEW] == weight + 16 * 2 * (4096 + 4096)


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
    """Record the clock's steps with a fake GPU.

    The clock runs the calls once untimed, queues copies that take as long, and then times the
    same calls.
    """
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
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 10)
    )
    monkeypatch.setattr(bench_timing, "COPIED", 1 << 12)
    clock = GpuClock(torch.device("cpu"))
    monkeypatch.setattr(clock, "copy", lambda turn: steps.append("copy"))
    steps.clear()
    assert clock.batch(steps.append, 32) == pytest.approx(3200 / 16)
    turns = list(range(32, 48))
    copies = steps.count("copy")
    assert copies >= 1 and steps == [
        "wait",
        *turns,
        *["copy"] * copies,
        "event",
        *turns,
        "event",
        "wait",
    ]


# ---- the script


def test_main_without_a_gpu_reports_that_nothing_ran(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernel_bench.main([])
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == {
        "benchmark": "kernel_bench",
        "device": None,
        "rows": [],
    }
    assert "no GPU here: nothing was run" in said and "TRITON_INTERPRET=1" in said


@pytest.mark.slow
def test_script_without_a_gpu_reports_that_nothing_ran():
    done = python(SCRIPT)
    assert last_line(done) == {"benchmark": "kernel_bench", "device": None, "rows": []}
    assert "no GPU here: nothing was run" in done.stdout and "TRITON_INTERPRET=1" in done.stdout


def test_a_check_that_cannot_run_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel_bench.launch, "interpreted", lambda: False)
    for options in (["--check"], ["--check", "--device", "cpu"]):
        with pytest.raises(SystemExit, match="nothing was checked"):
            kernel_bench.main(options)


@pytest.mark.slow
def test_script_on_a_cpu_measures_every_job(tmp_path):
    picture = tmp_path / "roofline.png"
    options = (
        "--peers",
        "eager,bitsandbytes",
        "--rounds",
        "1",
        "--tokens",
        "0",
        "--plot",
        str(picture),
    )
    done = python(SCRIPT, "--device", "cpu", *options)
    document = last_line(done)
    assert (
        "prove nothing about a GPU" in done.stdout
        and "NOT CHECKED" in done.stdout
        and not document["checked"]
    )
    assert [row["job"] for row in document["rows"]] == [*OPERATIONS] * len(layers("tiny"))
    for row in document["rows"]:
        ours = row["us"][OURS]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / ours / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / document["copy_gb_per_s"])
        assert row["ratio"] == pytest.approx({name: us / ours for name, us in row["us"].items()})
        assert row["operations"] == math.prod(row["shape"]) * OPERATIONS[row["job"]]
        assert {"eager", "bitsandbytes"} < set(row["us"]) and not row["missing"]
        # All contenders compute the same values. A product may differ by the rounding of W and
        # of the result, 2^-8 each in bf16.
        assert max(row["differs"].values()) <= (2**-7 if row["job"] in PRODUCTS else 0), row
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_invalid_options_are_refused(capsys):
    for options in (
        ["--models", "Llama-9"],
        ["--peers", "unsloth"],
        ["--rounds", "0"],
        ["--device=cpu", "--tune"],
    ):
        with pytest.raises(SystemExit, match="2"):
            kernel_bench.main(options)
        said = capsys.readouterr().err
        assert options[-1] in said and "expected" in said


@pytest.mark.gpu
@pytest.mark.slow
def test_script_on_a_gpu_checks_and_measures_every_job(tmp_path):
    options = [
        "--models",
        "SmolLM2-135M",
        "--rounds",
        "3",
        "--tokens",
        "8",
        "--plot",
        str(tmp_path / "roofline.png"),
    ]
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": path
    }
    command = [sys.executable, SCRIPT, *options]
    document = last_line(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True))
    assert document["checked"] == list(TILES)
    for row in document["rows"]:
        assert row["us"][OURS] > 0 and row["differs"]["eager"] <= (
            2**-7 if row["job"] in PRODUCTS else 0
        ), row
    assert document["decode"].get("path", "triton") == "triton"
