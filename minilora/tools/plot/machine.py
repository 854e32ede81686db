"""What a machine has to give, as pictures: memory by part, and the roof that its bandwidth and arithmetic set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.tools.memory_plan.parts import PARTS, about

if TYPE_CHECKING:
    from minilora.tools.memory_plan.plan import MemoryPlan

from minilora.tools.plot.style import LINES, MARKERS, area, canvas


def memory(plans: "MemoryPlan | Sequence[MemoryPlan]", path: str | Path | None = None) -> Any:
    """A bar a plan, stacked by part, in GB of 10⁹ bytes; a line at the first one's card, if it has one."""
    plans = [*plans] if isinstance(plans, Sequence) else [plans]
    if not plans or not all(hasattr(plan, part) for plan in plans for part in PARTS):
        raise ValueError(f"memory: expected plans (plan_memory), at least one, got {plans!r}.")
    names, card = [plan.method for plan in plans], plans[0].card
    names = [name if names.count(name) == 1 else f"{name}\n{i + 1}" for i, name in enumerate(names)]
    with canvas(3 + 1.6 * len(plans), 4.8, path) as figure:
        axes, base = figure.subplots(), [0.0] * len(plans)
        for number, (part, caption) in enumerate(PARTS.items()):
            heights = [getattr(plan, part) / 1e9 for plan in plans]
            if any(heights):
                axes.bar(names, heights, 0.6, base, label=caption, **area(number))
                base = [low + height for low, height in zip(base, heights, strict=True)]
        for name, top in zip(names, base, strict=True):
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line at `card`
            axes.annotate(f"{top:,.1f}", (name, top), (0, 3), textcoords="offset points", ha="center", bbox=paper)
        if card is not None:
            axes.axhline(card / 1e9, color="black", linestyle="--", linewidth=1, label="card")
        axes.set(ylabel="GB", title=about(plans[0]), ylim=(0, 1.1 * max(*base, (card or 0) / 1e9)))
        figure.legend(*(side[::-1] for side in axes.get_legend_handles_labels()), loc="outside right center")
    return figure


def roofline(
    rows: Sequence[Mapping[str, Any]],
    gb_per_s: float,
    gflops: float | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> Any:
    """Operations a second over operations a byte, log-log, under the roof min(gb_per_s · x, gflops): a point a row.

    rows: each with "job", "bytes" and "operations" of one call and, where it was timed, "us": microseconds by
        contender, minilora drawn full and others hollow. One that was not timed lies on the roof, the most it can
        reach; its "label" is written beside it.
    """
    if not rows or min(gb_per_s, gflops or 1, *(row[key] for row in rows for key in ("bytes", "operations"))) <= 0:
        raise ValueError("roofline: expected at least one row, and bytes, operations and rates above 0.")
    jobs, peak = list(dict.fromkeys(row["job"] for row in rows)), gflops or float("inf")
    xs = [row["operations"] / row["bytes"] for row in rows]
    with canvas(6.5, 4.4, path) as figure:
        axes = figure.subplots()
        ends = min(xs) / 2, max(xs) * 2
        corners = sorted({*ends, min(max(peak / gb_per_s, ends[0]), ends[1])})
        words = f"memory: {gb_per_s:,.0f} GB/s" + (f"; arithmetic: {gflops / 1e3:,.1f} · 10¹²/s" if gflops else "")
        axes.plot(corners, [min(gb_per_s * x, peak) for x in corners], color="black", label=words, zorder=1)
        contenders = list(dict.fromkeys(name for row in rows for name in row.get("us", ())))
        for row, x in zip(rows, xs, strict=True):
            number = jobs.index(row["job"])
            style = {"edgecolors": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)], "s": 36}
            for name, us in row.get("us", {"minilora": row["operations"] / min(gb_per_s * x, peak) / 1e3}).items():
                axes.scatter(
                    x,
                    row["operations"] / us / 1e3,
                    **style,
                    facecolors=style["edgecolors"] if name == "minilora" else "none",
                )
            at = (x, min(gb_per_s * x, peak))
            style = ({"xytext": (5, -10)}, {"xytext": (-5, 4), "ha": "right"})[number % 2]  # below the roof, above it
            axes.annotate(row.get("label", ""), at, textcoords="offset points", fontsize="small", **style)
        for number, job in enumerate(jobs):
            axes.scatter([], [], color=LINES[number % len(LINES)], marker=MARKERS[number % len(MARKERS)], label=job)
        if others := [name for name in contenders if name != "minilora"]:
            axes.scatter([], [], facecolors="none", edgecolors="black", label=f"hollow: {', '.join(others)}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
        axes.set(yscale="log", title=title, xlabel="operations a byte", ylabel="10⁹ operations a second")
        axes.legend(fontsize="small", loc="upper left")
        axes.grid(alpha=0.2)
    return figure
