"""A form to send a GPU's figures back in: the card as it stood, and each result on a line, as one fenced block.

python benchmarks/gpu_kernels/kernel_bench.py --form        # runs everything and prints the block; docs/gpu.md says the
                                                            rest
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FENCE = "```"
# of nvidia-smi --help-query-gpu; clocks in MHz, power in W, temperature in °C
ASKED = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
ASKED += ("power.draw", "power.limit", "temperature.gpu")
ROOT = Path(__file__).resolve().parents[2]


def form(document: Mapping[str, Any]) -> str:
    """The block of a document of kernel_bench.py. Right after the last kernel, clocks are a busy card's."""
    parts = {key: value for key, value in document.items() if key not in ("rows", "benchmark")}
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(),
    }
    lines = [{"form": "minilora", **machine}, {"smi": smi()}]
    lines += [{key: value} for key, value in parts.items() if isinstance(value, dict | list)]
    lines[1:1] = [
        {key: value for key, value in parts.items() if not isinstance(value, dict | list)}
    ]
    lines += [{"row": row} for row in document.get("rows", ())]
    return "\n".join([f"{FENCE}json", *map(json.dumps, lines), FENCE])


def smi() -> dict[str, str] | str:
    """What nvidia-smi says of the first card that CUDA sees, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    out = _said(command)
    if out is None:
        return "nvidia-smi does not run here: add driver and clocks by hand"
    cards: list[dict[str, str]] = [
        dict(zip(ASKED, map(str.strip, line.split(",")), strict=False)) for line in out.splitlines()
    ]
    return cards[0] if len(cards) == 1 else {"of several cards": out}


def commit() -> str | None:
    """Of this copy, with a + if it was changed since; None where git knows of none."""
    head, changed = (
        _said(["git", "-C", str(ROOT), *words])
        for words in (["rev-parse", "HEAD"], ["status", "-s", "-uno"])
    )
    return None if head is None else head.strip() + "+" * bool(changed)


def _said(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
