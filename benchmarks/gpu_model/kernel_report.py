"""The kernels' machine code, ours and bitsandbytes', counted without a GPU, and what it means on eight cards.

    python benchmarks/gpu_model/kernel_report.py [--targets sm_80,sm_86,gfx942] [--json FILE]

Ours are compiled by calling the library's own launchers on CPU tensors inside `imaginary_gpu`:
bf16, 4096 x 4096 (the small GEMV 1536 x 576), blocks of 64, few tokens 16 or 64; cross-entropy on
512 x 131072 logits, AdamW and a layer's steps on 4096 x 4096 values (report_jobs.py). If a launcher
starts several kernels, the one with the largest grid is counted. bitsandbytes' are taken out of the
installed wheel. Figures are those of a thread with full work (sass.py):

    instr/elem      instructions per weight (logit, parameter, value); of a kernel with loops those inside them
    whole           the same with what stands around the loops: in a GEMV at an inner size of 4096 (small: 576)
    loads, stores   of global memory, bits x how many (with loops their loads); the LUT's and the scales' included
    occupancy       warps that fit on an SM at a time, by registers, shared bytes and threads, of the most it can hold

In the JSON, `load_bits` is the widest of the loads and `store_bits` the narrowest of the stores, 0
if none is on the way; a quantiser's fp32 absmax keeps the latter at 32 or below. The roofline is
roofline.py's model on these counts: estimates, nothing measured. AMD's targets are compiled, not
counted. The last line of stdout is one JSON document.
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

sys.path.append(
    str(Path(__file__).resolve().parents[2])
)  # the root: benchmarks are imported by their full names

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

AMD = ("gfx942", "gfx1100")
LAYER = 4096 * 14336  # weights, in the roofline


@dataclass(frozen=True)
class Peer:
    """One of bitsandbytes' kernels: the names and numbers are its source's (csrc), where they are no parameters."""

    pattern: str  # in the mangled name
    threads: int  # per block
    elements: int  # per thread
    bytes: float  # as in Job
    trip: int = (
        0  # elements that a thread handles in one trip of its loop; 0: the loop, if any, runs once
    )


# mangled: <__nv_bfloat16, tile 512, 64 threads, 8 bytes a thread, 2 = NF4>; the GEMVs give one warp
# a row
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
    # 32 or 64 tokens by 64 rows by 128 weights of each. Their dynamic shared memory is not in the
    # binary: the occupancy is one without
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
    """The launch with the largest grid among those of a job, and the job's trip. Raises ValueError if there is none."""
    with imaginary_gpu(target) as launches:
        job.launch()
        trip = job.trip()
    if not launches:
        raise ValueError(
            f"need a Triton launch to count, got none for {target}: the launcher ran something else"
        )
    return max(launches, key=lambda launch: math.prod(launch.grid)), trip


def rows(targets: Iterable[str], names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One row a kernel of ours (all, or those named) and NVIDIA target; the keys are those of `figures`."""
    todo, found = jobs(), []
    for name in todo if names is None else names:
        job = todo[name]
        for target in targets:
            if name.startswith("matmul") and (target == "sm_75" or nf4_matmul.OLD):
                print(
                    f"{name} on {target}: NOT COUNTED, it is not used on sm_75, nor with a Triton before 3.7"
                )
                continue
            launch, trip = compiled(job, target)
            counts, threads = count(launch.binary), launch.metadata.num_warps * 32
            if counts.loop.instructions and not trip:
                raise ValueError(
                    f"{name} on {target} has a loop: say in jobs() how many elements one trip handles"
                )
            per_thread = job.elements / math.prod(launch.grid) / threads
            found.append(
                {"kernel": name, "target": target}
                | figures(counts, per_thread, trip / threads)
                | resources(counts, target, launch.metadata.shared, threads)
                | {"bytes_per_element": job.bytes}
            )
    return found


def bitsandbytes_rows(
    targets: Iterable[str], names: Iterable[str] = tuple(BITSANDBYTES)
) -> list[dict[str, Any]]:
    """The same of bitsandbytes' kernels. A target for which the installed wheel has none is announced and left out."""
    found = []
    for target in targets:
        binary = _wheel_cubin(target)
        if binary is None:
            print(
                f"bitsandbytes on {target}: NOT COUNTED, not installed or without machine code for it"
            )
            continue
        for name in names:
            peer = BITSANDBYTES[name]
            counts = count(binary, peer.pattern, through="LDG.*128" if peer.trip else None)
            if peer.trip and not counts.loop.loads:
                continue  # an empty kernel, of a size that this card does not take
            found.append(
                {"kernel": name, "target": target}
                | figures(counts, peer.elements, peer.trip)
                | resources(counts, target, 0, peer.threads)
                | {"bytes_per_element": peer.bytes}
            )
    return found


def _wheel_cubin(target: str) -> bytes | None:
    """Machine code with all of BITSANDBYTES, out of the library for the newest CUDA that has it."""
    spec = find_spec("bitsandbytes")
    libraries = (
        Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so") if spec and spec.origin else ()
    )
    for library in sorted(libraries, reverse=True):
        for binary in cubins(library, target):
            names = "\n".join(functions(binary))
            if all(re.search(peer.pattern, names) for peer in BITSANDBYTES.values()):
                return binary
    return None


def figures(counts: Counts, elements: float, trip: float) -> dict[str, Any]:
    """Counts per element, of `elements` that a thread handles, `trip` in each trip of the loop (0: it has no loop)."""
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
    """What a kernel occupies: registers and spills a thread, shared bytes a block, occupancy."""
    shared = counts.shared_bytes + dynamic_shared
    return {
        "registers": counts.registers,
        "spills": counts.spills,
        "shared_bytes": shared,
        "threads": threads,
        "occupancy": occupancy(target, counts.registers, shared, threads),
    }


def estimates(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """roofline.py's bounds for a layer of 4096 x 14336, on every card whose target was counted."""
    results = []
    for row in found:
        elements = (
            LAYER // BLOCKSIZE
            if row["kernel"] in ("double_quantize_nf4", "dequantize_absmax")
            else LAYER
        )
        for name, card in CARDS.items():
            if card.target == row["target"]:
                times = bounds(card, elements, row["bytes_per_element"], row["pipes"])
                busiest, share = pressure(times)
                result = {
                    "kernel": row["kernel"],
                    "card": name,
                    "microseconds": max(times.values()),
                }
                results.append(
                    result | {"binds": binding(times), "busiest": busiest, "of_dram": share}
                )
    return results


def three_launches(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bounds of bitsandbytes' double dequantise: absmax out of its codes, plus the mean, then the weights, in turn."""
    parts = {(result["kernel"], result["card"]): result["microseconds"] for result in found}
    results = []
    for result in found:
        if result["kernel"] == "dequantize_nf4":
            add = bounds(CARDS[result["card"]], LAYER // BLOCKSIZE, 4 + 4, {})[
                "DRAM"
            ]  # fp32 read, fp32 written
            whole = result["microseconds"] + parts["dequantize_absmax", result["card"]] + add
            results.append(
                result | {"kernel": "dequantize_nf4_double_quant", "microseconds": whole}
            )
    return results


def print_rows(title: str, found: list[dict[str, Any]]) -> None:
    """Table of counts."""
    print(
        f"\n{title}\n{'kernel':38}{'target':8}{'instr/elem':>10}{'whole':>7}  {'loads':18}{'stores':12}",
        end="",
    )
    print(f"{'registers':>9}{'spills':>7}{'shared':>7}{'occupancy':>10}")
    for row in found:
        loads, stores = (
            " ".join(f"{b}x{n}" for b, n in sorted(row[key].items())) for key in ("loads", "stores")
        )
        print(
            f"{row['kernel']:38}{row['target']:8}{row['instructions_per_element']:10.2f}{row['whole']:7.2f}",
            end="",
        )
        print(
            f"  {loads:18}{stores:12}{row['registers']:9}{row['spills']:7}{row['shared_bytes']:7}",
            end="",
        )
        print(f"{row['occupancy']:10.0%}")


def print_estimates(title: str, found: list[dict[str, Any]]) -> None:
    """Table of bounds, a column a card: microseconds, and the busiest other resource's share of DRAM's time."""
    names = [name for name in CARDS if any(result["card"] == name for result in found)]
    print(f"\n{title}\n{'kernel':38}" + "".join(f"{name:>17}" for name in names))
    for kernel in dict.fromkeys(result["kernel"] for result in found):
        of = {result["card"]: result for result in found if result["kernel"] == kernel}
        shown = {
            n: f"{of[n]['microseconds']:.4g} {of[n]['busiest']:>5} {of[n]['of_dram']:.2f}"
            for n in of
        }
        cells = (shown.get(n, "-") for n in names)  # not every kernel is for every card
        print(f"{kernel:38}" + "".join(f"{cell:>17}" for cell in cells))


def main() -> None:
    """The card, the tables, the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", default=",".join((*SM_LIMITS, *AMD)), help="sm_NN or gfxNNN, with commas"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line there too")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := [t for t in targets if t not in (*SM_LIMITS, *AMD)]:
        parser.error(
            f"--targets: expected some of {', '.join((*SM_LIMITS, *AMD))}, got {', '.join(unknown)}"
        )
    nvidia, amd = ([t for t in targets if t.startswith(prefix)] for prefix in ("sm_", "gfx"))

    print(
        f"triton: {triton.__version__}\ntargets: {' '.join(targets)}\ncompiled and counted; nothing ran on a GPU"
    )
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
