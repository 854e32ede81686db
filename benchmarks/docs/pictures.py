"""The pictures in docs/.

    python benchmarks/docs/pictures.py                             pictures without measurements
    python benchmarks/docs/pictures.py docs/speed.svg peers.out    results of a benchmark

The benchmark is bench_train.py or peers.py; its document is the last line of each file (- is
stdin). Parts of one measurement, measured with --only, are joined. The SVG keeps the figures in its
description, so an .svg of this script can replace the file. Without arguments, cost.svg and
speed.svg are also drawn again from their own figures.
"""

import argparse
import html
import json
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks.docs.explorer import config
from benchmarks.gpu_model.roofline import CARDS, HALF, LANES, WEIGHT_DOUBLE_QUANT
from benchmarks.training.bench_train import UNITS, powers
from minilora.data.collate import collate
from minilora.data.loss_mask import IGNORE, Example
from minilora.data.packing import pack
from minilora.tools.plot import style

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Colours of the parts of a fit. They go from light to dark in grey too.
SHADES = ("#dddddd", "#a6bddb", "#3690c0")
AXES = {
    "length": "T, tokens in a row",
    "batch": "B, rows in a batch",
    "r": "r, rank of the adapter",
}
AXES |= {"width": "d, width of the model (hidden_size)"}
YLABELS = {"seconds": "seconds per step", "megabytes": "memory of a step in MB"}
TITLES = {"qlora": "QLoRA", "qlora-checkpointing": "QLoRA,\ncheckpointing", "lora": "LoRA, {dtype}"}
FULL = {"bf16": "full fine-tuning,\nfp32 + autocast", "fp32": "full fine-tuning,\nfp32"}
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
LOADS = {"load": "load in 4 bits", "start": "process start to\nfirst forward"}
VARIES = {"load_average", "rounds"}  # may differ between parts of one measurement
SIDES = {  # contender -> style of its bars: dark, light, hatched, empty
    "minilora": {"color": "#4292c6"},
    "peers": {"color": "#cccccc"},
    "peers, best": {"color": "#eeeeee", "hatch": "////"},
    "peers, bf16": {"color": "#eeeeee", "hatch": "\\\\\\\\"},
    "limit": {"color": "white"},
}

LABELS = {  # contender -> its name in the legend
    "minilora": "minilora",
    "peers": "peft + transformers + bitsandbytes",
    "peers, best": "the same, fastest settings",
    "peers, bf16": "the same, bf16 weights",
    "limit": "lower bound of this machine",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "picture", nargs="?", type=Path, help="the picture of a benchmark (default: all in docs/)"
    )
    parser.add_argument(
        "outputs", nargs="*", help="files with the output of the benchmark; - is stdin"
    )
    options = parser.parse_args()
    if options.picture is None:
        for name, draw in PLAIN.items():
            draw(DOCS / f"{name}.svg")
        for name in ("cost", "speed"):
            save(document(str(DOCS / f"{name}.svg")), DOCS / f"{name}.svg")
        return
    if not options.outputs:
        parser.error(f"{options.picture}: expected the output of a benchmark to draw")
    found = join([document(name) for name in options.outputs])
    if found["benchmark"] not in DRAWN:
        parser.error(f"{found['benchmark']}: expected a document of {' or '.join(DRAWN)}")
    save(found, options.picture)


def document(name: str) -> dict[str, Any]:
    """Return the document in the last line of a file, or in the description of a picture."""
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    description = re.search(r"<dc:description>(.*?)</dc:description>", text, re.S)
    if description:
        return json.loads(html.unescape(description[1]))
    return json.loads(text.splitlines()[-1])


def join(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the documents of one benchmark's parts.

    Raises SystemExit unless they have the same machine and the same versions.
    """
    found: dict[str, Any] = {}
    for one in documents:
        different: dict[str, Any] = {}
        for name in sorted(found.keys() & one.keys() - VARIES):
            if not isinstance(one[name], dict) and found[name] != one[name]:
                different[name] = (found[name], one[name])
        if different:
            raise SystemExit(f"these pieces are not of one measurement: {different}")
        grows = found.get("grows", {}) | one.get("grows", {})
        found |= one
        if grows:
            found["grows"] = grows
    return found


def save(found: Mapping[str, Any], file: Path) -> None:
    """Draw a document to `file`."""
    with style.canvas(6, 4) as figure:
        DRAWN[found["benchmark"]](found, figure)
        style.save(figure, file, json.dumps(found))


def plan(file: Path) -> None:
    """Draw the plans of Llama-3-8B by three methods, as `minilora plan --plot` does."""
    shape, lora = config("Llama-3-8B"), ml.LoRAConfig(r=16, target_modules="all-linear")
    run: dict[str, Any] = {"per_device_train_batch_size": 4, "max_length": 512}
    full = ml.TrainConfig(method="full", bf16=True, **run)
    kept: dict[str, Any] = {"dtype": "bfloat16", "card": "24GB"}
    plans = [
        ml.plan_memory(shape, lora, ml.TrainConfig(**run), quantize=bits, **kept)
        for bits in ("nf4", None)
    ]
    ml.plot.memory([*plans, ml.plan_memory(shape, None, full, card="24GB")], file)


def packed(file: Path) -> None:
    """Draw examples of random lengths, packed into rows of 64; each begins with a question."""
    rng, examples = random.Random(1), []
    for row in range(14):
        asked, answered = rng.randint(3, 16), rng.randint(2, 18)
        tokens = list(range(asked + answered))
        examples.append(Example(tokens, [IGNORE] * asked + tokens[asked:], row))
    rows = pack(examples, [len(example) for example in examples], 64)
    ml.plot.packed(collate([*rows], pad_id=0, pad_to_multiple_of=64), path=file)


def roofline(file: Path) -> None:
    """Draw the limit of a layer of Llama-3-8B on one card, from its datasheet, not measured."""
    out, into, name = 14336, 4096, "RTX 4090"
    card, weights = CARDS[name], out * into
    gflops = card.sms * LANES["fma"] * 2 * card.ghz  # a multiply-add is two operations
    rows = [
        {
            "job": job,
            "bytes": weights * bytes_of + 2 * n * (out + into),
            "operations": 2 * n * weights,
            "label": f"{n} token{'s' * (n > 1)}",
        }
        for job, bytes_of in {"W in NF4": WEIGHT_DOUBLE_QUANT, "W in bf16": HALF}.items()
        for n in (1, 8, 64)
    ]
    title = f"Upper bound of W x, W {out} x {into}, by the datasheet of an {name} (fp32)"
    ml.plot.roofline(rows, card.gb_per_s, gflops, title, file)


def cost(found: Mapping[str, Any], figure: Any) -> None:
    """Draw seconds and megabytes against each size that grows.

    Each panel has the measured points, the parts of the fit stacked, and the order as a line.
    """
    grows = found["grows"]
    figure.set_size_inches(3.2 * len(grows), 5.8)
    panels = figure.subplots(2, len(grows), squeeze=False)
    for column, (kind, grown) in enumerate(grows.items()):
        others = ", ".join(f"{name} {grown['points'][0][name]:,}" for name in AXES if name != kind)
        for axes, unit in zip(panels[:, column], UNITS, strict=True):
            axes.set(
                xlabel=f"{AXES[kind]}\n({others})" if unit == UNITS[-1] else AXES[kind],
                ylabel=YLABELS[unit],
            )
            _grown(axes, kind, grown, unit)
    _legend(figure, panels.flat, "outside lower center", max(1, 5 * len(grows) // 4))


def _grown(axes: Any, kind: str, grown: Mapping[str, Any], unit: str) -> None:
    points, parts, order = grown["points"], grown[unit]["parts"], grown[unit]["order"]
    xs = [one[kind] for one in points]
    spreads = [one[unit] for one in points]
    ys = [one["median"] for one in spreads]
    u = np.linspace(0, 1, 16 if order > 1 else 2)
    below = 0 * u
    for power, (part, shade) in enumerate(zip(parts, SHADES, strict=False)):
        label = ("fixed part of the fit", "linear part", "quadratic part")[power]
        above = below + part * u**power
        axes.fill_between(u * xs[-1], below, above, color=shade, linewidth=0, label=label)
        below = above
    axes.plot(
        u * xs[-1],
        ys[-1] * u**order,
        "k--",
        linewidth=0.7,
        label="growth of the algorithm, without fixed part",
    )
    bars = [
        [one["median"] - one["min"] for one in spreads],
        [one["max"] - one["median"] for one in spreads],
    ]
    axes.errorbar(
        xs,
        ys,
        bars,
        fmt="ko",
        markersize=3.5,
        elinewidth=1,
        capsize=2.5,
        label="measured (min–max)",
    )
    letter = AXES[kind].partition(",")[0]
    words = []
    for part, power in zip(parts, powers(letter), strict=False):
        words.append(f"{part / sum(parts):.0%} {power}")
    axes.set_title(f"at {xs[-1]:,}: {' + '.join(words)}", fontsize="small")
    axes.set(
        xlim=(0, 1.04 * xs[-1]), ylim=(0, 1.1 * max(one["max"] for one in spreads)), xticks=xs[-3:]
    )


def speed(found: Mapping[str, Any], figure: Any) -> None:
    """Draw bars in a group for each job: seconds with min-max and ratios, and resident memory."""
    dtype = SHORT[found.get("dtype", "bfloat16")]  # documents without it are in bf16
    titles = {job: title.format(dtype=dtype) for job, title in TITLES.items()} | {
        "full": FULL[dtype]
    }
    groups = {title: (found[job], "seconds") for job, title in titles.items() if job in found}
    loads = found.get("load", {}).get("nf4", {})
    groups |= {LOADS[name]: (rows, f"{name}_seconds") for name, rows in loads.items()}
    height = sum(len(rows) for rows, _ in groups.values())
    figure.set_size_inches(9, 1.2 + 0.26 * (height + len(groups)))
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    place, ticks = 0.0, []
    for rows, key in groups.values():
        ticks.append(place + (len(rows) - 1) / 2)
        for side, row in rows.items():
            name = "peers" if side == "transformers" else side
            style = {
                "edgecolor": "black",
                "linewidth": 0.6,
                "height": 0.9,
                "label": LABELS[name],
            } | SIDES[name]
            _bar(time, place, row[key], style, _times(row.get("ratio")))
            if name != "limit":
                share = rows["minilora"]["resident_mb"] / row["resident_mb"]
                text = "" if side == "minilora" else f"{share:.2f}"
                _bar(
                    memory,
                    place,
                    dict.fromkeys(("median", "min", "max"), row["resident_mb"] / 1e3),
                    style,
                    text,
                )
            place += 1
        place += 1
    time.set_yticks(ticks, groups)
    time.invert_yaxis()
    unit = "seconds (training: per step)" if loads else "seconds per step"
    time.set(xlabel=f"{unit}\n×: ratio to minilora in the same round (min–max)")
    memory.set(xlabel="peak resident memory, GB\nnumber: share that minilora needs")
    for axes in (time, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.25)
        axes.set_xlim(0)
    _legend(figure, [time], "outside upper center", 3)


def _bar(
    axes: Any, place: float, found: Mapping[str, float], style: Mapping[str, Any], text: str
) -> None:
    median, least, most = (found[name] for name in ("median", "min", "max"))
    axes.barh(place, median, **style)
    if most > least:
        axes.errorbar(
            median,
            place,
            xerr=[[median - least], [most - median]],
            color="black",
            elinewidth=1,
            capsize=2,
        )
    axes.annotate(
        text, (most, place), (4, 0), textcoords="offset points", va="center", fontsize="small"
    )


def _times(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"× {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def _legend(figure: Any, panels: Iterable[Any], place: str, columns: int) -> None:
    """Draw one legend of all panels, with each label once."""
    labelled = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    figure.legend(handles.values(), handles, loc=place, ncols=columns, frameon=False)


DRAWN = {"bench_train": cost, "peers": speed}
PLAIN = {
    "codebook": lambda file: ml.plot.codebook(path=file),
    "packed": packed,
    "plan": plan,
    "roofline": roofline,
}

if __name__ == "__main__":
    main()
