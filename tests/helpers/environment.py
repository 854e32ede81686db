"""Environments of tests: packages that must not stand next to the versions of constraints.txt."""

import os
import subprocess
import sys
from pathlib import Path


def environment(folder: Path, requirements: list[str]) -> dict[str, str]:
    """Install packages into a folder and return the variables of a process that prefers them.

    Every package that is not in `requirements`, such as torch, comes from the environment of the
    tests.

    Args:
        folder: where to install.
        requirements: packages with exact versions; their dependencies are not installed.

    Returns:
        The variables of this process with another PYTHONPATH.
    """
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, *requirements], check=True)
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
