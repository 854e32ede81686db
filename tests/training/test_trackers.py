"""Proves that trackers receive the figures of log.jsonl, also after a resume.

Pictures of runs are drawn from the same file. Oracle: the trackers' own readers (TensorBoard's
event files, W&B's offline file, trackio's database).
"""

import json
import struct
import sys

import matplotlib.image
import pytest

from helpers.toy import FAST, Letters, lora, rows
from minilora.tools.plot.logs import read_log, runs
from minilora.training.config import TrainConfig
from minilora.training.logs.trackers import trackers
from minilora.training.loop import train

FIELDS = FAST | {"max_steps": 6, "logging_steps": 2, "eval_steps": 3, "save_steps": 1}


def run(folder, **fields):
    config = TrainConfig(output_dir=folder, **(FIELDS | fields))
    return train(lora(), Letters(), rows(), config, eval_dataset=rows(4, seed=1))


def logged(folder):
    """Return {(step, name): value} for every figure in log.jsonl."""
    lines = [line for line in read_log(folder) if "step" in line]
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name != "step"
    }


def leveldb_records(content):
    """Yield the records of W&B's offline file, in LevelDB's log format.

    The file has blocks of 32 KiB after a header of 7 bytes.
    """
    place, whole = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


# ---- oracle


def test_tensorboard_has_the_log_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, report_to="tensorboard")
    run(tmp_path, report_to="tensorboard", resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {
        (event.step, tag): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    expected = logged(tmp_path)
    assert found.keys() == expected.keys()
    for key in (key for key in expected if key[1] not in ("tokens_per_second", "peak_memory")):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)  # TensorBoard stores fp32


def test_wandb_offline_has_the_log(tmp_path, monkeypatch):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, report_to="wandb")
    wandb.teardown()  # its service has written everything when it ends
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for data in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        found |= {
            (items["_step"], name): value
            for name, value in items.items()
            if not name.startswith("_")
        }
    assert found == {key: pytest.approx(value) for key, value in logged(tmp_path).items()}
    assert file.stem == f"run-{(tmp_path / 'wandb_run_id').read_text()}"


def test_trackio_has_the_log(tmp_path, monkeypatch):
    import sqlite3

    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run(tmp_path / "run", report_to="trackio")
    (file,) = (tmp_path / "trackio").glob("minilora*.db")
    with sqlite3.connect(file) as database:
        lines = database.execute("select step, metrics from metrics").fetchall()
    found = {
        (step, name): value for step, text in lines for name, value in json.loads(text).items()
    }
    assert found == {key: pytest.approx(value) for key, value in logged(tmp_path / "run").items()}


# ---- pictures


def test_runs_are_drawn(tmp_path):
    results = [run(tmp_path / name) for name in ("a", "b")]
    figure = runs([tmp_path / "a", tmp_path / "b"], tmp_path / "runs.png")
    titles = {axes.get_title(): axes for axes in figure.axes}
    assert titles.keys() == {
        "loss (markers: evaluation)",
        "learning rate",
        "grad norm",
        "tokens per second",
    }
    loss, dots = titles["loss (markers: evaluation)"].lines[:2]
    expected = logged(tmp_path / "a")
    assert [*zip(*loss.get_data(), strict=True)] == [
        (s, v) for (s, name), v in expected.items() if name == "loss"
    ]
    assert [*zip(*dots.get_data(), strict=True)] == results[0].eval_losses
    # the lines differ in grey
    assert len({line.get_linestyle() for line in titles["learning rate"].lines}) == 2
    pixels = matplotlib.image.imread(tmp_path / "runs.png")
    assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.01
    assert results[0].plot(tmp_path / "one.svg") and (tmp_path / "one.svg").read_text().startswith(
        "<?xml"
    )


# ---- error


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="report_to: 'tensorbord' matches nothing. Nearest: 'tensorboard'"
    ):
        TrainConfig(report_to="wandb, tensorbord")
    assert trackers(TrainConfig(report_to="none"), 0) == []
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"'wandb' needs wandb, .* pip install -e '\.\[track\]'"):
        trackers(TrainConfig(report_to="wandb"), 0)
    with pytest.raises(ValueError, match="no such log exists"):
        runs([tmp_path])
    (tmp_path / "log.jsonl").write_text('{"config": {}}\n')
    with pytest.raises(ValueError, match="holds no step yet"):
        runs([tmp_path])
    (tmp_path / "log.jsonl").write_text('{"step": 1')
    with pytest.raises(ValueError, match="expected one JSON object a line"):
        runs([tmp_path])
