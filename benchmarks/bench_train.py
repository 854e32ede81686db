"""How a QLoRA step's time and memory grow with length, batch, rank and model. python benchmarks/bench_train.py

Random weights in the shape of SmolLM2-135M, NF4 with double quantisation, bf16, an adapter on all linear layers, AdamW;
one thing grows at a time. Each point is a fresh process; its time is the median of some steps, its memory what
the steps need beyond the loaded model (anonymous, Linux). Fitted is y = c x^p over all points; beside p stands the
order that the algorithm itself has: attention compares T² pairs but keeps none of them, everything else is linear.
A fixed part (Python, the head, the optimiser) makes p smaller. The picture goes to --picture; the last line is one JSON
document.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from scale_8b import batches, make
from side_by_side import TINY, Contender, machine, serve
from steps import own_step

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
BASE = {"length": 128, "batch": 4, "r": 16, "width": 576}
GROWS = {  # what grows -> (its values, the order of time, the order of memory)
    "length": ([128, 256, 512, 1024, 2048], 2, 1),
    "batch": ([1, 2, 4, 8, 16], 1, 1),
    "r": ([8, 16, 32, 64, 128], 1, 1),
    "width": ([192, 576, 1152, 1728], 2, 2),  # a weight that is dense for a moment has width² values
}
FIXED = {"length": {"batch": 1}, "width": {"length": 64, "batch": 2}}  # what is smaller meanwhile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a point, after one to warm up")
    parser.add_argument("--only", default=",".join(GROWS), help="what grows, with commas")
    parser.add_argument("--picture", type=Path, help="default: docs/cost.svg")
    parser.add_argument("--short", action="store_true", help="two small layers, two values each, no picture")
    parser.add_argument("--point", help="be this point: its sizes as JSON")
    options = parser.parse_args()
    if options.point:
        return point(**json.loads(options.point))
    found: dict[str, Any] = {"benchmark": "bench_train", **machine(), "grows": {}}
    with tempfile.TemporaryDirectory() as name:
        for kind in options.only.split(","):
            values = GROWS[kind][0][:2] if options.short else GROWS[kind][0]
            sizes = [BASE | FIXED.get(kind, {}) | {kind: value} for value in values]
            found["grows"][kind] = grow(kind, [measure(Path(name), size, options) for size in sizes])
    if not options.short:
        draw(found["grows"], options.picture or ROOT / "docs" / "cost.svg")
    print(json.dumps(found))


def measure(folder: Path, sizes: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """One point: its sizes, seconds and megabytes."""
    width = sizes["width"]
    fields = SMOLLM2 | {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_attention_heads": width // 64}
    fields = TINY | {"hidden_size": width // 3} if options.short else fields
    model = folder / str(width)
    make(model, fields)
    command = json.dumps({"folder": str(model)} | {name: sizes[name] for name in ("length", "batch", "r")})
    contender = Contender(str(sizes), [__file__, "--point", command])
    before, contender.anonymous = contender.now, 0
    seconds = [contender.step()["seconds"] for _ in range(1 + (2 if options.short else options.steps))][1:]
    contender.close()
    return sizes | {"seconds": statistics.median(seconds), "megabytes": (contender.anonymous - before) / 1e6}


def point(folder: str, length: int, batch: int, r: int) -> None:
    """Be a process that does steps of this size."""
    import minilora as ml
    from minilora.train import guard

    model = ml.load_model(folder, quantize="nf4", dtype="bfloat16")
    ml.inject(model, ml.LoRAConfig(r=r, lora_alpha=r, target_modules="all-linear"))
    row = batches(length, model.config.vocab_size)[0][0]
    with guard.training_mode(model, False):
        serve(own_step(model, [[row] * batch]))


def grow(kind: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the points and the exponents fitted to them."""
    _, *orders = GROWS[kind]
    found: dict[str, Any] = {"points": points}
    print(f"\n{kind:>8}{'seconds':>10}{'MB':>10}")
    for one in points:
        print(f"{one[kind]:8}{one['seconds']:10.3f}{one['megabytes']:10.1f}")
    for unit, order in zip(("seconds", "megabytes"), orders, strict=True):
        found[f"{unit}_exponent"], found[f"{unit}_order"] = exponent(points, kind, unit), order
        print(f"{unit} ~ {kind}^{found[f'{unit}_exponent']:.2f}   the algorithm's own order: {order}")
    return found


def exponent(points: list[dict[str, Any]], x: str, y: str) -> float:
    """p of y = c x^p, by least squares of the logarithms."""
    xs, ys = ([math.log(max(one[name], 1e-9)) for one in points] for name in (x, y))
    return statistics.linear_regression(xs, ys).slope


def draw(grows: dict[str, Any], file: Path) -> None:
    """Seconds and megabytes against each thing that grows, log-log."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    matplotlib.rcParams["svg.hashsalt"] = "minilora"  # equal figures, equal bytes
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(grows), figsize=(3 * len(grows), 5.5), layout="constrained", squeeze=False)
    for column, (kind, found) in enumerate(grows.items()):
        for row, unit in enumerate(("seconds", "megabytes")):
            xs, ys = ([one[name] for one in found["points"]] for name in (kind, unit))
            axes[row, column].plot(xs, ys, "o-")
            axes[row, column].set(xscale="log", yscale="log", xlabel=kind, ylabel=f"{unit} a step")
            axes[row, column].set_xticks(xs, labels=xs)
            axes[row, column].minorticks_off()
            axes[row, column].set_title(f"~ {kind}^{found[f'{unit}_exponent']:.2f}", fontsize="medium")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
