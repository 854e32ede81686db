"""Examples in files: written row by row, read one by one, so that a dataset of any size takes little memory.

    tokens.bin    int32, little-endian: the ids of all examples, one behind another; a trained one as ~id
    rows.bin      a record (RECORD) an example: where its tokens end, and what else an Example holds
    report.json   the DataReport

A cache is a folder of such folders, each named by a hash of all that its content depends on: the file's bytes, the
tokenizer, its template, max_length and the code itself. So an entry is never stale, only left behind: delete the folder
to free its space. Entries appear whole or not at all, and two processes may write the same one at once.
Reading opens a file each time: nothing to close or to share, and no page of a map that counts as memory.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from minilora.common import __version__, whole
from minilora.data.loss_mask import IGNORE, Example
from minilora.data.report import DataReport

TOKENS, ROWS, REPORT = "tokens.bin", "rows.bin", "report.json"
RECORD = np.dtype([("end", "<i8"), ("row", "<i8"), ("dropped_turns", "<i4"), ("truncated", "?"), ("double_bos", "?")])
DAY = 24 * 3600.0  # seconds after which what nobody wrote to was left by a process that died


@dataclass(frozen=True)
class StoredExamples(Sequence[Example]):
    """The examples in `folder`, read when asked for."""

    folder: Path
    records: np.ndarray  # (N,) of RECORD
    owner: Any = field(default=None, repr=False)  # of a temporary folder, which lives as long as this

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        end, start = (int(self.records["end"][i]) if i >= 0 else 0 for i in (index, index - 1))
        stored = np.fromfile(self.folder / TOKENS, "<i4", end - start, offset=4 * start)
        ids = np.where(stored < 0, ~stored, stored)
        labels = np.where(stored < 0, ids, IGNORE)
        fields = {name: self.records[name][index].item() for name in RECORD.names or () if name != "end"}
        return Example(ids.tolist(), labels.tolist(), **fields)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return np.diff(self.records["end"], prepend=0).tolist()


def store(folder: Path, examples: Any) -> None:
    """Write the examples of an `Encoder`, as they come, and its report into an empty folder."""
    end = 0
    with (folder / TOKENS).open("wb") as tokens, (folder / ROWS).open("wb") as rows:
        for example in examples:
            end += len(example)
            ids, trained = np.array(example.input_ids, "<i4"), np.array(example.labels) != IGNORE
            tokens.write(np.where(trained, ~ids, ids).tobytes())
            record = end, example.row, example.dropped_turns, example.truncated, example.double_bos
            rows.write(np.array(record, RECORD).tobytes())
    (folder / REPORT).write_text(json.dumps(asdict(examples.report())), encoding="utf-8")


def load(folder: Path, owner: Any = None) -> tuple[StoredExamples, DataReport]:
    """What `store` wrote. ValueError if a file was cut off."""
    records = np.fromfile(folder / ROWS, RECORD)
    expected, found = 4 * int(records["end"][-1]), (folder / TOKENS).stat().st_size
    if expected != found:
        raise ValueError(f"{folder / TOKENS}: expected {expected} bytes, got {found}. Delete {folder}.")
    fields: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return StoredExamples(folder, records, owner), DataReport(**fields)


def cached(path: Path, tokenizer: Any, max_length: int | None, cache: Path, examples: Any) -> Path:
    """The folder in `cache` of these examples of the file `path`; written now if it is not there."""
    before = path.stat()
    folder = cache / cache_key(path, tokenizer, max_length)
    if folder.is_dir():
        return folder
    for stale in cache.glob(".*.tmp"):
        if time.time() - stale.stat().st_mtime > DAY:
            shutil.rmtree(stale)
    mine = folder.with_name(f"{folder.name}-{uuid4().hex}")
    with whole(mine) as temporary:
        temporary.mkdir()
        store(temporary, examples)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ValueError(f"{path} was changed while it was read. Start again.")
    try:
        os.rename(mine, folder)
    except OSError:
        shutil.rmtree(mine)
        if not folder.is_dir():
            raise
    return folder  # mine, or that of a process which was faster


def cache_key(path: Path, tokenizer: Any, max_length: int | None) -> str:
    """A hash of all that the examples depend on. ValueError if the tokenizer cannot be written down."""
    backends = [getattr(tokenizer, name, None) for name in ("backend", "backend_tokenizer")]
    written = [backend.to_str() for backend in backends if backend is not None and hasattr(backend, "to_str")]
    if not written:
        raise ValueError(
            f"dataset_cache: a {type(tokenizer).__name__} cannot be told from one that was changed. Expected one of "
            "minilora.load_tokenizer or a fast tokenizer of transformers; or leave dataset_cache None."
        )
    template = json.dumps(tokenizer.chat_template)
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = [content, path.suffix.lower(), max_length, repr(tokenizer), template, written]
    parts += [getattr(tokenizer, "split_special_tokens", None), date.today() if "strftime_now" in template else None]
    package = type(tokenizer).__module__.partition(".")[0]  # minilora or transformers
    parts += [version("tokenizers"), version("jinja2"), _version_of(package)]
    parts += [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]  # of other code, another key
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _version_of(package: str) -> str | None:
    """The version of a package, None for a script's own tokenizer."""
    if package == "minilora":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
