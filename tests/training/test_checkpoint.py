"""Proves that a resumed run equals an uninterrupted one bit for bit, also after a crash.

A crash leaves only complete checkpoints. Oracles: the uninterrupted run (with dropout), and
processes that are really interrupted and really killed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.toy import Letters, adapters, llama, lora, relative, rows
from minilora.lora.files.save_load import load_adapter
from minilora.training import checkpoint, run_folder, validation
from minilora.training.config import TrainConfig
from minilora.training.loop import train

SAME_SIZE = [*rows(23)[:-1], {"prompt": rows(23)[-1]["prompt"], "completion": ""}]
SAME_SIZE[-1]["completion"] = "x" * len(rows(23)[-1]["completion"])  # as many tokens as before
CONFIG = {
    "learning_rate": 1e-2,
    "max_steps": 7,
    "per_device_train_batch_size": 5,
    "lr_scheduler_type": "cosine",
}


def run(folder=None, model=None, *, stop=None, data=None, **fields):
    """Train a fresh model with dropout; `stop` presses Ctrl-C in a forward pass of that step."""
    model = lora(dropout=0.3) if model is None else model
    config = TrainConfig(output_dir=folder, **(CONFIG | fields))
    if stop is not None:
        forwards = []

        def press(module, inputs):
            forwards.append(module.training)
            if sum(forwards) == (stop - 1) * config.gradient_accumulation_steps + 1:
                raise KeyboardInterrupt

        model.model.norm.register_forward_pre_hook(press)
    result = train(model, Letters(), data or rows(23), config, eval_dataset=rows(4, seed=1))
    return model, result


def same(a, b) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run 7 steps, 5 in an epoch, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder, save_steps=1, eval_steps=2, gradient_accumulation_steps=1)


# ---- resuming


@pytest.mark.parametrize("step", [1, 4, 5, 6])  # 5 ends an epoch
def test_resumed_equals_uninterrupted_bit_for_bit(whole, step):
    folder, model, result = whole
    resumed, again = run(
        None, resume_from_checkpoint=str(folder / f"checkpoint-{step}"), eval_steps=2
    )
    assert same(resumed, model)
    assert again.losses == result.losses and again.eval_losses == result.eval_losses
    assert (again.steps, again.tokens, again.loss) == (result.steps, result.tokens, result.loss)


def test_a_resumed_run_without_dropout_differs(whole):
    folder, model, result = whole
    other, _ = run(
        None,
        resume_from_checkpoint=str(folder / "checkpoint-4"),
        model=lora(dropout=0.0),
        eval_steps=2,
    )
    assert not same(other, model)


def test_interrupted_with_accumulation_then_resumed(tmp_path):
    split = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "eval_steps": 2,
        "save_steps": None,
    }
    model, result = run(tmp_path / "a", **split)
    _, stopped = run(tmp_path / "b", stop=4, **split)
    assert (
        stopped.interrupted
        and stopped.steps == 3
        and stopped.checkpoint == tmp_path / "b" / "checkpoint-3"
    )
    resumed, again = run(tmp_path / "b", resume_from_checkpoint="last", **split)
    assert (
        same(resumed, model)
        and again.losses == result.losses
        and again.eval_losses == result.eval_losses
    )
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in "ab"]
    lines = [[json.loads(line) for line in log] for log in logs]
    timeless = [
        [{k: v for k, v in x.items() if "second" not in k and k != "config"} for x in log]
        for log in lines
    ]
    assert timeless[0] == timeless[1]  # every step is logged once


def test_resumed_from_an_older_checkpoint_replaces_what_came_after_it(tmp_path):
    model, result = run(tmp_path, save_steps=1, logging_steps=1)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')  # a line that a crash cut short
    resumed, _ = run(
        tmp_path,
        save_steps=1,
        logging_steps=1,
        resume_from_checkpoint=str(tmp_path / "checkpoint-3"),
    )
    assert same(resumed, model) and run_folder.checkpoint_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == result.losses
    assert sum("seconds" in line for line in lines) == 1


def test_interrupted_in_an_evaluation_repeats_it(tmp_path, monkeypatch):
    _, result = run(tmp_path / "a", eval_steps=3)
    real, calls = validation.means, []

    def press(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(validation, "means", press)
    _, stopped = run(tmp_path / "b", eval_steps=3)
    assert stopped.interrupted and stopped.steps == 3 and stopped.eval_losses == []
    _, again = run(tmp_path / "b", resume_from_checkpoint="last", eval_steps=3)
    assert again.eval_losses == result.eval_losses and [step for step, _ in again.eval_losses] == [
        3,
        6,
        7,
    ]


def test_more_steps_continue_a_finished_run(tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    longer, _ = run(None, max_steps=9, **constant)
    first, _ = run(None, **constant)
    assert not same(longer, first)
    run(tmp_path, **constant)
    resumed, again = run(tmp_path, resume_from_checkpoint="last", max_steps=9, **constant)
    assert same(resumed, longer) and again.steps == 9


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    half = lora(llama().half(), dropout=0.3)
    model, result = run(tmp_path / "a", model=half)
    run(tmp_path / "b", model=lora(llama().half(), dropout=0.3), stop=4)
    state = json.loads((tmp_path / "b" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**16
    resumed, again = run(
        tmp_path / "b", model=lora(llama().half(), dropout=0.3), resume_from_checkpoint="last"
    )
    assert same(resumed, model) and again.losses == result.losses


# ---- contents of a checkpoint


def test_a_checkpoint_is_an_adapter_that_loads(whole):
    folder, model, _ = whole
    fresh = llama()
    load_adapter(fresh, folder / "checkpoint-7")
    ids = torch.randint(3, 131, (2, 9))
    assert torch.equal(fresh(ids), model(ids))
    names = sorted(path.name for path in (folder / "checkpoint-7").iterdir())
    state = ["trainer_state.json", "trainer_state.safetensors"]
    assert names == ["adapter_config.json", "adapter_model.safetensors", *state]


def test_save_total_limit_keeps_the_newest(tmp_path):
    run(tmp_path, save_steps=2, save_total_limit=2)
    assert run_folder.checkpoint_steps(tmp_path) == [6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-6",
        "checkpoint-7",
        "log.jsonl",
        "run.json",
    ]


def test_save_steps_and_the_end(whole, tmp_path):
    folder, _, result = whole
    assert run_folder.checkpoint_steps(folder) == [1, 2, 3, 4, 5, 6, 7]
    assert result.checkpoint == folder / "checkpoint-7"
    _, result = run(tmp_path)
    assert run_folder.checkpoint_steps(tmp_path) == [7]


# ---- crashes


@pytest.mark.parametrize("stage", ["save_adapter", "write_tensors", "write_text"])
def test_a_failure_while_saving_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, stage):
    real, calls = getattr(checkpoint, stage), []

    def fail(*arguments, **keywords):
        calls.append(1)
        if len(calls) >= 3:
            raise OSError(28, "No space left on device")
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, stage, fail)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, save_steps=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "log.jsonl",
        "run.json",
    ]
    monkeypatch.setattr(checkpoint, stage, real)
    resumed, _ = run(tmp_path, resume_from_checkpoint="last")
    assert same(resumed, run()[0])


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = {path!r}
from helpers.toy import Letters, lora, rows
from minilora.training.config import TrainConfig
from minilora.training.loop import train
config = TrainConfig(
    output_dir={folder!r}, learning_rate=1e-3, max_steps=100000, save_steps={save},
    logging_steps=1, lr_scheduler_type="cosine",
)
result = train(lora(dropout=0.3), Letters(), rows(23), config)
print("returned", result.steps, result.interrupted, result.checkpoint)
"""


def start(folder: Path, save: int | None) -> subprocess.Popen:
    """Start a training process and wait until it has made some steps.

    If it saves checkpoints, wait for the first one too.
    """
    script = SCRIPT.format(path=sys.path, folder=str(folder), save=save)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    log = folder / "log.jsonl"
    while not (
        log.exists()
        and log.read_text().count("\n") > 6
        and (not save or run_folder.checkpoint_steps(folder))
    ):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the process made no steps: {process.communicate()}")
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_ctrl_c_ends_a_process_cleanly(tmp_path):
    process = start(tmp_path, None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    (step,) = run_folder.checkpoint_steps(tmp_path)
    assert out.splitlines()[-1] == f"returned {step} True {tmp_path / f'checkpoint-{step}'}"
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["interrupted"] is True
    resumed, result = run(
        tmp_path,
        resume_from_checkpoint="last",
        learning_rate=1e-3,
        max_steps=step + 2,
        per_device_train_batch_size=8,
    )
    assert result.steps == step + 2


def test_a_killed_process_leaves_whole_checkpoints(tmp_path):
    process = start(tmp_path, 1)  # saves after each step, so that the kill happens during a save
    process.kill()
    process.communicate(timeout=60)
    for step in run_folder.checkpoint_steps(tmp_path):
        load_adapter(llama(), tmp_path / f"checkpoint-{step}")
        assert (
            json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["step"]
            == step
        )
    last = run_folder.checkpoint_steps(tmp_path)[-1]
    (tmp_path / ".checkpoint-99.tmp").mkdir()  # left by a kill during a save
    _, result = run(
        tmp_path,
        resume_from_checkpoint="last",
        learning_rate=1e-3,
        max_steps=last + 2,
        per_device_train_batch_size=8,
    )
    assert result.steps == last + 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("file", ["trainer_state.safetensors", "trainer_state.json"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:], lambda b: b[:-100]]
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_message(
    whole, tmp_path, capsys, damage, file
):
    for step in (3, 4):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-4" / file
    newest.write_bytes(damage(newest.read_bytes()))
    resumed, result = run(tmp_path, resume_from_checkpoint="last", eval_steps=2)
    assert re.search(r"checkpoint-4/\S+ is damaged", capsys.readouterr().out)
    assert same(resumed, whole[1]) and result.losses == whole[2].losses


# ---- errors


def test_a_new_run_does_not_mix_with_an_old_one(whole):
    with pytest.raises(
        ValueError, match='up to step 7. Continue it with resume_from_checkpoint="last"'
    ):
        run(whole[0])


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run(tmp_path, resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="is not a checkpoint: expected trainer_state.json"):
        run(None, resume_from_checkpoint=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1}, "seed was 42, is 1: step 4 would be another place in the data"),
        ({"per_device_train_batch_size": 4}, "samples_per_step was 5, is 4"),
        ({"group_by_length": False}, "group_by_length was True, is False"),
        ({"data": rows(22)}, "samples was 23, is 22"),
        ({"data": rows(23, seed=5)}, "tokens was"),
        (
            {"data": rows(23)[::-1]},
            "the rows or their order changed: step 4 would be another place",
        ),
        ({"data": SAME_SIZE}, "the rows or their order changed"),
    ],
)
def test_resuming_at_another_place_in_the_data_raises(whole, fields, message):
    with pytest.raises(ValueError, match=message):
        run(None, resume_from_checkpoint=str(whole[0] / "checkpoint-4"), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, is 0.02: the steps that are left"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was cosine, is linear"),
        ({"warmup_steps": 2}, "warmup_steps was 0, is 2"),
        ({"weight_decay": 0.1, "adam_beta1": 0.8}, r"weight_decay was 0.0, is 0.1, adam_beta1"),
        ({"max_grad_norm": 0}, "max_grad_norm was 1.0, is 0.0"),
        ({"optim": "adamw_8bit"}, "optim was adamw_torch, is adamw_8bit"),
    ],
)
def test_resuming_with_another_optimisation_raises(whole, fields, message):
    model = lora(dropout=0.3)
    before = adapters(model)
    with pytest.raises(ValueError, match=message):
        run(None, model, resume_from_checkpoint=str(whole[0] / "checkpoint-4"), **fields)
    assert relative(adapters(model), before) == 0


def test_resuming_a_decaying_run_with_another_length_warns(whole):
    where = str(whole[0] / "checkpoint-4")
    message = "had 7 steps in all and has 6 now.*step 2, for example, had the rate 0.0095"
    with pytest.warns(UserWarning, match=message):
        _, result = run(None, resume_from_checkpoint=where, max_steps=6)
    assert result.steps == 6


def test_a_checkpoint_without_the_newer_values_resumes(whole, tmp_path, recwarn):
    """Checkpoints of earlier versions do not store the rates, the rows and the length."""
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole[0] / "checkpoint-4", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    for name in ("rows", "total_steps", "learning_rate", "lr_scheduler_type"):
        del state["data"][name]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    resumed, _ = run(None, resume_from_checkpoint=str(folder), eval_steps=2)
    assert same(resumed, whole[1]) and not [w for w in recwarn if "resume" in str(w.message)]


def test_resuming_with_another_adapter_raises(whole):
    where = str(whole[0] / "checkpoint-4")
    with pytest.raises(
        ValueError, match=r"o_proj.* is \(4, 32\) there, None here \(\d+ differ\)|differ"
    ):
        run(None, model=lora(targets=["q_proj"]), resume_from_checkpoint=where)


def test_resuming_from_a_truncated_checkpoint_raises(whole, tmp_path):
    broken = tmp_path / "checkpoint-4"
    shutil.copytree(whole[0] / "checkpoint-4", broken)
    file = broken / "trainer_state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="trainer_state.safetensors is damaged"):
        run(None, resume_from_checkpoint=str(broken))
    os.remove(file)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(None, resume_from_checkpoint=str(broken))
