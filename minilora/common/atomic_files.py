"""Atomic writes of files and folders; safetensors and JSON files.

Files are written to a temporary name, then fsync, then rename. A crash at any moment leaves the old
file or the new one, never a part of one. Nothing here reads or writes pickle.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

_MAX_JSON = 2**26  # bytes; the index of a model with 1 T parameters has about 2**24


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file or folder atomically.

    The `with` block writes to a temporary path, which replaces `path` at the end. An exception
    removes the temporary path and leaves `path` unchanged. A folder at `path` is replaced in two
    renames; a crash between them leaves both folders complete.

    Args:
        path: The file or folder to create or replace.

    Yields:
        The temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old.tmp")
    _remove(temporary)  # left by an earlier crash
    try:
        with path_in_errors(path):
            yield temporary
        for part in [temporary, *temporary.rglob("*")]:
            _fsync(part)
        if path.is_dir():  # a folder cannot be renamed over another one
            _remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)
        _remove(old)
    finally:
        _remove(temporary)


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Add a path to an OSError of the `with` block, which may not name it (a full disk).

    Args:
        path: The path to add.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.errno = error.errno or errno.EIO
            error.strerror = error.strerror or str(error)
            error.filename = str(path)
        raise


@contextmanager
def atomic_writes(folder: Path, index: Path) -> Iterator[Path]:
    """Write several files that belong together and move them into a folder.

    `index` is removed before the first file is moved. A crash therefore leaves the old files, the
    new files, or no index, but never an index for a mixture of old and new files.

    Args:
        folder: The folder that receives the files.
        index: The file that lists them for a reader.

    Yields:
        A temporary folder to write to.
    """
    new = folder / ".new"
    with atomic_write(new) as temporary:
        temporary.mkdir()
        yield temporary
    index.unlink(missing_ok=True)
    for file in new.iterdir():
        os.replace(file, folder / file.name)
    new.rmdir()
    _fsync(folder)


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder in which no file can be created. The folder is left as it was.

    Args:
        folder: The folder; it need not exist.
        option: The option that named it, for the error.

    Raises:
        ValueError: The folder cannot be created, or nothing can be written to it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test.tmp"
        probe.write_bytes(b"")
        probe.unlink()
        for path in new:
            path.rmdir()
    except OSError as error:
        raise ValueError(
            f"{option}: {folder} is not writable ({error.strerror}). Choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Args:
        path: The file to create or replace.
        text: Its content.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically. Equal tensors give equal bytes.

    Args:
        path: The file to create or replace.
        tensors: Tensors by name.
        metadata: Texts by name for the header of the file.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        address = tensor.data_ptr()
        if address in addresses:  # safetensors refuses tensors that share memory
            tensor = tensor.clone()
        contiguous[key] = tensor
        addresses.add(address)
    with atomic_write(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, which may come from a stranger.

    Args:
        path: The file.

    Raises:
        ValueError: The file is too large, is not JSON, or does not hold an object.
        FileNotFoundError: The file does not exist.
    """
    nbytes = path.stat().st_size
    if nbytes > _MAX_JSON:
        raise ValueError(f"{path} has {nbytes} bytes, expected at most {_MAX_JSON}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError covers UnicodeDecodeError
        raise ValueError(f"{path} is not JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: The file.

    Raises:
        ValueError: The file is damaged or incomplete.
        FileNotFoundError: The file does not exist.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}). Copy or download it again."
        ) from error


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Wait until the disk has stored a file or folder."""
    flags = os.O_RDONLY
    if sys.platform == "win32":
        if path.is_dir():  # Windows opens no folder
            return
        flags = os.O_RDWR  # Windows flushes only a file that may be written
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
