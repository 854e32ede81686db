"""Tests of the dataset cache and of streaming, which store the tokens of a dataset in files.

The stored examples equal those in memory, a cache is never out of date and never incomplete, and
memory does not grow with the file. Oracles: encoding in memory; processes that are killed or write
the same cache at the same time; resident memory.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.chats import CHATML, chat, ours, theirs
from helpers.source import ROOT
from helpers.tiny import python
from helpers.toy import FAST, Letters, lora
from minilora.data import Tokenizer, dataset, encode_dataset
from minilora.data import dataset_cache as stored
from minilora.data.dataset_cache import StoredExamples, cache_key
from minilora.losses.sft import SFT, mean_loss, padded
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.training.config import TrainConfig
from minilora.training.loop import train

ROWS = [
    *({"messages": chat("a" * n, "b" * (7 - n))} for n in range(8)),
    {"messages": chat("a", "b", "c"), "id": 3},
    {"messages": chat("a" * 60, "b")},  # cut at 48 tokens, no trained token is left
    {"messages": chat("a", "b" * 60)},
]
LENGTH = 48


def write(path, rows=ROWS):
    """Write the rows to a file of the kind that the suffix of `path` names; return `path`."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


# ---- oracle: in memory


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize("how", ["cache", "stream"])
def test_stored_examples_equal_the_dataset_in_memory(tmp_path, monkeypatch, kind, how):
    rows = (
        ROWS
        if kind != "csv"
        else [{"prompt": "p" * n, "completion": "c" * (5 - n)} for n in range(5)]
    )
    path, tokenizer = write(tmp_path / f"rows.{kind}", rows), ours("chatml")
    expected = encode_dataset(path, tokenizer, LENGTH)
    if how == "stream":
        monkeypatch.setattr(dataset, "STREAM", 10)
    found = encode_dataset(
        path, tokenizer, LENGTH, cache=tmp_path / "cache" if how == "cache" else None
    )
    assert isinstance(found.examples, StoredExamples) and not isinstance(
        expected.examples, StoredExamples
    )
    assert (
        list(found) == list(expected) == found[:]
        and found[-1] == expected[-1]
        and found[1:3] == expected[1:3]
    )
    assert found.report == expected.report and str(found.report) == str(expected.report)
    assert found.lengths == expected.lengths == [len(example) for example in found]
    with pytest.raises(IndexError):
        found[len(found)]


def test_the_hash_of_examples_knows_their_order_and_not_where_they_are(tmp_path):
    path, tokenizer = write(tmp_path / "rows.jsonl"), ours("chatml")
    in_memory = encode_dataset(path, tokenizer, LENGTH)
    stored = encode_dataset(path, tokenizer, LENGTH, cache=tmp_path / "cache")
    expected = dataset.content_hash(in_memory)
    assert dataset.content_hash(stored) == dataset.content_hash(list(in_memory)) == expected
    assert dataset.content_hash(list(in_memory)[::-1]) != expected
    first = in_memory[0]
    other = replace(first, labels=[-100, *first.input_ids[1:]])  # the same tokens, all supervised
    assert dataset.content_hash([other, *in_memory[1:]]) != expected


def small(tokenizer):
    """Return an untrained decoder for this tokenizer, with an adapter."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return lora(CausalLM(DecoderConfig(len(tokenizer), tie_word_embeddings=True, **sizes)))


def test_training_from_a_cache_gives_the_losses_of_training_from_memory(tmp_path):
    path, tokenizer, found = write(tmp_path / "rows.jsonl"), ours("chatml"), []
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:4])
    fields = {"max_length": LENGTH, "packing": True, "per_device_train_batch_size": 2, **FAST}
    # in memory; with a cache that is written; with the cache that exists
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        torch.manual_seed(0)
        config = TrainConfig(dataset_cache=cache, **fields)
        found.append(train(small(tokenizer), tokenizer, path, config, eval_dataset=held_out))
    for result in found[1:]:
        assert result.losses == found[0].losses and result.eval_losses == found[0].eval_losses
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_evaluation_of_stored_examples_reads_one_batch_at_a_time(tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "rows.jsonl"), ours("chatml")
    examples = encode_dataset(path, tokenizer, LENGTH, cache=tmp_path / "cache")
    sizes = []  # tokens of each batch, with padding

    def collate(_, batch):
        sizes.append(len(batch) * max(len(example.input_ids) for example in batch))
        return padded(batch)

    monkeypatch.setattr(SFT, "collate", collate)
    model = small(tokenizer)
    assert mean_loss(model, examples, 3) == mean_loss(model, list(examples), 3)
    longest = max(len(example.input_ids) for example in examples)
    assert max(sizes) <= 3 * longest < sum(sizes) / 2


# ---- a cache


def test_a_second_call_encodes_nothing(tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "rows.jsonl"), ours("chatml")
    first = encode_dataset(path, tokenizer, LENGTH, cache=tmp_path / "cache")
    copy = shutil.copy(path, tmp_path / "copy.jsonl")  # the content counts, not the name
    monkeypatch.setattr(dataset, "encode_row", None)
    second = encode_dataset(copy, tokenizer, LENGTH, cache=tmp_path / "cache")
    assert list(first) == list(second) and first.report == second.report


def test_any_change_of_the_examples_changes_the_cache_key(tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "rows.jsonl"), ours("chatml")
    backend, names = tokenizer.backend, tokenizer.special_tokens
    keys = [
        cache_key(path, tokenizer, LENGTH),
        cache_key(path, tokenizer, LENGTH + 1),
        cache_key(path, tokenizer, None),
    ]
    keys += [
        cache_key(path, other, LENGTH)
        for other in (ours("qwen3"), ours("llama3"), theirs("chatml"))
    ]
    keys.append(cache_key(path, Tokenizer(backend, names, CHATML + " "), LENGTH))
    keys.append(cache_key(path, Tokenizer(backend, {"eos_token": "<|endoftext|>"}, CHATML), LENGTH))
    keys.append(cache_key(shutil.copy(path, tmp_path / "rows.json"), tokenizer, LENGTH))
    keys.append(cache_key(write(tmp_path / "other.jsonl", ROWS[:-1]), tokenizer, LENGTH))
    dated = Tokenizer(backend, names, CHATML + "{{ strftime_now('%Y') }}")
    keys.append(cache_key(path, dated, LENGTH))
    monkeypatch.setattr(stored, "date", SimpleNamespace(today=lambda: "tomorrow"))
    keys.append(cache_key(path, dated, LENGTH))
    monkeypatch.setattr(stored, "version", lambda package: "another")
    keys.append(cache_key(path, tokenizer, LENGTH))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert cache_key(path, tokenizer, LENGTH) == keys[0]
    shutil.copytree(Path(stored.__file__).parent, tmp_path / "data")
    monkeypatch.setattr(stored, "__file__", str(tmp_path / "data" / "dataset_cache.py"))
    assert cache_key(path, tokenizer, LENGTH) == keys[0]
    for changed in ("loss_mask.py", "chat/messages.py"):
        with (tmp_path / "data" / changed).open("a") as file:
            file.write("\n")
        keys.append(cache_key(path, tokenizer, LENGTH))
    assert len(set(keys)) == len(keys)


def test_if_two_processes_write_a_cache_the_first_one_is_used(tmp_path, monkeypatch):
    path, tokenizer, real = write(tmp_path / "rows.jsonl"), ours("chatml"), stored.store

    def slow(folder, examples):
        real(folder, examples)
        monkeypatch.setattr(stored, "store", real)
        # another call writes the complete cache first
        encode_dataset(path, tokenizer, LENGTH, cache=tmp_path / "cache")

    monkeypatch.setattr(stored, "store", slow)
    found = encode_dataset(path, tokenizer, LENGTH, cache=tmp_path / "cache")
    assert list(found) == list(encode_dataset(path, tokenizer, LENGTH))
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [
        cache_key(path, tokenizer, LENGTH)
    ]


WRITER = """
import sys; sys.path.insert(0, "tests")
from helpers.chats import ours
from minilora.data import encode_dataset
found = encode_dataset(sys.argv[1], ours("chatml"), 48, cache=sys.argv[2])
print(len(found), sum(map(len, found)), found.report.tokens)
"""


def start(path, cache) -> subprocess.Popen:
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", WRITER, str(path), str(cache)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": roots}, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_killed_writer_leaves_no_incomplete_cache(tmp_path):
    path, cache = write(tmp_path / "rows.jsonl", ROWS * 2000), tmp_path / "cache"
    killed = start(path, cache)
    while not list(cache.glob(".*.tmp/tokens.bin")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    left = [folder.name for folder in cache.iterdir()]
    assert len(left) == 1 and left[0].startswith(".")
    os.utime(cache / left[0], (0, 0))  # the next writer deletes old temporary folders
    writers = [start(path, cache) for _ in range(2)]
    said = {writer.communicate()[0] for writer in writers}
    expected = encode_dataset(path, ours("chatml"), 48)
    assert said == {f"{len(expected)} {expected.report.tokens} {expected.report.tokens}\n"}
    assert [folder.name for folder in cache.iterdir()] == [cache_key(path, ours("chatml"), 48)]


# ---- memory

MEMORY = r"""
import re, sys; sys.path.insert(0, sys.argv[3])
from helpers.chats import ours
from minilora.data import dataset, encode_dataset
from minilora.data.packing import pack
dataset.STREAM = int(sys.argv[2])
encode_dataset([{"text": "warm"}], ours("chatml"), 512)
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
found = encode_dataset(sys.argv[1], ours("chatml"), 512)
assert sum(len(found[i]) for i in range(len(found))) == found.report.tokens
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """A file ten times as large takes 22 bytes (a record) for each further row, and little else.

    The bound of 6 MB for 18,000 more rows allows for freed buffers that allocators keep. pyarrow
    keeps most, for parquet.
    """
    rng = random.Random(0)
    paths = []
    for megabytes in (1, 10):
        count = megabytes * 2000
        rows = [{"text": "".join(rng.choices("helo was", k=500))} for _ in range(count)]
        paths.append(write(tmp_path / f"{megabytes}.{kind}", rows))

    def grown(limit: int) -> int:
        """Return the growth of the peak; files above `limit` bytes are streamed."""
        small, large = (int(python(MEMORY, path, limit, ROOT / "tests")) for path in paths)
        return large - small

    assert grown(0) < 6e6
    if kind == "jsonl":
        assert grown(2**40) > 6e6  # in memory: the measurement sees growth


# ---- errors


def test_a_bad_dataset_or_damaged_cache_raises(tmp_path, monkeypatch):
    path, tokenizer, cache = write(tmp_path / "rows.jsonl"), ours("chatml"), tmp_path / "cache"
    with pytest.raises(
        ValueError,
        match="it keeps dataset files, and this dataset is a list.*leave dataset_cache None",
    ):
        encode_dataset(ROWS, tokenizer, cache=cache)
    with pytest.raises(ValueError, match="a changed Letters cannot be recognised"):
        encode_dataset(path, Letters(), cache=cache)
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"question": "?"}])
    with pytest.raises(ValueError, match="row 11: keys .'question'. match no known shape"):
        encode_dataset(bad, tokenizer, cache=cache)
    with pytest.raises(ValueError, match="none of 11 rows has an answer to learn"):
        encode_dataset(path, tokenizer, 5, cache=cache)
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist"):
        encode_dataset(tmp_path / "none.jsonl", tokenizer, cache=cache)
    assert list(cache.iterdir()) == []
    real = stored.store
    monkeypatch.setattr(stored, "store", lambda *given: real(*given) or write(path, ROWS[:3]))
    with pytest.raises(ValueError, match="rows.jsonl was changed while it was read"):
        encode_dataset(path, tokenizer, cache=cache)
    monkeypatch.undo()
    encode_dataset(path, tokenizer, cache=cache)
    tokens = cache / cache_key(path, tokenizer, None) / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens.bin: expected \d+ bytes, got \d+. Delete"):
        encode_dataset(path, tokenizer, cache=cache)
