"""C for the CPU, compiled at first use where a C compiler is; without one PyTorch does the same in more passes.

The compiler runs beside Python, a process of its own. Nothing is kept on disk: the library is loaded and its folder
removed. Its threads are torch's: an OpenMP runtime that is loaded already is not loaded again.
"""

import atexit
import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path


class Library:
    """One C file, compiled for this machine."""

    def __init__(self, source: Path, *flags: str) -> None:
        self.source, self.flags = source, flags
        self.started = False
        self.found: ctypes.CDLL | None = None
        self.process: subprocess.Popen | None = None
        self.folder = ""

    def begin(self) -> None:
        """Start the compiler, once."""
        if not self.started:
            self.started = True
            self._compile()

    def loaded(self, wait: bool = False) -> ctypes.CDLL | None:
        """The library; None until the compiler is done, unless one waits; for good if there is none."""
        self.begin()
        if self.process is not None and (wait or self.process.poll() is not None):
            if self.process.wait() == 0:
                self.found = ctypes.CDLL(str(Path(self.folder, "library.so")))
            self._clean()
        return self.found

    def _compile(self) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or os.name != "posix":
            return
        self.folder = tempfile.mkdtemp(prefix="minilora-")
        atexit.register(self._clean)
        x86 = platform.machine() in ("x86_64", "AMD64")
        machine = "-march=native -mprefer-vector-width=512" if x86 else "-mcpu=native"
        flags = " ".join(["-O3 -ffp-contract=off -shared -fPIC", machine, *self.flags])
        compile = f"{shlex.quote(compiler)} {flags} -o library.so {shlex.quote(str(self.source))} -lm"
        command = ["sh", "-c", f"{compile} -fopenmp || {compile}"]  # some compilers come without OpenMP
        self.process = subprocess.Popen(command, cwd=self.folder, stderr=subprocess.DEVNULL)

    def _clean(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            shutil.rmtree(self.folder, ignore_errors=True)
