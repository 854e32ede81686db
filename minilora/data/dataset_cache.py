"""Examples in files: written row by row, read one by one, so that any dataset takes little memory.

    tokens.bin    int32, little-endian: the ids of all examples in sequence; a supervised id as ~id
    rows.bin      a record (RECORD) an example: the end of its tokens, and its other fields
    report.json   the DataReport

A cache is a folder of such folders. The name of each is a hash of everything that determines its
content: the file's bytes, the tokenizer, its template, max_length and this code. So an entry is
never stale, only unused: delete the folder to free its space. Entries appear complete or not at
all, and two processes may write the same one at once. Reading opens a file each time: there is
nothing to close or to share, and no mapped page counts as memory.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from minilora.common import __version__, atomic_write
from minilora.data.loss_mask import IGNORE, Example
from minilora.data.report import DataReport

TOKENS = "tokens.bin"
ROWS = "rows.bin"
REPORT = "report.json"
RECORD = np.dtype(
    [
        ("end", "<i8"),
        ("row", "<i8"),
        ("dropped_turns", "<i4"),
        ("truncated", "?"),
        ("double_bos", "?"),
    ]
)
DAY = 24 * 3600.0  # seconds after which an unfinished entry is removed: its process died


@dataclass(frozen=True)
class StoredExamples(Sequence[Example]):
    """Examples in a folder, read on access.

    Attributes:
        folder: the folder.
        records: a RECORD for each example, (N,).
        owner: a temporary folder that must exist as long as this object.
    """

    folder: Path
    records: np.ndarray
    owner: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = 0
        if index > 0:
            start = int(self.records["end"][index - 1])
        end = int(self.records["end"][index])
        stored = np.fromfile(self.folder / TOKENS, "<i4", end - start, offset=4 * start)  # (T,)
        ids = np.where(stored < 0, ~stored, stored)
        labels = np.where(stored < 0, ids, IGNORE)
        names = [name for name in RECORD.names or () if name != "end"]
        fields = {name: self.records[name][index].item() for name in names}
        return Example(ids.tolist(), labels.tolist(), **fields)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return np.diff(self.records["end"], prepend=0).tolist()

    def token_parts(self) -> Iterator[bytes]:
        """Yield the content of tokens.bin in parts of 4 MiB."""
        with (self.folder / TOKENS).open("rb") as file:
            part = file.read(1 << 22)
            while part:
                yield part
                part = file.read(1 << 22)


def stored_tokens(example: Example) -> bytes:
    """Return the tokens of an example as tokens.bin holds them: int32, a supervised id as ~id.

    Args:
        example: the example.
    """
    ids = np.array(example.input_ids, "<i4")
    supervised = np.array(example.labels) != IGNORE
    return np.where(supervised, ~ids, ids).tobytes()


def store(folder: Path, examples: Any) -> None:
    """Write examples, one by one, and their report into an empty folder.

    Args:
        folder: the folder.
        examples: an `Encoder`.
    """
    end = 0
    with (folder / TOKENS).open("wb") as tokens, (folder / ROWS).open("wb") as rows:
        for example in examples:
            end += len(example)
            tokens.write(stored_tokens(example))
            record = (
                end,
                example.row,
                example.dropped_turns,
                example.truncated,
                example.double_bos,
            )
            rows.write(np.array(record, RECORD).tobytes())
    (folder / REPORT).write_text(json.dumps(asdict(examples.report())), encoding="utf-8")


def load(folder: Path, owner: Any = None) -> tuple[StoredExamples, DataReport]:
    """Read the content of a folder that `store` wrote.

    Args:
        folder: the folder.
        owner: a temporary folder that must exist as long as the examples.

    Raises:
        ValueError: a file was cut off.
    """
    records = np.fromfile(folder / ROWS, RECORD)
    expected = 4 * int(records["end"][-1])
    size = (folder / TOKENS).stat().st_size
    if expected != size:
        raise ValueError(
            f"{folder / TOKENS}: expected {expected} bytes, got {size}. Delete {folder}."
        )
    fields: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
    return StoredExamples(folder, records, owner), DataReport(**fields)


def cached(path: Path, tokenizer: Any, max_length: int | None, cache: Path, examples: Any) -> Path:
    """Return the cache entry of a dataset file; write it if it does not exist.

    Args:
        path: the dataset file.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens.
        cache: folder of the cache.
        examples: an `Encoder` of the file.

    Returns:
        Folder of the entry.

    Raises:
        ValueError: the file changed during reading.
    """
    before = path.stat()
    folder = cache / cache_key(path, tokenizer, max_length)
    if folder.is_dir():
        return folder
    for unfinished in cache.glob(".*.tmp"):
        if time.time() - unfinished.stat().st_mtime > DAY:
            shutil.rmtree(unfinished)
    new = folder.with_name(f"{folder.name}-{uuid4().hex}")
    with atomic_write(new) as temporary:
        temporary.mkdir()
        store(temporary, examples)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ValueError(f"{path} was changed while it was read. Start again.")
    try:
        os.rename(new, folder)
    except OSError:  # another process may have written the entry first
        shutil.rmtree(new)
        if not folder.is_dir():
            raise
    return folder


def cache_key(path: Path, tokenizer: Any, max_length: int | None) -> str:
    """Return a hash of everything that the examples depend on.

    Args:
        path: the dataset file.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens.

    Raises:
        ValueError: the tokenizer cannot be serialised.
    """
    template = json.dumps(tokenizer.chat_template)
    dated = "strftime_now" in template
    package = type(tokenizer).__module__.partition(".")[0]  # minilora or transformers
    serialised = _serialised(tokenizer)
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = [
        content,
        path.suffix.lower(),
        max_length,
        repr(tokenizer),
        template,
        serialised,
        getattr(tokenizer, "split_special_tokens", None),
        date.today() if dated else None,
        version("tokenizers"),
        version("jinja2"),
        _version_of(package),
    ]
    # Changed code is another key.
    parts += [file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _serialised(tokenizer: Any) -> list[str]:
    """Return the tokenizer as text; raise ValueError if it has no such form."""
    serialised = []
    for name in ("backend", "backend_tokenizer"):
        backend = getattr(tokenizer, name, None)
        if backend is not None and hasattr(backend, "to_str"):
            serialised.append(backend.to_str())
    if not serialised:
        raise ValueError(
            f"dataset_cache: a changed {type(tokenizer).__name__} cannot be recognised. Expected a "
            "tokenizer of minilora.load_tokenizer or a fast tokenizer of transformers; or leave "
            "dataset_cache None."
        )
    return serialised


def _version_of(package: str) -> str | None:
    """Return the version of a package, or None for a script's own tokenizer."""
    if package == "minilora":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
