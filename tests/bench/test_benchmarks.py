"""Tests of the benchmark scripts, of their shared timing code, and of the pictures in docs/.

Every script runs in its short form, with and without the peer libraries installed. It does equal
work on both sides, uses and prints the dtype that is fast on this hardware, and ends in one JSON
document. A picture in docs/ contains the figures from which it is drawn.

Property: a ratio compares times of one round; the measured memory of a process that allocates a
block grows by the block's size; a fit finds the terms of a polynomial. Errors: contenders that do
different work, a contender that dies, and growth beyond the algorithm's order are reported.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from benchmarks._lib import side_by_side
from benchmarks.docs import pictures
from benchmarks.training.bench_train import GROWS, fit, grow, sizes_of, too_fast
from benchmarks.training.limit import elementwise_values
from helpers.source import ROOT
from minilora.models.config import DecoderConfig

# script -> (its options, a key of its document). Other files test plan_check, kernel_bench and
# kernel_report.
SCRIPTS = {
    "peers": (["--short"], "qlora"),
    "bench_load": (["--short"], "nf4"),
    "bench_generate": (["--short"], "dense"),
    "bench_train": (["--short"], "grows"),
    "scale_8b": (["--peers", "--rounds", "1"], "load"),
    "bench_nf4": (["--short"], "rows"),
    "choices": (["--short", "--rounds", "1"], "token"),
    "methods": (["--short"], "methods"),
    "fusing": (["--tokens", "64"], "branch"),
    "packing": (["--tokens", "256", "--rounds", "1"], "ratios"),
    "qlora_parity": (["--steps", "2", "--seeds", "1", "--test_rows", "4"], "agree"),
    "many_adapters": (["--short"], "by_row"),
    "bench_evaluate": (["--short"], "rounds"),
    "bench_serve": (["--short"], "sides"),
    "variants": (["--short"], "variants"),
    "studies": (["--short"], "studies"),
    "merging": (["--short"], "forms"),
    "base_bits": (["--short"], "small.gguf"),
}
# Scripts that compare with peer libraries and must also run without them.
ALONE = (
    "peers",
    "bench_load",
    "bench_generate",
    "bench_nf4",
    "scale_8b",
    "qlora_parity",
    "bench_serve",
)
ANY_DTYPE = {*SCRIPTS} - {"fusing", "packing"}  # these two have a fixed dtype, which they print
NO_PEERS = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = ("transformers", "peft", "bitsandbytes", "accelerate")
def find_others(name, *rest):
    return None if name.partition(".")[0] in absent else find(name, *rest)
PathFinder.find_spec = staticmethod(find_others)
"""
CONTENDER = """
import sys; sys.path.insert(0, {folder!r})
from benchmarks._lib.side_by_side import serve
kept = []
def step():
    kept.append(b"1" * {size})
    return {{"seconds": len(kept)}}
serve(step, loaded=True)
"""


def run(script: str, *options: str, first: str = "") -> str:
    """Run a script and return its stdout. PYTHONPATH begins with the folder `first`, if given."""
    path = os.pathsep.join(
        [*filter(None, [first]), *(str(ROOT / folder) for folder in (".", "kernels"))]
    )
    command = [sys.executable, str(next(ROOT.glob(f"benchmarks/*/{script}.py"))), *options]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def printed(script: str) -> list[str]:
    """Return the lines that a script prints in its short form. The last line is its document."""
    return run(script, *SCRIPTS[script][0]).splitlines()


def check_dtype(lines: list[str]) -> None:
    """Assert that the first line and the document state the same dtype and the class of CPU.

    The dtype is the one that `load_model` chooses on this machine.
    """
    found, expected = json.loads(lines[-1]), side_by_side.compute_dtype("auto")
    assert (
        found["dtype"] == side_by_side.dtype_name(expected)
        and found["cpu"] == side_by_side.cpu_class()
    )
    assert lines[0].startswith(f"dtype {found['dtype']}, cpu {found['cpu']}, ")


def contender(tmp_path, size: int = 0, code: str = CONTENDER) -> side_by_side.Contender:
    file = tmp_path / f"contender-{size}.py"
    file.write_text(code.format(folder=str(ROOT), size=size))
    return side_by_side.Contender(f"of {size}", [file])


# ---- the code that times and compares: side_by_side.py and bench_train.py


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
    assert side_by_side.ratios(found, "seconds", "a") == {
        "b": {"median": 2.0, "min": 1.0, "max": 3.0}
    }


@pytest.mark.skipif(
    sys.platform != "linux", reason="memory is read from /proc, which only Linux has"
)
def test_a_contender_reports_its_own_memory(tmp_path):
    block = 64 << 20
    small, large = contender(tmp_path), contender(tmp_path, block)
    assert small.ready["loaded"] and 0 < small.ready["start_seconds"] < 60
    before = large.ready["anonymous"]
    for number in (1, 2):
        answer = large.step()
        assert answer["seconds"] == number
        # Python itself may allocate up to 2 MiB more.
        assert 0 <= answer["anonymous"] - before - number * block < 2 << 20
        # The mapped file of the Python executable is resident but not anonymous.
        assert answer["resident"] > answer["anonymous"]
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
    assert "not installed: no_such_package" in side_by_side.missing_peers(
        "torch", "no_such_package"
    )
    assert not side_by_side.missing_peers("torch")


def grown(seconds, megabytes, noise: float = 0) -> dict:
    """Return bench_train's result for costs that are these functions of the sequence length."""
    laws, points = {"seconds": seconds, "megabytes": megabytes}, []
    for x in GROWS["length"][0]:
        ys = {unit: law(x) for unit, law in laws.items()}
        figures = {
            unit: {"median": y, "min": y * (1 - noise), "max": y * (1 + noise)}
            for unit, y in ys.items()
        }
        points.append({"length": x, **figures})
    return grow("length", points)


def test_fit_finds_the_terms_of_a_polynomial():
    xs = [128, 256, 512, 1024, 2048]
    assert fit(xs, [0.2 + 0.001 * x + 1e-6 * x * x for x in xs], 2) == pytest.approx(
        [0.2, 2.048, 4.194304]
    )
    assert fit(xs, [3.0 - 0.001 * x for x in xs], 2)[1:] == [0, 0]  # no negative term
    assert len(fit(xs[:2], [1.0, 2.0], 2)) == 3  # fewer points than terms


def test_growth_beyond_the_order_is_reported_despite_a_large_fixed_cost():
    squares, line = (lambda x: 0.3 + 1e-3 * x + 1e-7 * x * x), (lambda x: 100 + 0.5 * x)
    assert not too_fast("length", grown(squares, line, noise=0.02))
    (told,) = too_fast("length", grown(squares, lambda x: line(x) + 2e-4 * x * x))
    assert re.match(r"megabytes grow as length\^1\.[2-9]\d at least .* own order is 1\.$", told)
    (told,) = too_fast("length", grown(lambda x: 1 + 1e-9 * x**3, line))
    assert told.startswith("seconds grow as length^2.")
    # With 60 % noise the same growth is within the spread of the measurements.
    assert not too_fast("length", grown(lambda x: 1 + 1e-9 * x**3, line, noise=0.6))


def test_short_form_measures_two_points_that_differ_in_one_size():
    (first, _), *_ = (sizes_of(kind, short=True) for kind in GROWS)
    for kind in GROWS:
        small, large = sizes_of(kind, short=True)
        assert small == first and {name for name in small if small[name] != large[name]} == {kind}
        assert [size[kind] for size in sizes_of(kind, short=False)] == GROWS[kind][0]


def test_elementwise_values_equal_a_count_by_hand():
    config = DecoderConfig(10, 576, 1536, 30, 9, 3)
    assert elementwise_values(config) == 10 * 576 + 4 * (576 + 192) + 8 * 1536 + 12 * 576


# ---- the scripts


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_in_one_document(script):
    found = json.loads(printed(script)[-1])
    assert found["benchmark"] == script and SCRIPTS[script][1] in found
    if script in ANY_DTYPE:
        check_dtype(printed(script))


@pytest.mark.slow
@pytest.mark.parametrize("script", ALONE)
def test_a_script_without_peers_names_them_and_succeeds(script: str, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_PEERS)
    options = [option for option in SCRIPTS[script][0] if option != "--peers"]
    *lines, last = run(script, *options, first=str(tmp_path)).splitlines()
    assert json.loads(last)["benchmark"] == script
    assert script == "scale_8b" or any("not installed" in line for line in lines)
    assert "transformers" not in json.loads(last).get("qlora", json.loads(last).get("nf4", {}))
    check_dtype([*lines, last])


@pytest.mark.slow
def test_peers_document_has_every_job_and_side():
    found = json.loads(printed("peers")[-1])
    full = 3 if found["dtype"] == "bfloat16" else 2  # the third side has bf16 weights
    for job, sides in {"qlora": 4, "qlora-checkpointing": 2, "lora": 3, "full": full}.items():
        assert len(found[job]) == sides
        assert all(
            row["ratio"]["min"] <= row["ratio"]["max"]
            for side, row in found[job].items()
            if side != "minilora"
        )
    assert {"linears", "lora", "head", "cross-entropy", "attention", "elementwise"} <= found[
        "qlora"
    ]["limit"]["parts"].keys()
    assert {"load", "start"} == found["load"]["nf4"].keys()


# ---- pictures


def test_documents_of_one_measurement_join_and_the_svg_stores_them(tmp_path):
    pieces = []
    for kind in ("length", "batch"):
        points = [
            {"length": 128, "batch": 1, "r": 8, "width": 64} | {kind: x} for x in GROWS[kind][0]
        ]
        figures = {"median": 2.0, "min": 1.0, "max": 3.0}
        points = [point | {"seconds": figures, "megabytes": figures} for point in points]
        piece = {
            "benchmark": "bench_train",
            "torch": "2",
            "load_average": len(pieces),
            "grows": {kind: grow(kind, points)},
        }
        pieces.append(piece)
        (tmp_path / f"{kind}.out").write_text(f"a table\n{json.dumps(piece)}\n")
    found = pictures.join(
        [pictures.document(str(tmp_path / f"{kind}.out")) for kind in ("length", "batch")]
    )
    assert list(found["grows"]) == ["length", "batch"]
    for name in ("cost.svg", "again.svg"):
        pictures.save(found, tmp_path / name)
    assert pictures.document(str(tmp_path / "cost.svg")) == found
    assert (tmp_path / "cost.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    with pytest.raises(SystemExit, match="not of one measurement: {'torch'"):
        pictures.join([pieces[0], pieces[1] | {"torch": "3"}])


@pytest.mark.parametrize(("name", "benchmark"), [("cost", "bench_train"), ("speed", "peers")])
def test_pictures_in_docs_contain_their_figures_and_are_small(name: str, benchmark: str):
    file = ROOT / "docs" / f"{name}.svg"
    assert pictures.document(str(file))["benchmark"] == benchmark
    assert file.stat().st_size < 100_000


def test_the_growth_shown_in_the_docs_is_no_faster_than_the_algorithm():
    grows = pictures.document(str(ROOT / "docs" / "cost.svg"))["grows"]
    assert grows.keys() == GROWS.keys()
    assert not [told for kind, one in grows.items() for told in too_fast(kind, one)]
