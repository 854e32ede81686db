"""Growth of a QLoRA step's time and memory with length, batch, rank and width of the model.

    python benchmarks/training/bench_train.py

The model has random weights in the shape of SmolLM2-135M, NF4 with double quantisation, an adapter
on all linear layers, and AdamW; it computes in bf16, or in fp32 on a CPU without it (--dtype). One
size grows at a time. A point is two fresh processes of some steps each. One measures the time. The
other measures the memory that a step needs in addition to the loaded model (anonymous, Linux); its
malloc gives freed memory back, as in plan_check.py.

The fit is a sum of parts, a + b x or a + b x + c x², with no negative part, up to the order of the
algorithm. Attention compares T² pairs of tokens but keeps none of them. A layer has width²
weights, and the weights of one layer are dense for a moment. Everything else is linear. The part a
is fixed: Python, and in a short step the dequantised weights. A single power of x through all
points would show this part as slow growth.

The script checks that the growing part grows no faster than that order between the last two points:
the fastest step of the last point against the slowest step of the point before. Otherwise the exit
status is 1 and a sentence names the growth. The last line of stdout is one JSON document. Parts can
run separately and be joined in one picture (two or three minutes each on two cores; 3 GB of
temporary files):

    python benchmarks/training/bench_train.py --only length | tee length.out
    python benchmarks/docs/pictures.py docs/cost.svg length.out batch.out r.out width.out
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import (
    TINY,
    Contender,
    add_dtype,
    compute_dtype,
    dtype_name,
    machine,
    serve,
    spread,
)
from benchmarks._lib.steps import own_step
from benchmarks.training.plan_check import EXACT
from benchmarks.training.scale_8b import batches, make

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
BASE = {"length": 128, "batch": 4, "r": 16, "width": 576}
GROWS = {  # the size that grows -> (its values, the order of time, the order of memory)
    "length": ([128, 256, 512, 1024, 2048], 2, 1),
    "batch": ([1, 2, 4, 8, 16], 1, 1),
    "r": ([8, 16, 32, 64, 128], 1, 1),
    "width": ([192, 576, 1152, 1728], 2, 2),
}
FIXED = {"length": {"batch": 1}, "width": {"length": 64, "batch": 2}}  # smaller sizes for these
UNITS = ("seconds", "megabytes")
# Allowed excess of an exponent: 7 % of the last point where x doubles. It covers noise that the
# steps of one process do not show.
SLACK = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of a point, after one to warm up"
    )
    parser.add_argument(
        "--only", default=",".join(GROWS), help="the sizes that grow, separated by commas"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="two small layers, two values each, one step; nothing is checked",
    )
    add_dtype(parser)
    parser.add_argument("--point", help="run as this point: its sizes as JSON")
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    if options.point:
        return point(dtype, **json.loads(options.point))
    options.dtype = dtype_name(dtype)
    found: dict[str, Any] = {"benchmark": "bench_train", **machine(dtype), "grows": {}}
    with tempfile.TemporaryDirectory() as name:
        # A point that two kinds share is measured once.
        known: dict[str, dict[str, Any]] = {}
        for kind in options.only.split(","):
            points = []
            for size in sizes_of(kind, options.short):
                key = json.dumps(size, sort_keys=True)
                if key not in known:
                    known[key] = measure(Path(name), size, options)
                points.append(known[key])
            found["grows"][kind] = grow(kind, points)
    print(json.dumps(found))
    worse: list[str] = []
    for kind, grown in found["grows"].items():
        worse += too_fast(kind, grown)
    if worse and not options.short:
        raise SystemExit("\n".join(worse))


def sizes_of(kind: str, short: bool) -> list[dict[str, int]]:
    """Return the points of a kind.

    The short form has two points; the smaller one is the same for every kind.
    """
    if short:
        least = {name: values[0] for name, (values, *_) in GROWS.items()}
        return [least | {kind: value} for value in GROWS[kind][0][:2]]
    return [BASE | FIXED.get(kind, {}) | {kind: value} for value in GROWS[kind][0]]


def measure(folder: Path, sizes: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one point; return its sizes and the spread of its seconds and megabytes."""
    width = sizes["width"]
    fields = SMOLLM2 | {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_attention_heads": width // 64,
    }
    fields = TINY | {"hidden_size": width // 3} if options.short else fields
    model = folder / str(width)
    make(model, fields)
    command = json.dumps(
        {"folder": str(model)} | {name: sizes[name] for name in ("length", "batch", "r")}
    )
    found: dict[str, Any] = dict(sizes)
    counts = (1, 1) if options.short else (options.steps, 2)
    for unit, env, steps in zip(UNITS, (None, EXACT), counts, strict=True):
        contender = Contender(
            str(sizes), [__file__, "--dtype", options.dtype, "--point", command], env
        )
        before = contender.now
        answers: list[dict[str, Any]] = []
        for _ in range(1 + steps):
            contender.anonymous = 0
            answers.append(contender.step())
            answers[-1]["megabytes"] = (answers[-1]["anonymous"] - before) / 1e6
        contender.close()
        found[unit] = spread([answer[unit] for answer in answers[1:]])
    return found


def point(dtype: torch.dtype, folder: str, length: int, batch: int, r: int) -> None:
    """Serve steps of this size in this process."""
    import minilora as ml
    from minilora.training import runtime

    model = ml.load_model(folder, quantize="nf4", dtype=dtype)
    ml.inject(model, ml.LoRAConfig(r=r, lora_alpha=r, target_modules="all-linear"))
    row = batches(length, model.config.vocab_size)[0][0]
    with runtime.training_mode(model, False):
        serve(own_step(model, [[row] * batch]))


def grow(kind: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the points and the parts of their fits; return both."""
    found: dict[str, Any] = {"points": points}
    print(f"\n{kind:>8}{'seconds':>10}{'min-max':>16}{'MB':>10}")
    for one in points:
        time = one["seconds"]
        span = f"{time['min']:.3f}-{time['max']:.3f}"
        print(f"{one[kind]:8}{time['median']:10.3f}{span:>16}{one['megabytes']['median']:10.1f}")
    xs = [one[kind] for one in points]
    for unit, order in zip(UNITS, GROWS[kind][1:], strict=True):
        ys = [one[unit]["median"] for one in points]
        parts = fit(xs, ys, order)
        errors = []
        for x, y in zip(xs, ys, strict=True):
            errors.append(abs(value(parts, x / xs[-1]) / y - 1))
        found[unit] = {"order": order, "parts": parts, "off": max(errors)}
        words = []
        for part, power in zip(parts, powers(kind), strict=False):
            words.append(f"{part / sum(parts):.0%} {power}")
        print(f"{unit} at {xs[-1]}: {' + '.join(words)}; ", end="")
        print(f"the largest error of the fit is {max(errors):.1%}; ", end="")
        grown = exponent(found, kind, unit)
        print(f"the last two points: {kind}^{grown:.2f}, the algorithm's own order {order}")
    return found


def powers(name: str) -> tuple[str, str, str]:
    """Return the names of the parts of a fit."""
    return "fixed", f"~ {name}", f"~ {name}²"


def fit(xs: Sequence[float], ys: Sequence[float], order: int) -> list[float]:
    """Fit the parts p_0 ... p_order of y = sum p_k (x / x_last)^k, none of them negative.

    The fit minimises the squares of the relative error. The parts are those of y at the last x.
    With fewer points than parts the highest powers are left out.
    """
    best, found = math.inf, np.zeros(order + 1)
    u = np.array(xs) / xs[-1]
    for n in range(1, min(order + 1, len(xs)) + 1):
        for chosen in map(list, combinations(range(order + 1), n)):
            A = u[:, None] ** chosen / np.array(ys)[:, None]  # (points, n); A p = 1 is an exact fit
            p, *_ = np.linalg.lstsq(A, np.ones(len(u)), rcond=None)
            error = ((A @ p - 1) ** 2).sum()
            if min(p) >= 0 and error < best:
                best, found = error, np.zeros(order + 1)
                found[chosen] = p
    return found.tolist()


def value(parts: Sequence[float], u: float) -> float:
    """Return the value of a fit at u = x / x_last."""
    return sum(part * u**power for power, part in enumerate(parts))


def exponent(
    grown: Mapping[str, Any], kind: str, unit: str, last: str = "median", before: str = "median"
) -> float:
    """Return p of y - fixed ~ x^p between the last two points.

    `last` and `before` select the figure of each point: median, min or max.
    """
    first, second = grown["points"][-2:]
    x0, y0 = first[kind], first[unit][before]
    x1, y1 = second[kind], second[unit][last]
    fixed = grown[unit]["parts"][0]
    if fixed >= min(y0, y1):
        fixed = 0
    return math.log((y1 - fixed) / (y0 - fixed)) / math.log(x1 / x0)


def too_fast(kind: str, grown: Mapping[str, Any]) -> list[str]:
    """Return a sentence for time and for memory if it grows faster than the algorithm and noise."""
    sentences = []
    for unit in UNITS:
        least = exponent(grown, kind, unit, "min", "max")
        order = grown[unit]["order"]
        if least > order + SLACK:
            sentences.append(
                f"{unit} grow as {kind}^{least:.2f} at least between the last two points; "
                f"the algorithm's own order is {order}."
            )
    return sentences


if __name__ == "__main__":
    main()
