"""The NF4 kernels on a GPU (CUDA or ROCm): first checked, then timed with torch and bitsandbytes.

    python benchmarks/gpu_kernels/kernel_bench.py [--models Llama-3-8B,SmolLM2-135M]
        [--rounds 21] [--plot roofline.png] [--tune] [--form] [--check]

    --tune     times other tiles and prints entries for launch.TILES
    --form     prints the last line as a block to send back: docs/gpu.md
    --check    only checks the kernels; TRITON_INTERPRET=1 does this without a GPU

Every kernel must pass kernel_check.py; otherwise the script stops with exit status 1. The table has
a row for each job and layer: our median time, the bytes that must move a second (inputs and
results; data that passes between two launches is not counted), their share of the rate of copying
on this card, and the time of the others divided by ours:

    eager, compile    the same job in plain torch, and that compiled by torch.compile
    bitsandbytes      dequantize_4bit, quantize_4bit, and matmul_4bit, which its Linear4bit calls
    gemv_4bit         bitsandbytes' older GEMV
    dequantised       for 16 tokens: W by our kernel, then F.linear; no kernel for few tokens
    dense             for the products: F.linear with a bf16 weight, 3.9 times the bytes

Then SmolLM2 decodes one token at a time, with the GEMV kernel and without it, with a CUDA graph and
without one. The last line is one JSON document. Weights are bf16, N(0, 0.02), in blocks of 64.
Buffers are used in turn, so that no cache holds them (bench_timing.py).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.bench_timing import (
    MODELS,
    Clock,
    CpuClock,
    GpuClock,
    card,
    copy_gb_per_s,
    measure,
    shapes_of,
)
from benchmarks.gpu_kernels.bench_form import form
from benchmarks.gpu_kernels.check_parts import Mismatch
from benchmarks.gpu_kernels.kernel_check import check_all
from benchmarks.gpu_kernels.kernel_jobs import OURS, PEERS, PRODUCTS, Job, jobs
from benchmarks.gpu_kernels.kernel_tune import tune
from minilora_kernels.backend import path_for
from minilora_kernels.triton import launch

NO_GPU = """no GPU here: nothing was run, and nothing is known about speed. Without a GPU you can
  check the kernels (exit status 0: they are right):
      TRITON_INTERPRET=1 python benchmarks/gpu_kernels/kernel_bench.py --check
  count the instructions of the compiled kernels:
      python benchmarks/gpu_model/kernel_report.py
  try this script (the figures are the CPU's):
      python benchmarks/gpu_kernels/kernel_bench.py --device cpu"""
NOT_A_GPU = "CPU ONLY: these figures are the CPU's, on toy layers. They prove nothing about a GPU"
DRAWN = (OURS, "bitsandbytes")  # in the roofline
COLUMNS = ("eager", "compile", "bitsandbytes", "gemv_4bit", "dequantised", "dense")
CAPTURED = 3  # new tokens until a step has been captured and replayed once


# ---- the table


def row_of(
    job: Job, shape: tuple[int, int], models: Sequence[str], clock: Clock, rounds: int
) -> dict[str, Any]:
    """Compare every contender's values or packed codes with ours, then time all contenders.

    Raises Mismatch where the bits of plain torch differ from ours. Second-level codes are not
    compared, because bitsandbytes takes another mean; kernel_check.py compares ours with the
    reference.
    """
    results: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for name, call in job.calls.items():
        try:
            results[name] = call(0).clone()
        except RuntimeError as error:
            if name == OURS:
                raise
            missing[name] = shorten(str(error), 150) or type(error).__name__
    differs = {name: difference(result, results[OURS]) for name, result in results.items()}
    if job.name not in PRODUCTS and differs.get("eager"):
        raise Mismatch(
            f"{job.name}, {shape}: plain torch and our kernel have different results on this device"
        )
    times = measure(clock, {name: job.calls[name] for name in results}, rounds)
    us = {name: statistics.median(found) for name, found in times.items()}
    return {
        "job": job.name,
        "shape": shape,
        "models": models,
        "bytes": job.bytes,
        "operations": job.operations,
        "gb_per_s": job.bytes / us[OURS] / 1e3,
        "us": us,
        "us_min": {name: min(found) for name, found in times.items()},
        "ratio": {name: us[name] / us[OURS] for name in us},
        "differs": differs,
        "missing": missing,
    }


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the difference of two results; 0 if they are equal.

    For codes it is the share of bytes that differ, for numbers the largest difference divided by
    the largest number.
    """
    if got.dtype == torch.uint8:
        return (got != expected).double().mean().item()
    error = (got.double() - expected.double()).abs().max()
    return (error / expected.double().abs().max()).item()


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table, then the contenders that are missing or have other numbers."""
    out, inner = row["shape"]
    line = f"{row['job']:20}{f'{out} x {inner}':>14}{row['us'][OURS]:10.1f}"
    line += f"{row['gb_per_s']:8.0f}{row['of_copy']:7.0%} "
    for name in COLUMNS:
        if name in row["ratio"]:
            line += f"{row['ratio'][name]:13.2f}"
        else:
            line += f"{'-':>13}"
    print(line)
    for name, reason in row["missing"].items():
        print(f"    {name} NOT TIMED: {reason}")
    # In a product the others round W to bf16 and add up in another order.
    limit = 0.02 if row["job"] in PRODUCTS else 0
    different = []
    for name, share in row["differs"].items():
        if not share <= limit:  # also true for NaN
            different.append(f"{name} ({share:.1g})")
    if different:
        print(f"    other numbers than ours: {', '.join(different)}")


def peers_here(asked: Sequence[str], device: torch.device) -> list[str]:
    """Return `asked` without bitsandbytes where it cannot run; print the reason."""
    if "bitsandbytes" not in asked:
        return list(asked)
    reason = None
    if not find_spec("bitsandbytes"):
        reason = "not installed"
    elif device.type == "cuda":
        from bitsandbytes.cextension import lib

        if not getattr(lib, "compiled_with_cuda", False):
            reason = "its library for this GPU did not load"
    if reason is None:
        return list(asked)
    print(f"bitsandbytes NOT TIMED: {reason}")
    return [name for name in asked if name != "bitsandbytes"]


# ---- decoding


@contextmanager
def dense_weights() -> Iterator[None]:
    """Let NF4Linear dequantise and multiply inside the context, as without a GEMV kernel."""
    from minilora.quant.nf4_linear import NF4Linear

    forward = NF4Linear.forward
    NF4Linear.forward = lambda self, x: F.linear(x, self.dequantize(x.dtype), self.bias)
    try:
        yield
    finally:
        NF4Linear.forward = forward


def decode(device: torch.device, tokens: int) -> dict[str, Any]:
    """Return tokens a second of SmolLM2-135M, greedy, one row.

    The models are 4-bit with our GEMV, 4-bit through dense weights, and bf16. On a GPU each runs
    twice: started by Python and as a CUDA graph. The time to read the prompt and to capture the
    graph is not counted.
    """
    import minilora as ml
    from minilora.generation.generate import generate_ids
    from minilora.generation.sampling import Decoding

    try:
        source = ml.samples.smollm2()
        prompt = ml.load_tokenizer(source).encode("The capital of France is")
        models = {
            kind: ml.load_model(source, quantize=kind, dtype="bfloat16", device=device)
            for kind in ("nf4", None)
        }
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"\ndecoding NOT TIMED: SmolLM2 cannot be loaded: {error}")
        return {"skipped": str(error)}

    def seconds(kind: str | None, graph: bool, count: int) -> float:
        start = time.perf_counter()
        # The result is a list of ids, so the GPU has finished.
        generate_ids(models[kind], [prompt], Decoding(count, cuda_graph=graph))
        return time.perf_counter() - start

    def rates(name: str, kind: str | None) -> dict[str, float]:
        found = {}
        for graph in (False, True) if device.type == "cuda" else (False,):
            seconds(kind, graph, CAPTURED)  # warm up
            times = [
                seconds(kind, graph, CAPTURED + tokens) - seconds(kind, graph, CAPTURED)
                for _ in range(3)
            ]
            label = f"{name}, graph" if graph else name
            found[label] = tokens / statistics.median(times)
        return found

    speeds = rates("nf4", "nf4") | rates("bf16", None)
    with dense_weights():
        speeds |= rates("nf4, dense weights", "nf4")
    print(f"\ndecoding, SmolLM2-135M, {tokens} tokens one by one, ", end="")
    print(f"NF4 path {path_for(device)!r}: tokens a second")
    for name, speed in speeds.items():
        print(f"  {name:26}{speed:8.1f}")
    if device.type != "cuda":
        print("CUDA graphs NOT TIMED: they need a GPU")
        return {"path": path_for(device), "tokens": tokens} | speeds
    capturing = seconds("nf4", True, CAPTURED) - seconds("nf4", False, CAPTURED)
    print(f"  capturing a graph takes {1e3 * capturing:.0f} ms")
    return {"path": path_for(device), "tokens": tokens, "capturing_s": capturing} | speeds


# ---- the script


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cuda is also the name for ROCm"
    )
    parser.add_argument(
        "--models", help=f"names from {','.join(MODELS)}; default: all but tiny, on a CPU only tiny"
    )
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="peers to compare with, default all; '' for none"
    )
    parser.add_argument(
        "--rounds", type=int, default=21, help="number of batches; times are their medians"
    )
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens to decode; 0: do not decode"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline, .png or .svg")
    parser.add_argument(
        "--form", action="store_true", help="print the results as a block to send back: docs/gpu.md"
    )
    parser.add_argument("--check", action="store_true", help="check the kernels and stop")
    parser.add_argument("--tune", action="store_true", help="check and time other tiles and stop")
    args = parser.parse_args(argv)
    args.peers = [name for name in args.peers.split(",") if name]
    unknown = sorted(set(args.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers: expected names from {', '.join(PEERS)}, got {', '.join(unknown)}")
    if args.tune and args.device == "cpu":
        parser.error("--tune: expected --device cuda: times on a CPU do not apply to a GPU's tiles")
    if args.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {args.rounds}")
    default = ["tiny"] if args.device == "cpu" else [name for name in MODELS if name != "tiny"]
    try:
        args.shapes = shapes_of(args.models.split(",") if args.models else default)
    except ValueError as error:
        parser.error(str(error))
    return args


def checked(device: torch.device) -> list[str]:
    """Check the kernels and return their names; none on a CPU without Triton. Raises Mismatch."""
    if device.type == "cpu" and not launch.interpreted():
        print("Triton's kernels NOT CHECKED: this needs a GPU, or TRITON_INTERPRET=1")
        return []
    names = check_all(device)
    print(f"checked against the reference on {device.type}, all correct: {', '.join(names)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Print the card, check the kernels, print the table and the JSON."""
    args = arguments(argv)
    if launch.interpreted() and args.check:
        args.device = "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        if args.check:
            raise SystemExit("nothing was checked")
        print(json.dumps({"benchmark": "kernel_bench", "device": None, "rows": []}))
        return
    if args.device == "cuda" and launch.interpreted():
        raise SystemExit(
            "TRITON_INTERPRET=1 makes Triton run on the CPU; unset it to time a GPU, or add --check"
        )
    device = torch.device(args.device)
    document: dict[str, Any] = {"benchmark": "kernel_bench", **card(device)}
    for name, value in document.items():
        print(f"{name}: {value}")
    try:
        document["checked"] = checked(device)
        if args.check and not document["checked"]:
            raise SystemExit("nothing was checked")
        if not args.check:
            with torch.no_grad():
                document |= timed(args, device)
    except Mismatch as error:
        raise SystemExit(f"a kernel is wrong, so nothing is timed: {error}") from None
    print(form(document) if args.form else json.dumps(document))


def timed(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run the parts that measure time; return their results."""
    if device.type == "cpu":
        print(NOT_A_GPU)
    clock: Clock = GpuClock(device) if device.type == "cuda" else CpuClock()
    ceiling = copy_gb_per_s(clock, args.rounds)
    print(f"copying gives {ceiling:.0f} GB/s, read and written")
    if args.tune:
        return {"copy_gb_per_s": ceiling, "tiles": tune(device, clock, args.rounds)}
    peers = peers_here(args.peers, device)
    rows: list[dict[str, Any]] = []
    print(f"\n{'':58}the others' time / ours")
    columns = "".join(f"{name:>13}" for name in COLUMNS)
    print(f"{'job':20}{'out x in':>14}{'us':>10}{'GB/s':>8}{'copy':>6}  {columns}")
    for shape, models in args.shapes.items():
        for job in jobs(shape, device, clock, peers):
            row = row_of(job, shape, models, clock, args.rounds)
            rows.append(row | {"of_copy": row["gb_per_s"] / ceiling})
            print_row(rows[-1])
    if args.plot:
        from minilora.tools.plot import roofline

        drawn = []
        for row in rows:
            times = {name: us for name, us in row["us"].items() if name in DRAWN}
            drawn.append(row | {"us": times})
        title = f"NF4 kernels on {card(device)['device']}; a point a layer"
        roofline(drawn, ceiling, None, title, args.plot)
        print(f"\nroofline: {args.plot}")
    decoded = decode(device, args.tokens) if args.tokens else {"skipped": "--tokens 0"}
    if device.type == "cpu":
        print(NOT_A_GPU)
    return {"copy_gb_per_s": ceiling, "rows": rows, "decode": decoded}


if __name__ == "__main__":
    main()
