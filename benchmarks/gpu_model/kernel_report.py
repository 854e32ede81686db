"""Counts of machine code, ours and bitsandbytes', and times on eight cards, without a GPU.

    python benchmarks/gpu_model/kernel_report.py [--targets sm_80,sm_86,gfx942] [--json FILE]

Our kernels are compiled by the library's own launchers on CPU tensors inside `imaginary_gpu`: bf16,
4096 x 4096 (the small GEMV 1536 x 576), blocks of 64, few tokens 16 or 64; cross-entropy on
512 x 131072 logits; AdamW and a layer's steps on 4096 x 4096 values (report_jobs.py). If a launcher
starts several kernels, the one with the largest grid is counted. bitsandbytes' kernels come from
the installed wheel. The figures are those of a thread with full work (sass.py):

    instr/elem      instructions per weight (logit, parameter, value); with loops only those inside
    whole           the same with the code around the loops: for a GEMV at an inner size of 4096
                    (small: 576)
    loads, stores   of global memory, bits x count (with loops their loads), with those of the
                    look-up table and the scales
    occupancy       warps that fit on an SM at a time, by registers, shared bytes and threads, as a
                    share of the most it can hold

In the JSON, `load_bits` is the widest load and `store_bits` the narrowest store, 0 without any; the
fp32 absmax of a quantiser keeps the latter at 32 or below. The roofline is the model of roofline.py
on these counts: an estimate, not a measurement. The load and store
unit (lsu) of our kernels counts by executed addresses (executed.py), whole launches included;
bitsandbytes ships no PTX to execute, so its addresses are ideal. `lsu_ideal` is the same for ours.
AMD's targets are compiled and not counted. The last line of stdout is one JSON document.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_model.executed import executed
from benchmarks.gpu_model.imaginary import Launch, imaginary_gpu
from benchmarks.gpu_model.report_jobs import ADAMW_BYTES, BLOCKSIZE, SCALES_BYTES, Job, jobs
from benchmarks.gpu_model.roofline import (
    CARDS,
    HALF,
    WEIGHT,
    WEIGHT_DOUBLE_QUANT,
    binding,
    bounds,
    pressure,
)
from benchmarks.gpu_model.sass import SM_LIMITS, Counts, count, cubins, functions, occupancy
from minilora_kernels.triton import nf4_matmul

EXECUTED_WITH = (
    "3.7."  # Triton whose PTX the PTX machine is tested with; others count ideal addresses
)
AMD = ("gfx942", "gfx1100")
LAYER = 4096 * 14336  # weights, in the roofline


@dataclass(frozen=True)
class Peer:
    """One of bitsandbytes' kernels.

    The names and numbers come from its source (csrc), where they are constants.
    """

    pattern: str  # in the mangled name
    threads: int  # per block
    elements: int  # per thread
    bytes: float  # of DRAM for one element, as in Job
    # Elements that a thread handles in one trip of its loop; 0: no loop, or a loop that runs once.
    trip: int = 0


# Mangled: <__nv_bfloat16, tile 512, 64 threads, 8 bytes a thread, 2 = NF4>. In the GEMVs one warp
# handles one row.
BITSANDBYTES = {
    "dequantize_nf4": Peer(
        "kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2E", 64, 16, HALF + WEIGHT
    ),
    "dequantize_absmax": Peer("kDequantizeBlockwiseIfLi512ELi64ELi8ELi0E", 64, 8, SCALES_BYTES),
    "quantize_nf4": Peer("kQuantizeBlockwiseSmallI13__nv_bfloat16Li64ELi2E", 32, 2, HALF + WEIGHT),
    "gemv_nf4": Peer(
        "kgemm_4bit_inference_naiveI13__nv_bfloat16Li128ELi16E", 128, 4096 // 32, WEIGHT, 32
    ),
    "adamw_8bit": Peer("kOptimizerStatic8bit2StateBlockwiseIfLi0ELi256ELi1E", 256, 1, ADAMW_BYTES),
    "gemv_nf4_double_quant": Peer(
        "gemm_4bit_simtI13__nv_bfloat16Li1EE", 128, 4096 // 32, WEIGHT_DOUBLE_QUANT, 32
    ),
    # 32 or 64 tokens by 64 rows by 128 weights of each row. The binary does not give their dynamic
    # shared memory, so the occupancy leaves it out.
    "matmul_nf4": Peer(
        "gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li32ELi64ELi128EE",
        256,
        1024,
        WEIGHT_DOUBLE_QUANT,
        32,
    ),
    "matmul_nf4_64_tokens": Peer(
        "gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li64ELi64ELi128EE",
        256,
        1024,
        WEIGHT_DOUBLE_QUANT,
        32,
    ),
}


def compiled(job: Job, target: str) -> tuple[Launch, int]:
    """Return a job's launch with the largest grid, and its trip. Raises ValueError without one."""
    with imaginary_gpu(target) as launches:
        job.launch()
        trip = job.trip()
    if not launches:
        raise ValueError(
            f"need a Triton launch to count, got none for {target}: the launcher used no kernel"
        )
    return max(launches, key=lambda launch: math.prod(launch.grid)), trip


def rows(targets: Iterable[str], names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Return a row for each of our kernels (all, or `names`) and each NVIDIA target."""
    todo, found = jobs(), []
    for name in todo if names is None else names:
        job = todo[name]
        for target in targets:
            if name.startswith("matmul") and (target == "sm_75" or nf4_matmul.OLD):
                print(
                    f"{name} on {target}: NOT COUNTED, it is used neither on sm_75 nor with a "
                    "Triton before 3.7"
                )
                continue
            launch, trip = compiled(job, target)
            counts = count(launch.binary)
            threads = launch.metadata.num_warps * 32
            if counts.loop.instructions and not trip:
                raise ValueError(
                    f"{name} on {target} has a loop: its job in jobs() needs `trip`, the elements "
                    "of one trip"
                )
            per_thread = job.elements / math.prod(launch.grid) / threads
            found.append(
                {"kernel": name, "target": target}
                | figures(counts, per_thread, trip / threads)
                | resources(counts, target, launch.metadata.shared, threads)
                | {"bytes_per_element": job.bytes}
            )
            pipes = found[-1]["pipes"]
            found[-1]["lsu_ideal"] = pipes["lsu"]
            if triton.__version__.startswith(EXECUTED_WITH):
                pipes["lsu"] = executed(name, target)["lsu_cycles"]
    return found


def bitsandbytes_rows(
    targets: Iterable[str], names: Iterable[str] = tuple(BITSANDBYTES)
) -> list[dict[str, Any]]:
    """Return such rows for bitsandbytes' kernels.

    A target that the installed wheel does not support is left out with a message.
    """
    found = []
    for target in targets:
        binary = _wheel_cubin(target)
        if binary is None:
            print(
                f"bitsandbytes on {target}: NOT COUNTED, "
                "not installed or without machine code for it"
            )
            continue
        for name in names:
            peer = BITSANDBYTES[name]
            counts = count(binary, peer.pattern, through="LDG.*128" if peer.trip else None)
            if peer.trip and not counts.loop.loads:
                continue  # an empty kernel: this card does not support its size
            found.append(
                {"kernel": name, "target": target}
                | figures(counts, peer.elements, peer.trip)
                | resources(counts, target, 0, peer.threads)
                | {"bytes_per_element": peer.bytes}
            )
    return found


def _wheel_cubin(target: str) -> bytes | None:
    """Return machine code with all of BITSANDBYTES, from the library for the newest CUDA."""
    spec = find_spec("bitsandbytes")
    if not spec or not spec.origin:
        return None
    libraries = Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so")
    for library in sorted(libraries, reverse=True):
        for binary in cubins(library, target):
            names = "\n".join(functions(binary))
            if all(re.search(peer.pattern, names) for peer in BITSANDBYTES.values()):
                return binary
    return None


def figures(counts: Counts, elements: float, trip: float) -> dict[str, Any]:
    """Return counts per element.

    A thread handles `elements`, of which `trip` in each trip of its loop (0: it has no loop).
    """
    looped = bool(trip and counts.loop.instructions)
    hot, handled = (counts.loop, trip) if looped else (counts.path, elements)
    again = (elements / trip - 1) * counts.loop.instructions if looped else 0
    return {
        "instructions_per_element": hot.instructions / handled,
        "whole": (counts.path.instructions + again) / elements,
        "loads": hot.loads,
        "stores": counts.path.stores,
        "load_bits": max(hot.loads, default=0),
        "store_bits": min(counts.path.stores, default=0),
        "pipes": {"issue": hot.instructions / handled}
        | {k: v / handled for k, v in hot.pipes.items()},
    }


def resources(counts: Counts, target: str, dynamic_shared: int, threads: int) -> dict[str, Any]:
    """Return registers and spills of a thread, shared bytes of a block, and occupancy."""
    shared = counts.shared_bytes + dynamic_shared
    return {
        "registers": counts.registers,
        "spills": counts.spills,
        "shared_bytes": shared,
        "threads": threads,
        "occupancy": occupancy(target, counts.registers, shared, threads),
    }


def estimates(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bounds of roofline.py for a layer of 4096 x 14336, on every counted card."""
    results = []
    for row in found:
        per_scale = row["kernel"] in ("double_quantize_nf4", "dequantize_absmax")
        elements = LAYER // BLOCKSIZE if per_scale else LAYER
        for name, card in CARDS.items():
            if card.target == row["target"]:
                times = bounds(card, elements, row["bytes_per_element"], row["pipes"])
                busiest, share = pressure(times)
                result = {
                    "kernel": row["kernel"],
                    "card": name,
                    "microseconds": max(times.values()),
                    "binds": binding(times),
                    "busiest": busiest,
                    "of_dram": share,
                }
                results.append(result)
    return results


def three_launches(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bounds of bitsandbytes' double dequantise, which takes three launches.

    They dequantise absmax, add the mean, and dequantise the weights.
    """
    parts = {(result["kernel"], result["card"]): result["microseconds"] for result in found}
    results = []
    for result in found:
        if result["kernel"] == "dequantize_nf4":
            card = result["card"]
            # The addition reads and writes fp32.
            add = bounds(CARDS[card], LAYER // BLOCKSIZE, 4 + 4, {})["DRAM"]
            whole = result["microseconds"] + parts["dequantize_absmax", card] + add
            results.append(
                result | {"kernel": "dequantize_nf4_double_quant", "microseconds": whole}
            )
    return results


def print_rows(title: str, found: list[dict[str, Any]]) -> None:
    """Print a table of counts."""
    print(f"\n{title}")
    print(f"{'kernel':38}{'target':8}{'instr/elem':>10}{'whole':>7}", end="")
    print(f"  {'loads':18}{'stores':12}", end="")
    print(f"{'registers':>9}{'spills':>7}{'shared':>7}{'occupancy':>10}")
    for row in found:
        line = f"{row['kernel']:38}{row['target']:8}"
        line += f"{row['instructions_per_element']:10.2f}{row['whole']:7.2f}"
        line += f"  {_accesses(row['loads']):18}{_accesses(row['stores']):12}"
        line += f"{row['registers']:9}{row['spills']:7}{row['shared_bytes']:7}"
        print(f"{line}{row['occupancy']:10.0%}")


def _accesses(counts: dict[int, int]) -> str:
    """Return the accesses of each width as text: 8x2 32x1."""
    return " ".join(f"{width}x{number}" for width, number in sorted(counts.items()))


def print_estimates(title: str, found: list[dict[str, Any]]) -> None:
    """Print a table of bounds with a column for each card.

    A cell has microseconds, and the busiest other resource with its share of DRAM's time.
    """
    cells: dict[str, dict[str, str]] = {}  # kernel -> card -> cell
    for result in found:
        cell = f"{result['microseconds']:.4g} {result['busiest']:>5} {result['of_dram']:.2f}"
        cells.setdefault(result["kernel"], {})[result["card"]] = cell
    counted = {result["card"] for result in found}
    names = [name for name in CARDS if name in counted]
    print(f"\n{title}\n{'kernel':38}" + "".join(f"{name:>17}" for name in names))
    for kernel, cell_of in cells.items():
        # Not every kernel runs on every card.
        line = "".join(f"{cell_of.get(name, '-'):>17}" for name in names)
        print(f"{kernel:38}{line}")


def main() -> None:
    """Print the versions, the tables and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets",
        default=",".join((*SM_LIMITS, *AMD)),
        help="sm_NN or gfxNNN, separated by commas",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the last line to this file"
    )
    args = parser.parse_args()
    targets = args.targets.split(",")
    known = (*SM_LIMITS, *AMD)
    unknown = [target for target in targets if target not in known]
    if unknown:
        parser.error(f"--targets: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    nvidia = [target for target in targets if target.startswith("sm_")]
    amd = [target for target in targets if target.startswith("gfx")]

    print(f"triton: {triton.__version__}\ntargets: {' '.join(targets)}")
    print("compiled and counted; nothing ran on a GPU")
    ours, theirs = rows(nvidia), bitsandbytes_rows(nvidia)
    ours_us, theirs_us = estimates(ours), estimates(theirs)
    theirs_us += three_launches(theirs_us)
    for name, job in jobs().items():
        for target in amd:
            print(f"{name} on {target}: {compiled(job, target)[0].name} compiles: yes")
    for title, counted, bound in (("minilora", ours, ours_us), ("bitsandbytes", theirs, theirs_us)):
        if counted:
            print_rows(f"{title}: machine code", counted)
            print_estimates(
                f"{title}: model, 4096 x 14336, us at least; busiest of the rest / DRAM", bound
            )

    document = {
        "benchmark": "kernel_report",
        "triton": triton.__version__,
        "rows": ours,
        "bitsandbytes": theirs,
    }
    text = json.dumps(document | {"roofline": ours_us, "bitsandbytes_roofline": theirs_us})
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
