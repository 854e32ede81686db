"""Cycles of the load and store unit by executed addresses: one program of each kernel, on a CPU.

    python benchmarks/gpu_model/executed.py [--targets sm_86] [KERNEL ...]

sass.py counts instructions, and so assumes ideal addresses: a 32-bit access of a warp is one pass.
Here the PTX machine (kernels/minilora_ptx) executes the first program of each launch of
report_jobs.py, on random values. It counts one cycle for each line, bank pass, shuffle, and 128
bytes of registers of a request (counts.py). The code around a loop is included.

    cycles      of an SM, for 32 weights (values, parameters, scales, logits)
    loads, %    bytes that lanes load, as a share of the sectors of 32 bytes that they touch. More
                than 100 % means that several lanes load the same bytes. The same for stores.
    a card      time of the load and store unit as a share of DRAM's time
    conflicts   most passes over shared memory for 128 bytes, by an instruction that needs more than
                1.5; below the table each such line of Python with its average

sm_80, sm_86 and sm_89 have the same PTX. The last line is one JSON document.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))

from benchmarks.gpu_model.report_jobs import drawn, jobs
from benchmarks.gpu_model.roofline import CARDS, Card
from minilora_ptx import Launch, ptx_machine

SAME_PTX = {"sm_80": "sm_86", "sm_89": "sm_86"}
NAMES = (
    "gemv_nf4",
    "gemv_nf4_double_quant",
    "gemv_nf4_double_quant_small",
    "matmul_nf4",
    "matmul_nf4_64_tokens",
    "dequantize_nf4_double_quant",
    "quantize_nf4",
    "double_quantize_nf4",
    "adamw_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_weight",
)
SHOWN = ("RTX 3060", "RTX 3090", "RTX 4070", "RTX 4090", "RTX 5090")
GROUP = 32  # weights: cycles are those of 32 lanes with one weight each


def _ptx_of(target: str) -> str:
    """Return the target whose PTX a target has."""
    return SAME_PTX.get(target, target)


def executed(name: str, target: str) -> dict[str, Any]:
    """Return the figures of the first program of a kernel's launch.

    Triton must compile in this process, so TRITON_INTERPRET must not be set.
    """
    return _executed(name, _ptx_of(target))


@lru_cache
def _executed(name: str, target: str) -> dict[str, Any]:
    """Run a kernel for a target with PTX of its own."""
    job = _jobs()[name]
    with ptx_machine(target, races=False, counting=True, ctas=[0]) as launches:
        job.launch()
    launch = max(launches, key=lambda launch: math.prod(launch.grid))
    elements = job.elements / math.prod(launch.grid)
    counts = launch.machine.counts
    return {
        "kernel": name,
        "target": target,
        "lsu_cycles": GROUP * counts.cycles() / elements,
        "bytes": job.bytes,
        "load_sectors_used": _used(launch, "ld"),
        "store_sectors_used": _used(launch, "st"),
        "conflicts": conflicts(launch),
    }


@lru_cache(maxsize=1)
def _jobs() -> dict[str, Any]:
    """Return the jobs with values."""
    return jobs(drawn)


def _used(launch: Launch, verb: str) -> float:
    """Return the share of the sectors' bytes that loads ("ld") or stores ("st") ask for.

    More than 1 means that lanes ask for the same bytes. 1 without an access.
    """
    counts = launch.machine.counts
    found = [
        requests
        for number, requests in counts.requests.items()
        if counts.kernel.instructions[number].opcode.startswith(f"{verb}.global")
    ]
    sectors = sum(requests.sectors for requests in found)
    return sum(requests.bytes for requests in found) / (32 * sectors) if sectors else 1.0


def conflicts(launch: Launch) -> list[dict[str, Any]]:
    """Return the lines whose shared accesses need over 1.5 passes for 128 bytes on average."""
    counts = launch.machine.counts
    of_line: dict[str, list[int]] = {}
    for number, requests in sorted(counts.requests.items()):
        instruction = counts.kernel.instructions[number]
        if ".shared" not in instruction.opcode:
            continue
        least = max(requests.requests, math.ceil(requests.bytes / 128))
        place = f"{instruction.place[0]}:{instruction.place[1]} {instruction.opcode}"
        total = of_line.setdefault(place, [0, 0])
        total[0] += requests.passes
        total[1] += least
    averages = {place: passes / least for place, (passes, least) in of_line.items()}
    return [
        {"passes": round(average, 1), "where": place}
        for place, average in averages.items()
        if average > 1.5
    ]


def dram_cycles(card: Card, bytes_per_element: float) -> float:
    """Return the cycles in which an SM's share of the bandwidth moves the bytes of 32 elements."""
    return GROUP * bytes_per_element / (card.gb_per_s / card.sms / card.ghz)


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of one target, as lines of Markdown.

    A cell of a card is the time of the load and store unit as a share of DRAM's time.
    """
    target = found[0]["target"]
    cards = [name for name in SHOWN if _ptx_of(CARDS[name].target) == target]
    lines = [
        f"| {target} | cycles | loads, % | stores, % | {' | '.join(cards)} | conflicts |",
        "|" + "---|" * (5 + len(cards)),
    ]
    for row in found:
        shares = [row["lsu_cycles"] / dram_cycles(CARDS[name], row["bytes"]) for name in cards]
        worst = max((each["passes"] for each in row["conflicts"]), default=0)
        cells = [
            f"`{row['kernel']}`",
            f"{row['lsu_cycles']:.2f}",
            f"{row['load_sectors_used']:.0%}",
            f"{row['store_sectors_used']:.0%}",
            *(f"{share:.2f}" for share in shares),
            f"{worst}" if worst else "none",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print a table for each target, the conflicts, and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default="sm_86,sm_120", help="sm_NN, separated by commas")
    parser.add_argument("kernels", nargs="*", help=f"kernels (default {', '.join(NAMES)})")
    args = parser.parse_args()
    document: list[dict[str, Any]] = []
    for target in args.targets.split(","):
        found = [executed(name, target) for name in args.kernels or NAMES]
        print("\n".join(table(found)) + "\n")
        for row in found:
            for each in row["conflicts"]:
                print(f"{row['kernel']}: {each['passes']} passes, {each['where']}")
        print()
        document += found
    print(json.dumps({"benchmark": "executed", "rows": document}))


if __name__ == "__main__":
    main()
