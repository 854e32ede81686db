"""NF4 on the CPU against bitsandbytes: the same bits first, then the time, alternating in one run.

    python benchmarks/bench_nf4.py [--threads 2] [--rounds 21] [--dtype bfloat16] [--only token]

"new" returns a new tensor, as both public functions do; "out=" writes into a kept one, which bitsandbytes' public
function cannot on a CPU. The last contender is bitsandbytes' C function, called past its public one. The ceiling is
copying the result's bytes into a kept tensor. "one token" and "8 tokens" go through a 4-bit layer without gradients:
bitsandbytes' Linear4bit, repacked by eval() for its fused product in bf16, and ours; beside them a dense one. On a busy
machine only the ratios mean something, and even those favour few parallel regions: look at the load average.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.cextension import lib
from torch import nn

from minilora.quant import NF4Linear
from minilora_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from minilora_kernels.compiled import nf4

SHAPES = ((4096, 4096), (1536, 576))
COPY = "copy, out="


def contenders(x: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """Job -> contender -> call; bitsandbytes' public function first. Raises AssertionError unless all agree."""
    plain, nested = ({"quant_type": "nf4", "compress_statistics": nested} for nested in (False, True))
    packed, state = bnb.quantize_4bit(x, **plain)
    packed2, state2 = bnb.quantize_4bit(x, **nested)
    weight = quantize_nf4(x, double_quant=False)
    weight2 = NF4Weight.from_state_dict({"w": packed2} | {f"w.{k}": v for k, v in state2.as_dict(True).items()}, "w")
    expected, kept, source = bnb.dequantize_4bit(packed, state), torch.empty_like(x), x.clone()

    assert torch.equal(weight.packed, packed.view(-1)) and torch.equal(weight.absmax, state.absmax)
    assert torch.equal(quantize_nf4(x).packed, packed2.view(-1))
    assert torch.equal(dequantize_nf4(weight), expected)
    assert torch.equal(dequantize_nf4(weight, out=kept), expected)
    assert torch.equal(dequantize_nf4(weight2), bnb.dequantize_4bit(packed2, state2))

    jobs: dict[str, dict[str, Callable[[], object]]] = {
        "quantise": {
            "bitsandbytes": lambda: bnb.quantize_4bit(x, **plain),
            "minilora": lambda: quantize_nf4(x, double_quant=False),
        },
        "quantise, double": {
            "bitsandbytes": lambda: bnb.quantize_4bit(x, **nested),
            "minilora": lambda: quantize_nf4(x),
        },
        "dequantise": {
            "bitsandbytes, new": lambda: bnb.dequantize_4bit(packed, state),
            "minilora, new": lambda: dequantize_nf4(weight),
            "minilora, out=": lambda: dequantize_nf4(weight, out=kept),
            COPY: lambda: kept.copy_(source),
        },
        "dequantise, double": {
            "bitsandbytes, new": lambda: bnb.dequantize_4bit(packed2, state2),
            "minilora, new": lambda: dequantize_nf4(weight2),
            "minilora, out=": lambda: dequantize_nf4(weight2, out=kept),
            COPY: lambda: kept.copy_(source),
        },
    }
    suffix = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[x.dtype]
    if function := getattr(lib, f"cdequantize_blockwise_cpu_nf4_{suffix}", None):
        sizes = [ctypes.c_longlong(n) for n in (64, *x.shape)]
        pointers = [bnb.get_ptr(t) for t in (packed, state.absmax, kept)]
        jobs["dequantise"]["bitsandbytes' C, out="] = lambda: function(*pointers, *sizes)
        jobs["dequantise"]["bitsandbytes' C, out="]()
        assert torch.equal(kept, expected)
    return jobs


def layers(x: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """The same for x as the weight of a layer, with double quantisation."""
    peer: Any = bitsandbytes.nn
    theirs = peer.Linear4bit(x.shape[1], x.shape[0], bias=False, compute_dtype=x.dtype, quant_type="nf4")
    theirs.weight = peer.Params4bit(x, requires_grad=False, quant_type="nf4")
    theirs = theirs.to("cpu").eval()
    dense = nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=x.dtype)
    dense.weight.data = x
    ours = NF4Linear.from_linear(dense)
    nf4.ready()
    jobs: dict[str, dict[str, Callable[[], object]]] = {}
    for name, count in {"one token": 1, "8 tokens": 8}.items():
        t = torch.randn(1, count, x.shape[1], generator=torch.Generator().manual_seed(1)).to(x.dtype)
        named: dict[str, nn.Module] = {"bitsandbytes": theirs, "minilora": ours, "dense": dense}
        quick = ours.for_tokens()
        jobs[name] = {side: lambda layer=layer, t=t: layer(t) for side, layer in named.items()}
        jobs[name]["minilora, in generate"] = lambda t=t, quick=quick: quick(t)
        expected = F.linear(t, ours.dequantize(x.dtype)).float()
        for side in ("bitsandbytes", "minilora", "minilora, in generate"):
            error = (jobs[name][side]().float() - expected).norm() / expected.norm()  # pyright: ignore[reportAttributeAccessIssue] tensors
            assert error < 0.01, f"{side} is off by {error:.1%}"
    return jobs


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", default="", help="jobs that have this in their name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    card = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    print(*(f"{name}: {value}" for name, value in card.items()), sep="\n")
    rows = []
    torch.set_grad_enabled(False)
    for shape in SHAPES:
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(getattr(torch, args.dtype))
        for job, calls in (contenders(x) | layers(x)).items():
            if args.only not in job:
                continue
            times = measure(calls, args.rounds * (1 if x.numel() > 1 << 22 else 5))
            first = next(iter(times.values()))  # bitsandbytes' public function
            ceiling = statistics.median(times[COPY]) if COPY in times else None
            print(f"\n{job}, {shape[0]} x {shape[1]}: {x.nbytes / 2**20:.1f} MiB {args.dtype}; checked")
            print(f"{'':24}{'median ms':>10}{'min':>9}{'max':>9}{'/ bnb (of minima)':>21}{'of the ceiling':>16}")
            for name, ms in times.items():
                median = statistics.median(ms)
                ratio, ratio_of_min = median / statistics.median(first), min(ms) / min(first)
                share = f"{ceiling / median:.0%}" if ceiling else "-"
                print(
                    f"{name:24}{median:10.3f}{min(ms):9.3f}{max(ms):9.3f}{ratio:13.3f} ({ratio_of_min:.3f}){share:>16}"
                )
                figures = {"median_ms": median, "min_ms": min(ms), "max_ms": max(ms)}
                figures |= {"ratio": ratio, "ratio_of_min": ratio_of_min}
                row = {"job": job, "shape": shape, "contender": name}
                rows.append(row | {key: round(value, 4) for key, value in figures.items()})
    print(json.dumps({"benchmark": "bench_nf4", **card, "rows": rows}))


if __name__ == "__main__":
    main()
