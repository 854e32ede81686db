"""Files that are whole or absent: write to a temporary name, fsync, rename. And safetensors with errors one can act on.

A crash at any moment leaves the old file or the new one. Nothing here reads or writes pickle.
"""

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

    An exception removes it and leaves what was at `path`. A folder at `path` is replaced by the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # left over from a crash
    try:
        yield temporary
        for part in [temporary, *temporary.rglob("*")]:
            _fsync(part)
        if path.is_dir():
            _remove(path)  # a folder cannot be renamed over another
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; keys sorted, so that equal tensors give equal bytes."""
    from safetensors.torch import save_file

    with whole(path) as temporary:
        contiguous: dict[str, Tensor] = {}
        places: set[int] = set()  # in memory: safetensors refuses what stands under two names
        for key in sorted(tensors):
            tensor = tensors[key].detach().contiguous()
            contiguous[key] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(tensor.data_ptr())
        save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))


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
