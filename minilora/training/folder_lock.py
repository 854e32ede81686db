"""The lock of a run folder: two runs never write to the same folder at the same time.

The operating system holds the lock (`flock`) for the process that opened the file .lock in the
folder. It ends with this process, also after SIGKILL, so a lock is never left behind.

Simplified: nothing is locked where the system or the file system has no `flock` (Windows, some
network drives).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any = None
with suppress(ImportError):  # Windows has no such module
    import fcntl

LOCK_FILE = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block; the folder is created if it is missing.

    The file of the lock is removed at the end, and so is a new folder in which nothing was written.

    Args:
        folder: The output_dir of a run.

    Raises:
        ValueError: If another run holds the lock.
    """
    if fcntl is None:
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = _open_locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked, so no other run has this file
        os.close(descriptor)
        with suppress(OSError):  # a folder that holds files stays
            for created in new:
                created.rmdir()


def _open_locked(path: Path) -> int:
    """Open and lock the file; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(
                f"output_dir: another run is writing to {path.parent}. Wait until it ends, or stop "
                "it, or choose another folder."
            ) from error
        except OSError:  # a file system without locks
            return descriptor
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # the run before removed this file after it was opened here


def _is_at(path: Path, descriptor: int) -> bool:
    """Return True if an open file is still the one at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
