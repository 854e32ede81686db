"""CPU seconds of the fast tests, by folder of tests/, held against a budget.

Wall time depends on what else a machine does; the CPU seconds of a process and of its children
much less. A folder over SLACK times its budget fails the run, and the printed table shows which
one. Slow tests are not counted.
"""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

# Measured on two cores with AVX-512 and rounded up. A processor with AVX2 needs up to twice as
# much, and so does one that is shared; SLACK allows for it.
BUDGET = {
    "bench": 25,
    "cli": 50,
    "common": 5,
    "cpu_c": 15,
    "data": 40,
    "docs": 10,
    "evaluation": 25,
    "generation": 20,
    "gpu": 60,
    "lora": 60,
    "losses": 20,
    "models": 60,
    "nf4": 15,
    "ops": 15,
    "ptx": 20,
    "quant": 10,
    "repo": 70,
    "serving": 30,
    "tools": 60,
    "training": 150,
}
SLACK = 3


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def room_of(path: Path, root: Path) -> str | None:
    """Return the folder of tests/ that holds a test, or None for a test elsewhere.

    Args:
        path: the file of the test.
        root: the root of the repository.
    """
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else None


def over_budget(spent: Mapping[str, float]) -> list[str]:
    """Return a sentence for every folder that needed more than SLACK times its budget.

    Args:
        spent: CPU seconds by folder.
    """
    sentences = []
    for room, seconds in sorted(spent.items()):
        if room not in BUDGET:
            sentences.append(f"tests/{room} has no budget in tests/helpers/cpu_budget.py")
        elif seconds > SLACK * BUDGET[room]:
            sentences.append(
                f"tests/{room} needed {seconds:.0f} CPU seconds, and its budget is "
                f"{SLACK} x {BUDGET[room]}: make its tests smaller, or mark the longest ones slow"
            )
    return sentences


def table(spent: Mapping[str, float]) -> str:
    """Return the CPU seconds by folder, most first, as one line.

    Args:
        spent: CPU seconds by folder.
    """
    cells = [f"{room} {seconds:.0f}" for room, seconds in Counter(spent).most_common()]
    return f"CPU seconds of {sum(spent.values()):.0f}: " + ", ".join(cells)
