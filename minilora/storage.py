"""Files that are whole or absent: write to a temporary name, fsync, rename. And safetensors with errors one can act on.

A crash at any moment leaves the old file or the new one. Nothing here reads or writes pickle.
"""

import errno
import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder at; it takes the place of `path` on leaving.

    An exception removes it and leaves what was at `path`. A folder at `path` is replaced by the new one, in two
    renames: a crash between them leaves both beside `path`, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old.tmp"))
    _remove(temporary)  # left over from a crash
    try:
        with naming(path):
            yield temporary
        for part in [temporary, *temporary.rglob("*")]:
            _fsync(part)
        if path.is_dir():  # a folder cannot be renamed over another
            _remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)
        _remove(old)
    finally:
        _remove(temporary)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError says where: that of a write, such as to a full disk, does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.errno, error.strerror = error.errno or errno.EIO, error.strerror or str(error)
            error.filename = str(path)
        raise


@contextmanager
def together(folder: Path, index: Path) -> Iterator[Path]:
    """A temporary folder to write files in, which move to `folder` on leaving. `index`, which tells a reader of them,
    is removed before the first one moves: a crash leaves the old files, the new ones, or no index, never a mixture."""
    new = folder / ".new"
    with whole(new) as temporary:
        temporary.mkdir()
        yield temporary
    index.unlink(missing_ok=True)
    for file in new.iterdir():
        os.replace(file, folder / file.name)
    new.rmdir()
    _fsync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; keys sorted, so that equal tensors give equal bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as temporary:
        contiguous: dict[str, Tensor] = {}
        places: set[int] = set()  # in memory: safetensors refuses what stands under two names
        for key in sorted(tensors):
            tensor = tensors[key].detach().contiguous()
            contiguous[key] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(tensor.data_ptr())
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. ValueError if it is damaged or cut off, FileNotFoundError if there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}). Copy or download it again.") from error


def open_leaf(module: str) -> Any:
    """A module that the core does not know until it is asked for, such as "gguf.read": a leaf (CONTRIBUTING.md)."""
    return importlib.import_module(f"minilora.{module}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
