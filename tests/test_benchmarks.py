"""Proves that every benchmark against peers runs on a tiny model, does equal work on both sides, and ends in one JSON
document; and that what judges them is right.

Property: ratios are of one round, the memory of a process that takes a block is the block's. Errors: contenders that do
different work, and one that dies, stop the benchmark.
"""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

import side_by_side
from bench_train import exponent
from limit import elementwise_values
from minilora.models.config import DecoderConfig
from source import ROOT

SCRIPTS = {  # script -> (its options, a key of its document)
    "peers": (["--short"], "qlora"),
    "bench_load": (["--short"], "nf4"),
    "bench_generate": (["--short"], "bf16"),
    "bench_train": (["--short"], "grows"),
    "scale_8b": (["--peers", "--rounds", "1"], "load"),
}
CONTENDER = """
import sys; sys.path.insert(0, {folder!r})
from side_by_side import serve
kept = []
def step():
    kept.append(b"1" * {size})
    return {{"seconds": len(kept)}}
serve(step, loaded=True)
"""


@cache
def document(script: str) -> dict:
    """The last line of a script in its short form."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    env = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "Agg"}
    command = [sys.executable, f"benchmarks/{script}.py", *SCRIPTS[script][0]]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def contender(tmp_path, size: int = 0, code: str = CONTENDER) -> side_by_side.Contender:
    file = tmp_path / f"contender-{size}.py"
    file.write_text(code.format(folder=str(ROOT / "benchmarks"), size=size))
    return side_by_side.Contender(f"of {size}", [file])


# ---- the judge


def test_turns_alternate_and_ratios_are_of_one_round(tmp_path):
    order = []

    class Fake:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def step(self):
            order.append(self.name)
            return {"seconds": next(self.seconds)}

    sides = {"a": Fake("a", [9, 1, 2, 4]), "b": Fake("b", [9, 3, 4, 4])}
    found = side_by_side.take_turns(sides, rounds=3, warm_up=1)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert side_by_side.ratios(found, "seconds", "a") == {"b": {"median": 2.0, "min": 1.0, "max": 3.0}}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, which only Linux has")
def test_memory_is_what_a_process_takes(tmp_path):
    block = 64 << 20
    small, large = contender(tmp_path), contender(tmp_path, block)
    assert small.ready["loaded"] and 0 < small.ready["start_seconds"] < 60
    before = large.ready["anonymous"]
    for number in (1, 2):
        answer = large.step()
        assert answer["seconds"] == number
        assert 0 <= answer["anonymous"] - before - number * block < 2 << 20  # what else an interpreter takes
        assert answer["resident"] > answer["anonymous"]  # the interpreter's own file is mapped
    assert small.step()["anonymous"] < before + (2 << 20)
    small.close()
    large.close()


def test_different_work_and_a_dead_contender_stop_the_benchmark(tmp_path):
    side_by_side.check_close("loss", {"a": 2.0, "b": 2.01}, 0.01)
    for wrong in (2.1, float("nan")):
        with pytest.raises(SystemExit, match="do not do the same work"):
            side_by_side.check_close("loss", {"a": 2.0, "b": wrong}, 0.01)
    with pytest.raises(SystemExit, match="of 7 ended with status 3"):
        contender(tmp_path, 7, "raise SystemExit(3)  # {folder} {size}")
    assert "not installed: no_such_package" in side_by_side.missing_peers("torch", "no_such_package")
    assert not side_by_side.missing_peers("torch")


def test_an_exponent_is_fitted_and_traffic_is_counted_by_hand():
    points = [{"x": x, "y": 3 * x**1.5} for x in (1, 2, 4, 8)]
    assert exponent(points, "x", "y") == pytest.approx(1.5)
    config = DecoderConfig(10, 576, 1536, 30, 9, 3)
    assert elementwise_values(config) == 10 * 576 + 4 * (576 + 192) + 8 * 1536 + 12 * 576


# ---- the scripts


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_in_one_document(script):
    found = document(script)
    assert found["benchmark"] == script and SCRIPTS[script][1] in found


@pytest.mark.slow
def test_what_peers_publishes():
    found = document("peers")
    for job, sides in {"qlora": 4, "qlora-checkpointing": 2, "lora": 3, "full": 3}.items():
        assert len(found[job]) == sides
        assert all(row["ratio"]["min"] <= row["ratio"]["max"] for side, row in found[job].items() if side != "minilora")
    assert {"linears", "lora", "head", "cross-entropy", "attention", "elementwise"} <= found["qlora"]["limit"][
        "parts"
    ].keys()
    assert {"load", "start"} == found["load"]["nf4"].keys()
