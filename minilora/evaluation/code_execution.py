"""Does generated code pass its tests? Each answer runs in a process of its own, within limits it cannot raise.

    pass@1 = share of answers whose code, followed by its tests, ends without an error       (arXiv:2107.03374, §2.1)

The child is an isolated Python (no site-packages, no environment, an empty folder to run in) that limits itself before
it reads a word of the answer: seconds, memory, size of files, no further processes. These are limits on resources, not
a jail: it can read what its user can read, and reach a network where there is one. For answers of strangers' models,
run the whole evaluation in a container.
"""

import re
import subprocess
import sys
import tempfile

SECONDS, MEMORY, FILE_BYTES = 5, 512 << 20, 1 << 20  # of processor time (twice that by the clock), of address space
_CHILD = f"""
import resource, sys
for what, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE_BYTES}), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "__main__"}})
"""
_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def pass_at_1(prediction: str, reference: str) -> float:
    """1.0 if `prediction` (its first fenced block, or all of it) and then the tests in `reference` run through.

    A metric for `evaluate(..., metrics={"pass@1": pass_at_1})` on rows whose answer column holds tests. An answer that
    exits, hangs, takes too much memory or floods its output has failed. OSError on systems without resource limits.
    """
    if sys.platform == "win32":
        raise OSError("pass_at_1: this system has no resource limits for a process; run it on Linux or macOS.")
    fenced = _FENCE.search(prediction)
    done = "\nraise SystemExit(86)\n"  # said by nobody by accident: an answer that exits early with 0 has not passed
    code = (fenced[1] if fenced else prediction) + "\n" + reference + done
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                input=code.encode(),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
            )
        except subprocess.TimeoutExpired:
            return 0.0
    return float(child.returncode == 86)
