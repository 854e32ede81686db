"""Proves that a run in two processes equals a run in one: losses, adapters, evaluations, files.

It also tests how a run ends. Two ranks on the CPU (gloo) run ranks.py once, and the tests compare
their results with one process. The runs are LoRA, QLoRA, DPO, training of every parameter, and
trainable biases and norms, by DDP and FSDP2. The fast tests take a few of these runs, the slow
tests all.

fp32 sums in another order differ by some 2^-24 a sum; after six steps of Adam the losses agree to
1e-6. Adapters have ten times that tolerance: Adam divides a gradient by its own size, so the
rounding of small gradients weighs as much. Biases of keys are the extreme: one of them moves all
scores of a query by nearly the same amount, which softmax removes, so that little but rounding is
left of its gradient. Where biases train, Adam's epsilon is therefore larger than that rounding.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.chats import ours
from helpers.ranks import ENGINES, RUNS, config, model, outcome, run
from helpers.source import ROOT
from helpers.tiny import save
from helpers.toy import Letters, relative, rows
from minilora.cli.main import main
from minilora.common import read_tensors
from minilora.losses.sft import SFT
from minilora.training.distributed import Parallel, traffic
from minilora.training.loop import train


def cases(names: dict[str, Sequence[str]]) -> list:
    """Return (set of runs, name) for parametrize; those of all runs are slow."""
    fast = [pytest.param("few", name, id=f"few-{name}") for name in names["few"]]
    return fast + [
        pytest.param("all", name, id=f"all-{name}", marks=pytest.mark.slow) for name in names["all"]
    ]


few_and_all = pytest.mark.parametrize(
    "ran", ["few", pytest.param("all", marks=pytest.mark.slow)], indirect=True
)
each_run = pytest.mark.parametrize("ran, name", cases(RUNS), indirect=["ran"], scope="module")
CHECKPOINTS = {"few": ["fsdp"], "all": ENGINES}  # the engines of the runs with checkpoints
each_engine = pytest.mark.parametrize(
    "ran, engine", cases(CHECKPOINTS), indirect=["ran"], scope="module"
)


@dataclass
class Ran:
    """Results of the same runs in one process and in two."""

    chosen: str  # few or all
    folder: Path
    one: dict[str, Any]
    two: dict[str, Any]
    job: subprocess.CompletedProcess[str]  # of two processes
    ending_s: float  # seconds from the last file of the two processes to their end


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script or module in two processes."""
    roots = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *map(str, arguments),
    ]
    env = os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory) -> Ran:
    """Return the runs of one process and of two; in one process only "nf4" has checkpoints."""
    chosen, folder = request.param, tmp_path_factory.mktemp("runs")
    fields = {"nf4": {"output_dir": folder / "one", "save_steps": 3}}
    kinds = dict.fromkeys(name.split()[0] for name in RUNS[chosen])
    one = {kind: outcome(*run(kind, 1, **fields.get(kind, {}))) for kind in kinds}
    job, found = (
        torchrun(ROOT / "tests" / "helpers" / "ranks.py", folder, chosen),
        folder / "found.pt",
    )
    assert found.exists() and (chosen == "few" or job.returncode == 0), job.stderr
    ending = time.time() - found.stat().st_mtime
    return Ran(chosen, folder, one, torch.load(found, weights_only=False), job, ending)


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert relative(found["adapters"], expected["adapters"]) < 1e-5
    for name, values in expected["metrics"].items():  # differences of sums of about ten nats
        assert found["metrics"][name] == pytest.approx(values, rel=1e-6, abs=1e-5)
    assert len(found["evals"]) == len(expected["evals"]) > 0
    for figures, others in zip(found["evals"], expected["evals"], strict=True):
        assert figures == pytest.approx(others, rel=1e-6, abs=1e-6)


@each_run
def test_two_ranks_train_as_one_process_does(ran, name):
    agree(ran.two[name], ran.one[name.split()[0]])


@each_engine
def test_a_run_of_one_process_is_resumed_by_two(ran, engine):
    agree(ran.two[f"nf4 {engine} resumed"], ran.one["nf4"])


@each_engine
def test_a_run_of_two_is_resumed_by_one_process(ran, engine):
    checkpoint = ran.folder / f"nf4-{engine}" / "checkpoint-3"
    agree(outcome(*run("nf4", 1, resume_from_checkpoint=str(checkpoint))), ran.one["nf4"])


@each_engine
def test_one_rank_writes_and_the_files_are_those_of_one_process(ran, engine):
    ours, theirs = ran.folder / f"nf4-{engine}", ran.folder / "one"
    names = [
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        for folder in (ours, theirs)
    ]
    assert names[0] == names[1] and not [name for name in names[0] if name.endswith(".tmp")]
    saved = ["checkpoint-3", "checkpoint-6"] * len(CHECKPOINTS[ran.chosen])
    assert [fact["saved"] for fact in ran.two["facts"]] == [saved, []]
    for name in ("adapter_model.safetensors", "trainer_state.safetensors"):
        assert (
            relative(*(read_tensors(folder / "checkpoint-6" / name) for folder in (ours, theirs)))
            < 1e-4
        )
    configs = [
        (folder / "checkpoint-6" / "adapter_config.json").read_text() for folder in (ours, theirs)
    ]
    assert configs[0] == configs[1]
    steps = [json.loads(line).get("step") for line in (ours / "log.jsonl").read_text().splitlines()]
    assert steps == [None, 3, 6, None]


@few_and_all
def test_packed_weights_are_sharded_and_gathered_unchanged(ran):
    for fact in ran.two["facts"]:
        # layers, linears in each, tensors of a 4-bit weight
        assert len(fact["shards"]) == 2 * 7 * 4
        assert all(all(checks) for checks in fact["shards"].values())


@few_and_all
def test_an_error_on_one_rank_is_raised_on_all(ran):
    first, second = ran.two["facts"]
    assert (
        first["not finite"] == second["not finite"]
        and "step 1: the loss of row" in first["not finite"]
    )
    for fact in ran.two["facts"]:
        assert "different data, config. Give" in fact["other seed"]
        assert "8-bit moments" in fact["8 bits in shards"]
        assert "biases that train cannot be switched off" in fact["biases in shards"]


@few_and_all
def test_an_interrupt_of_one_rank_ends_all_after_the_same_step(ran):
    assert [fact["interrupted"] for fact in ran.two["facts"]] == [(True, 3)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("ran", ["all"], indirect=True)
def test_the_loss_scale_of_fp16_is_one_for_all_shards(ran):
    # fp16 has 11 bits
    assert ran.two["fp16"]["losses"] == pytest.approx(ran.two["fp16 ddp"]["losses"], rel=1e-3)


@few_and_all
def test_only_rank_0_prints(ran):
    starts = {"few": 4, "all": 10}[ran.chosen]  # DDP runs in ranks.py
    assert ran.job.stdout.count("parallel: 2 processes, DDP") == starts


@pytest.mark.parametrize("ran", ["few"], indirect=True)
def test_a_killed_rank_ends_the_job_and_is_reported(ran):
    done = ran.job
    assert (
        done.returncode != 0
        and "Signal 9 (SIGKILL)" in done.stderr
        and "rank      : 1" in done.stderr
    )
    assert ran.ending_s < 120  # far below any collective's timeout


def test_traffic_is_the_bytes_sent_in_a_step():
    m = model("nf4")
    trained = sum(p.nbytes for p in m.parameters() if p.requires_grad)
    stored, layers = (sum(p.nbytes for p in part.parameters()) for part in (m, m.model.layers))
    assert traffic(m, 1) == traffic(m, 1, fsdp=True) == 0
    assert traffic(m, 4) == 2 * trained * 3 // 4
    assert traffic(m, 4, fsdp=True) == (stored + layers + trained) * 3 // 4


@pytest.mark.parametrize("count", range(1, 9))
def test_ranks_get_equal_numbers_of_the_micro_batches_of_a_step(count):
    shares = []
    for rank in range(3):
        parallel = Parallel.__new__(Parallel)  # outside a process group
        parallel.rank, parallel.world_size = rank, 3
        shares.append(parallel.micro_batches(count))
    assert len({len(share) for share in shares}) == 1
    assert sorted(number for share in shares for number, weight in share if weight) == [
        *range(count)
    ]


def test_every_micro_batch_has_a_seed_of_its_own():
    seeds = []

    class Noting(SFT):
        def loss(self, model, batch):
            seeds.append(torch.initial_seed())
            return super().loss(model, batch)

    train(
        model("lora"),
        Letters(),
        rows(16),
        config(1, max_steps=2, eval_steps=None),
        objective=Noting(),
    )
    assert len(set(seeds)) == len(seeds) == 2 * 4


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    """Two processes and one write the same adapter, up to rounding.

    Only one of the two writes and prints.
    """
    chat = ours("chatml")
    save(tmp_path / "model", vocab_size=len(chat), tie_word_embeddings=True)
    chat.save_pretrained(tmp_path / "model")
    sums = [
        {"prompt": f"{a} plus {b}", "completion": str(a + b)} for a in range(3) for b in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    given = [
        str(tmp_path / "model"),
        str(tmp_path / "rows.jsonl"),
        "--dtype=float32",
        "--quantize=nf4",
        "--max_steps=4",
        f"--dataset_cache={tmp_path / 'cache'}",  # one process writes it, and all read it
    ]
    done = torchrun(
        "-m",
        "minilora",
        "train",
        *given,
        f"--adapter={tmp_path / 'two'}",
        "--fsdp=true",
        "--per_device_train_batch_size=2",
        f"--output_dir={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("done after 4 steps")
        == done.stdout.count("parallel: 2 processes, FSDP2")
        == 1
    )
    assert (
        main(["train", *given, f"--adapter={tmp_path / 'one'}", "--per_device_train_batch_size=4"])
        == 0
    )
    found, expected = (
        read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one")
    )
    assert relative(found, expected) < 1e-5
    assert torchrun("-m", "minilora", "inspect", tmp_path / "one").returncode != 0
    failed = torchrun("-m", "minilora", "train", *given, "--fsdp=true", "--optim=adamw_8bit")
    assert failed.returncode != 0 and "minilora: fsdp: blocks of 8-bit" in failed.stderr
