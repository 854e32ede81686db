"""C for the CPU, compiled at first use where a C compiler is; without one PyTorch does the same in more passes.

The compiler runs beside Python, a process of its own. What it made is kept in `$MINILORA_CACHE`, else
`$XDG_CACHE_HOME/minilora`, else `~/.cache/minilora`, under a hash of the source, the command, the compiler and the
processor, and taken from there the next time if no other user could have written it. Its threads are torch's: an OpenMP
runtime that is loaded already is not loaded again.

`MINILORA_MARCH` names the processor to compile for, as the compiler's `-march=` does; by default it is this one. Such a
library may run elsewhere, and it may round other sums than this processor's own.
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
from contextlib import suppress
from pathlib import Path


class Library:
    """One C file, compiled for this machine."""

    def __init__(self, source: Path, *flags: str) -> None:
        self.source, self.flags = source, flags
        self.started = False
        self.found: ctypes.CDLL | None = None
        self.process: subprocess.Popen | None = None
        self.folder = ""
        self.kept: Path | None = None

    def begin(self) -> None:
        """Take what was kept, or start the compiler, once."""
        if not self.started:
            self.started = True
            self._start()

    def loaded(self, wait: bool = False) -> ctypes.CDLL | None:
        """The library; None until the compiler is done, unless one waits; for good if there is none."""
        self.begin()
        if self.process is not None and (wait or self.process.poll() is not None):
            if self.process.wait() == 0:
                made = Path(self.folder, "library.so")
                self.found = ctypes.CDLL(str(made))
                _keep(made, self.kept)
            self._clean()
        return self.found

    def _start(self) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or os.name != "posix":
            return
        flags = " ".join(["-O3 -ffp-contract=off -shared -fPIC", machine_flags(), *self.flags])
        compile = f"{shlex.quote(compiler)} {flags} -o library.so {shlex.quote(str(self.source))} -lm"
        command = f"{compile} -fopenmp || {compile}"  # some compilers come without OpenMP
        self.kept = _place(self.source, command, compiler)
        if _is_ours(self.kept):
            with suppress(OSError):  # damaged, or of another C library: made again
                self.found = ctypes.CDLL(str(self.kept))
                return
        self.folder = tempfile.mkdtemp(prefix="minilora-")
        atexit.register(self._clean)
        self.process = subprocess.Popen(["sh", "-c", command], cwd=self.folder, stderr=subprocess.DEVNULL)

    def _clean(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            shutil.rmtree(self.folder, ignore_errors=True)


def machine_flags() -> str:
    """The compiler's options for the processor: `$MINILORA_MARCH`, else what this one has."""
    chosen = os.environ.get("MINILORA_MARCH")
    if chosen:
        return shlex.quote(f"-march={chosen}")
    if platform.machine() in ("x86_64", "AMD64"):
        return "-march=native -mprefer-vector-width=512"
    return "-mcpu=native"


def _place(source: Path, command: str, compiler: str) -> Path | None:
    """Where the library is kept; None where there is no home."""
    chosen, base = os.environ.get("MINILORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(chosen).expanduser() if chosen else (Path(base) if base else Path.home() / ".cache") / "minilora"
        program, code = os.stat(compiler), source.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    made_by = f"{command}\n{program.st_size} {program.st_mtime_ns}\n{_processor()}\n".encode()
    return folder / "compiled" / f"{source.stem}-{hashlib.sha256(made_by + code).hexdigest()[:32]}.so"


def _processor() -> str:
    """What -march=native goes by: a home may be shared by machines."""
    says = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        return "\n".join(line for line in first.splitlines() if line.startswith(says))
    return f"{platform.machine()} {platform.processor()}"


def _is_ours(path: Path | None) -> bool:
    """Whether the file is there, and neither it nor its folder is another's or open to others' writing."""
    with suppress(OSError):
        found = [] if path is None else [os.lstat(path), os.lstat(path.parent)]
        return bool(found) and all(one.st_uid == os.getuid() and not one.st_mode & 0o022 for one in found)
    return False


def _keep(made: Path, place: Path | None) -> None:
    """Copy `made` to `place`, whole or not at all; a folder that cannot be written to keeps nothing."""
    if place is None:
        return
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder, open(Path(folder, place.name), "xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(made.read_bytes())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, place)
