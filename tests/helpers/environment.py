"""Environments of tests: packages that must not stand next to the versions of constraints.txt."""

import os
import subprocess
import sys
from pathlib import Path


def environment(
    folder: Path, requirements: list[str], dependencies: bool = False
) -> dict[str, str]:
    """Install packages into a folder and return the variables of a process that prefers them.

    Every other package, such as torch, comes from the environment of the tests.

    Args:
        folder: where to install.
        requirements: packages with exact versions, or options of pip.
        dependencies: install the packages that these need, too.

    Returns:
        The variables of this process with another PYTHONPATH.
    """
    install = [sys.executable, "-m", "pip", "install", "-qq", "--target", str(folder)]
    if not dependencies:
        install.append("--no-deps")
    subprocess.run([*install, *requirements], check=True)
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
