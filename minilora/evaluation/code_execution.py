"""A metric for generated code: each answer runs in a new process with limits it cannot raise.

    pass@1 = share of answers whose code, followed by its tests, ends without an error

The child is an isolated Python: no site-packages, no environment variables, an empty working
folder. It limits itself before it reads the answer: seconds, memory, size of files, no further
processes. These are limits on resources, not a sandbox: the child can read the user's files and
reach the network. For answers of untrusted models, run the whole evaluation in a container.

Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
"""

import re
import subprocess
import sys
import tempfile

SECONDS = 5  # of processor time; twice as many by the clock
MEMORY = 512 << 20  # bytes of address space
FILE_BYTES = 1 << 20
_PASSED = 86  # exit status of a complete run: no answer exits with it by accident
_CHILD = f"""
import resource, sys
limits = {{"CPU": {SECONDS}, "AS": {MEMORY}, "FSIZE": {FILE_BYTES}, "NPROC": 0, "CORE": 0}}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "__main__"}})
"""
_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def pass_at_1(prediction: str, reference: str) -> float:
    """Run a generated program and its tests.

    Use it as `evaluate(..., metrics={"pass@1": pass_at_1})` on rows whose answers are tests. An
    answer that exits early, hangs, takes too much memory or floods its output has failed.

    Args:
        prediction: the answer; its first fenced block is the code, or all of it without a fence.
        reference: the tests.

    Returns:
        1.0 if the code and then the tests run to their end, else 0.0.

    Raises:
        OSError: the system has no resource limits (Windows).
    """
    if sys.platform == "win32":
        raise OSError(
            "pass_at_1: this system has no resource limits for a process; run it on Linux or macOS."
        )
    fenced = _FENCE.search(prediction)
    code = fenced[1] if fenced else prediction
    program = f"{code}\n{reference}\nraise SystemExit({_PASSED})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                input=program.encode(),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
            )
        except subprocess.TimeoutExpired:
            return 0.0
    return float(child.returncode == _PASSED)
