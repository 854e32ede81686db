"""A form for a GPU's results: the card's state and each result on a line, in one fenced block.

    python benchmarks/gpu_kernels/kernel_bench.py --form     # runs everything and prints the block

docs/gpu.md explains how to send the block.
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FENCE = "```"
# fields of nvidia-smi --help-query-gpu; clocks in MHz, power in W, temperature in °C
ASKED = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
ASKED += ("power.draw", "power.limit", "temperature.gpu")
ROOT = Path(__file__).resolve().parents[2]


def form(document: Mapping[str, Any]) -> str:
    """Return the fenced block for a document of kernel_bench.py.

    Call it right after the last kernel, because only then the clocks are those of a busy card.
    """
    head = {
        "form": "minilora",
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(),
    }
    values: dict[str, Any] = {}
    tables: list[dict[str, Any]] = []
    for key, value in document.items():
        if key in ("rows", "benchmark"):
            continue
        if isinstance(value, dict | list):
            tables.append({key: value})
        else:
            values[key] = value
    rows = [{"row": row} for row in document.get("rows", ())]
    lines = [head, values, {"smi": smi()}, *tables, *rows]
    return "\n".join([f"{FENCE}json", *map(json.dumps, lines), FENCE])


def smi() -> dict[str, str] | str:
    """Return the values that nvidia-smi reports for the card.

    With several cards, return its whole output; without nvidia-smi, return a message.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    out = _output(command)
    if out is None:
        return "nvidia-smi does not run here: add driver and clocks by hand"
    lines = out.splitlines()
    if len(lines) != 1:
        return {"of several cards": out}
    values = [value.strip() for value in lines[0].split(",")]
    return dict(zip(ASKED, values, strict=False))


def commit() -> str | None:
    """Return the commit of this copy, with a + if files are changed; None without git."""
    git = ["git", "-C", str(ROOT)]
    head = _output([*git, "rev-parse", "HEAD"])
    if head is None:
        return None
    changed = _output([*git, "status", "-s", "-uno"])
    return f"{head.strip()}+" if changed else head.strip()


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
