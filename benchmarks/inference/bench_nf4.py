"""NF4 on the CPU, against bitsandbytes: equal bits first, then times, in turns in one run.

    python benchmarks/inference/bench_nf4.py [--threads 2] [--rounds 21] [--dtype auto]
        [--only token]

"new" returns a new tensor, as both public functions do. "out=" writes to a given tensor, which
bitsandbytes' public function does not support on a CPU; one contender therefore calls bitsandbytes'
C function directly. The ceiling is a copy of the result's bytes to a given tensor. "one token" and
"8 tokens" go through a 4-bit layer without gradients: ours and bitsandbytes' Linear4bit, which
eval() repacks for its fused product; a dense layer is timed for comparison. All compute in bf16, or
in fp32 on a CPU without it. On a busy machine only the ratios are useful, and even these favour
code with few parallel regions: look at the load average. Without bitsandbytes the bits are compared
with the reference. The run takes half a minute. The last line is one JSON document.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import (
    DTYPES,
    add_dtype,
    compute_dtype,
    dtype_name,
    machine,
    missing_peers,
)
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from minilora_kernels.c import nf4
from minilora_kernels.nf4 import reference

SHAPES = ((4096, 4096), (1536, 576))
SHORT = ((512, 512), (192, 64))
COPY = "copy, out="


def contenders(x: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """Return the calls of each job by contender, bitsandbytes' public function first if installed.

    Raises AssertionError unless all contenders agree.
    """
    kept = torch.empty_like(x)
    weight = quantize_nf4(x, double_quant=False)
    weight2 = quantize_nf4(x)
    theirs: dict[str, dict[str, Callable[[], object]]] = {}
    if missing_peers("bitsandbytes"):
        reference.dequantize(weight.packed, weight.absmax, weight.blocksize, kept)
        expected, expected2 = kept.clone(), torch.empty_like(x)
        reference.dequantize(weight2.packed, weight2.absmax, weight2.blocksize, expected2)
    else:
        weight2, expected, expected2, theirs = peers(x, weight, kept)
    assert torch.equal(dequantize_nf4(weight), expected)
    assert torch.equal(dequantize_nf4(weight, out=kept), expected)
    assert torch.equal(dequantize_nf4(weight2), expected2)

    source = x.clone()
    jobs: dict[str, dict[str, Callable[[], object]]] = {
        "quantise": {"minilora": lambda: quantize_nf4(x, double_quant=False)},
        "quantise, double": {"minilora": lambda: quantize_nf4(x)},
        "dequantise": {
            "minilora, new": lambda: dequantize_nf4(weight),
            "minilora, out=": lambda: dequantize_nf4(weight, out=kept),
            COPY: lambda: kept.copy_(source),
        },
        "dequantise, double": {
            "minilora, new": lambda: dequantize_nf4(weight2),
            "minilora, out=": lambda: dequantize_nf4(weight2, out=kept),
            COPY: lambda: kept.copy_(source),
        },
    }
    return {job: theirs.get(job, {}) | calls for job, calls in jobs.items()}


def peers(
    x: torch.Tensor, weight: NF4Weight, kept: torch.Tensor
) -> tuple[NF4Weight, torch.Tensor, torch.Tensor, Any]:
    """Return bitsandbytes' double-quantised weight, two dequantised weights, and its calls.

    The dequantised weights are those of plain and of double quantisation.
    """
    import bitsandbytes.functional as bnb
    from bitsandbytes.cextension import lib

    plain: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    nested: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    packed, state = bnb.quantize_4bit(x, **plain)
    packed2, state2 = bnb.quantize_4bit(x, **nested)
    stored = {f"w.{key}": value for key, value in state2.as_dict(True).items()}
    weight2 = NF4Weight.from_state_dict({"w": packed2} | stored, "w")
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(weight.packed, packed.view(-1)) and torch.equal(weight.absmax, state.absmax)
    assert torch.equal(quantize_nf4(x).packed, packed2.view(-1))

    jobs: dict[str, dict[str, Callable[[], object]]] = {
        "quantise": {"bitsandbytes": lambda: bnb.quantize_4bit(x, **plain)},
        "quantise, double": {"bitsandbytes": lambda: bnb.quantize_4bit(x, **nested)},
        "dequantise": {"bitsandbytes, new": lambda: bnb.dequantize_4bit(packed, state)},
        "dequantise, double": {"bitsandbytes, new": lambda: bnb.dequantize_4bit(packed2, state2)},
    }
    suffix = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[x.dtype]
    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{suffix}", None)
    if function:
        sizes = [ctypes.c_longlong(n) for n in (64, *x.shape)]
        pointers = [bnb.get_ptr(t) for t in (packed, state.absmax, kept)]

        def dequantize() -> None:
            function(*pointers, *sizes)

        jobs["dequantise"]["bitsandbytes' C, out="] = dequantize
        dequantize()
        assert torch.equal(kept, expected)
    return weight2, expected, bnb.dequantize_4bit(packed2, state2), jobs


def layers(x: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """Return the calls of jobs with x as the weight of a layer, with double quantisation."""
    dense = nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=x.dtype)
    dense.weight.data = x
    ours = NF4Linear.from_linear(dense)
    named: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if not missing_peers("bitsandbytes"):
        named["bitsandbytes"] = peer_layer(x)
    named |= {"minilora": ours, "minilora, in generate": ours.for_tokens(), "dense": dense}
    nf4.ready()
    jobs: dict[str, dict[str, Callable[[], object]]] = {}
    for name, count in {"one token": 1, "8 tokens": 8}.items():
        generator = torch.Generator().manual_seed(1)
        t = torch.randn(1, count, x.shape[1], generator=generator).to(x.dtype)
        jobs[name] = {side: partial(layer, t) for side, layer in named.items()}
        expected = F.linear(t, ours.dequantize(x.dtype)).float()
        for side in named.keys() - {"dense"}:
            error = (named[side](t).float() - expected).norm() / expected.norm()
            assert error < 0.01, f"{side} is off by {error:.1%}"
    return jobs


def peer_layer(x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    import bitsandbytes

    peer: Any = bitsandbytes.nn
    layer = peer.Linear4bit(
        x.shape[1], x.shape[0], bias=False, compute_dtype=x.dtype, quant_type="nf4"
    )
    layer.weight = peer.Params4bit(x, requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of each contender, in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--short", action="store_true", help="small matrices, one round")
    add_dtype(parser, (*DTYPES, "float16"))
    parser.add_argument("--only", default="", help="only jobs with this text in their name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    dtype = compute_dtype(args.dtype)
    card = machine(dtype)
    missing = missing_peers("bitsandbytes")
    if missing:
        print(f"minilora alone: {missing}")
    rows = []
    for shape in SHORT if args.short else SHAPES:
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        for job, calls in (contenders(x) | layers(x)).items():
            if args.only not in job:
                continue
            rounds = args.rounds if x.numel() > 1 << 22 else 5 * args.rounds
            times = measure(calls, 1 if args.short else rounds)
            # bitsandbytes' public function, or ours where bitsandbytes is not installed
            first = next(iter(times.values()))
            ceiling = statistics.median(times[COPY]) if COPY in times else None
            size = f"{x.nbytes / 2**20:.1f} MiB {dtype_name(dtype)}"
            print(f"\n{job}, {shape[0]} x {shape[1]}: {size}; checked")
            print(f"{'':24}{'median ms':>10}{'min':>9}{'max':>9}", end="")
            print(f"{'/ first (of minima)':>21}{'of the ceiling':>16}")
            for name, ms in times.items():
                median = statistics.median(ms)
                ratio = median / statistics.median(first)
                ratio_of_min = min(ms) / min(first)
                share = f"{ceiling / median:.0%}" if ceiling else "-"
                print(f"{name:24}{median:10.3f}{min(ms):9.3f}{max(ms):9.3f}", end="")
                print(f"{ratio:13.3f} ({ratio_of_min:.3f}){share:>16}")
                figures = {"median_ms": median, "min_ms": min(ms), "max_ms": max(ms)}
                figures |= {"ratio": ratio, "ratio_of_min": ratio_of_min}
                row = {"job": job, "shape": shape, "contender": name}
                rows.append(row | {key: round(value, 4) for key, value in figures.items()})
    print(json.dumps({"benchmark": "bench_nf4", **card, "rows": rows}))


if __name__ == "__main__":
    main()
