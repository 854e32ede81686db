"""Compilation of C for the CPU, at first use.

Without a C compiler, PyTorch does the same work in more passes over memory.

The compiler is a process that runs at the same time as Python. The library that it makes is stored
in `$MINILORA_CACHE`, or else `$XDG_CACHE_HOME/minilora`, or else `~/.cache/minilora`, under a hash
of the sources, the command, the compiler and the processor. The next program loads it from there,
unless another user could have written it. Its threads are those of torch: an OpenMP runtime that is
already loaded is not loaded twice.

`MINILORA_MARCH` names the processor to compile for, as the compiler's option `-march=` does; the
default is the processor at hand. A library for another processor may round other sums.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


class Library:
    """Some C files, compiled for this machine to one library.

    Args:
        name: Name of the library, for its file in the cache.
        sources: C files to compile.
        headers: Files that the C files include; they count in the hash.
        flags: Arguments for the compiler, in addition to those for this machine.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path],
        headers: Sequence[Path] = (),
        flags: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.sources = list(sources)
        self.headers = list(headers)
        self.flags = list(flags)
        self.started = False
        self.process: subprocess.Popen | None = None  # the compiler, while it runs
        self._library: ctypes.CDLL | None = None
        self._build_folder = ""
        self._cached: Path | None = None

    def begin(self) -> None:
        """Load the library from the cache, or start the compiler; only the first call does it."""
        if not self.started:
            self.started = True
            self._start()

    def loaded(self, wait: bool = False) -> ctypes.CDLL | None:
        """Return the library.

        Args:
            wait: Wait until the compiler is done. By default, return None while it runs.

        Returns:
            The library; None if it is not ready, or if it cannot be compiled.
        """
        self.begin()
        if self.process is None:
            return self._library
        if not wait and self.process.poll() is None:
            return None
        if self.process.wait() == 0:
            built = Path(self._build_folder, "library.so")
            self._library = ctypes.CDLL(str(built))
            _store(built, self._cached)
        self._clean()
        return self._library

    def _start(self) -> None:
        """Load the library from the cache, or start the compiler."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or os.name != "posix":
            return
        command = self._command(compiler)
        self._cached = self._cache_path(compiler, command)
        if _is_trusted(self._cached):
            with suppress(OSError):  # damaged, or for another C library: compile again
                self._library = ctypes.CDLL(str(self._cached))
                return
        self._build_folder = tempfile.mkdtemp(prefix="minilora-")
        atexit.register(self._clean)
        self.process = subprocess.Popen(
            ["sh", "-c", command], cwd=self._build_folder, stderr=subprocess.DEVNULL
        )

    def _command(self, compiler: str) -> str:
        """Return the shell command that compiles library.so in the current folder."""
        flags = " ".join(["-O3 -ffp-contract=off -shared -fPIC", machine_flags(), *self.flags])
        files = shlex.join(str(source) for source in self.sources)
        compile_files = f"{shlex.quote(compiler)} {flags} -o library.so {files} -lm"
        return f"{compile_files} -fopenmp || {compile_files}"  # some compilers lack OpenMP

    def _cache_path(self, compiler: str, command: str) -> Path | None:
        """Return the file of the library in the cache; None if the user has no home folder."""
        try:
            folder = cache_folder()
            program = os.stat(compiler)
            files = self.sources + self.headers
            contents = [path.read_bytes() for path in files]
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            return None
        key = hashlib.sha256()
        version = f"{program.st_size} {program.st_mtime_ns}"  # of the compiler
        key.update(f"{command}\n{version}\n{_processor()}\n".encode())
        for content in contents:
            key.update(hashlib.sha256(content).digest())
        return folder / "compiled" / f"{self.name}-{key.hexdigest()[:32]}.so"

    def _clean(self) -> None:
        """Stop the compiler and delete its folder."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            shutil.rmtree(self._build_folder, ignore_errors=True)


def machine_flags() -> str:
    """Return the compiler's options for the processor: `$MINILORA_MARCH`, else those of this one."""
    chosen = os.environ.get("MINILORA_MARCH")
    if chosen:
        return shlex.quote(f"-march={chosen}")
    if platform.machine() in ("x86_64", "AMD64"):
        return "-march=native -mprefer-vector-width=512"
    return "-mcpu=native"


def cache_folder() -> Path:
    """Return the folder for files that can be made again."""
    chosen = os.environ.get("MINILORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "minilora"
    return Path.home() / ".cache" / "minilora"


def _processor() -> str:
    """Return the description of the processor on which -march=native depends.

    Several machines may share a home folder.
    """
    fields = (
        "vendor_id",
        "cpu family",
        "model",
        "flags",
        "Features",
        "CPU implementer",
        "CPU part",
    )
    with suppress(OSError):
        cores = Path("/proc/cpuinfo").read_text().split("\n\n")
        lines = cores[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(fields))
    return f"{platform.machine()} {platform.processor()}"


def _is_trusted(path: Path | None) -> bool:
    """Return True if the file exists, and no other user could have written it or its folder."""
    if path is None:
        return False
    with suppress(OSError):
        return _only_user_writes(path) and _only_user_writes(path.parent)
    return False


def _only_user_writes(path: Path) -> bool:
    """Return True if the file is this user's, and closed to the group and to others."""
    status = os.lstat(path)
    others_write = status.st_mode & 0o022
    return status.st_uid == os.getuid() and not others_write


def _store(built: Path, target: Path | None) -> None:
    """Copy a library into the cache by an atomic rename; do nothing if the folder is read-only."""
    if target is None:
        return
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            with open(Path(folder, target.name), "xb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(built.read_bytes())
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, target)
