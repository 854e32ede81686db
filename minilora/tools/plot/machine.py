"""Pictures of a machine's limits: memory by part, and the roofline of bandwidth and arithmetic.

The roofline model bounds the speed of a kernel. With I = operations / bytes, its arithmetic
intensity, the attainable operations a second are at most

    roof(I) = min(bandwidth · I, peak arithmetic)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.tools.memory_plan.parts import PARTS, about
from minilora.tools.plot.style import LINES, MARKERS, area, canvas

if TYPE_CHECKING:
    from minilora.tools.memory_plan.plan import MemoryPlan


def memory(plans: "MemoryPlan | Sequence[MemoryPlan]", path: str | Path | None = None) -> Any:
    """Draw memory plans as bars that are stacked by part, in GB of 10⁹ bytes.

    A dashed line shows the card of the first plan, if it has one.

    Args:
        plans: One or several results of `plan_memory`.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If the list is empty or contains another object.
    """
    plans = list(plans) if isinstance(plans, Sequence) else [plans]
    others = [plan for plan in plans if not _is_plan(plan)]
    if not plans or others:
        raise ValueError(
            f"memory: expected plans (results of plan_memory), at least one, got {plans!r}."
        )
    names = _bar_names(plans)
    card = plans[0].card
    with canvas(3 + 1.6 * len(plans), 4.8, path) as figure:
        axes = figure.subplots()
        tops = _draw_bars(axes, names, plans)
        for name, top in zip(names, tops, strict=True):
            axes.annotate(
                f"{top:,.1f}",
                (name, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                # a white background hides the line at `card`
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        if card is not None:
            axes.axhline(card / 1e9, color="black", linestyle="--", linewidth=1, label="card")
        highest = max(*tops, (card or 0) / 1e9)
        axes.set(ylabel="GB", title=about(plans[0]), ylim=(0, 1.1 * highest))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    return figure


def _is_plan(plan: Any) -> bool:
    """Return True if an object has all parts of a memory plan."""
    return all(hasattr(plan, part) for part in PARTS)


def _bar_names(plans: "Sequence[MemoryPlan]") -> list[str]:
    """Return the method of each plan, with the plan's number where a method occurs twice."""
    methods = [plan.method for plan in plans]
    names = []
    for number, method in enumerate(methods, start=1):
        names.append(method if methods.count(method) == 1 else f"{method}\n{number}")
    return names


def _draw_bars(axes: Any, names: list[str], plans: "Sequence[MemoryPlan]") -> list[float]:
    """Draw the stacked bars, and return their heights in GB."""
    tops = [0.0] * len(plans)
    for number, (part, caption) in enumerate(PARTS.items()):
        heights = [getattr(plan, part) / 1e9 for plan in plans]
        if any(heights):
            axes.bar(names, heights, 0.6, tops, label=caption, **area(number))
            tops = [low + height for low, height in zip(tops, heights, strict=True)]
    return tops


def roofline(
    rows: Sequence[Mapping[str, Any]],
    gb_per_s: float,
    gflops: float | None = None,
    title: str = "",
    path: str | Path | None = None,
) -> Any:
    """Draw kernels under the roof of a machine: operations a second over operations a byte.

    Both axes are logarithmic. Points of minilora are filled, points of other contenders hollow. A
    row without a time is drawn on the roof, the maximum that it can reach.

    Args:
        rows: One mapping for each kernel, with "job" (name of its colour and marker), "bytes" and
            "operations" of one call. Optional: "us", the measured microseconds of a call by
            contender, and "label", a text at the point.
        gb_per_s: Memory bandwidth in 10⁹ bytes a second.
        gflops: Peak arithmetic in 10⁹ operations a second; None leaves this limit out.
        title: Title of the picture; empty by default.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If `rows` is empty, or bytes, operations or a rate are not positive.

    Source:
        Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
    """
    sizes = [row[key] for row in rows for key in ("bytes", "operations")]
    if not rows or min(gb_per_s, gflops or 1, *sizes) <= 0:
        raise ValueError(
            "roofline: expected at least one row, and bytes, operations and rates above 0."
        )
    peak = gflops or float("inf")
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    with canvas(6.5, 4.4, path) as figure:
        axes = figure.subplots()
        _draw_roof(axes, rows, gb_per_s, peak)
        for row in rows:
            roof = min(gb_per_s * _intensity(row), peak)
            _draw_kernel(axes, row, roof, jobs.index(row["job"]))
        _add_legend_entries(axes, rows, jobs)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_format_intensity)
        axes.set(
            yscale="log",
            title=title,
            xlabel="operations per byte",
            ylabel="10⁹ operations per second",
        )
        axes.legend(fontsize="small", loc="upper left")
        axes.grid(alpha=0.2)
    return figure


def _intensity(row: Mapping[str, Any]) -> float:
    """Return the arithmetic intensity of a kernel in operations a byte."""
    return row["operations"] / row["bytes"]


def _format_intensity(x: float, _: Any) -> str:
    """Return the label of a tick; values below 1 are fractions."""
    if x >= 1:
        return f"{x:g}"
    return f"1/{1 / x:g}"


def _draw_roof(axes: Any, rows: Sequence[Mapping[str, Any]], gb_per_s: float, peak: float) -> None:
    """Draw min(gb_per_s · I, peak) from half the smallest to twice the largest intensity."""
    intensities = [_intensity(row) for row in rows]
    left = min(intensities) / 2
    right = max(intensities) * 2
    ridge = min(max(peak / gb_per_s, left), right)  # the corner of the roof
    corners = sorted({left, right, ridge})
    label = f"memory: {gb_per_s:,.0f} GB/s"
    if peak < float("inf"):
        label += f"; arithmetic: {peak / 1e3:,.1f} · 10¹²/s"
    heights = [min(gb_per_s * x, peak) for x in corners]
    axes.plot(corners, heights, color="black", label=label, zorder=1)


def _draw_kernel(axes: Any, row: Mapping[str, Any], roof: float, number: int) -> None:
    """Draw one point for each contender of a row; `number` selects colour and marker."""
    x = _intensity(row)
    colour = LINES[number % len(LINES)]
    times = row.get("us", {"minilora": row["operations"] / roof / 1e3})
    for name, microseconds in times.items():
        axes.scatter(
            x,
            row["operations"] / microseconds / 1e3,
            edgecolors=colour,
            marker=MARKERS[number % len(MARKERS)],
            s=36,
            facecolors=colour if name == "minilora" else "none",
        )
    below = {"xytext": (5, -10)}
    above = {"xytext": (-5, 4), "ha": "right"}
    position = below if number % 2 == 0 else above
    axes.annotate(
        row.get("label", ""),
        (x, roof),
        textcoords="offset points",
        fontsize="small",
        **position,
    )


def _add_legend_entries(axes: Any, rows: Sequence[Mapping[str, Any]], jobs: Sequence[str]) -> None:
    """Add a legend entry for each job, and one that names the contenders drawn hollow."""
    for number, job in enumerate(jobs):
        axes.scatter(
            [],
            [],
            color=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            label=job,
        )
    contenders = dict.fromkeys(name for row in rows for name in row.get("us", ()))
    others = [name for name in contenders if name != "minilora"]
    if others:
        axes.scatter(
            [], [], facecolors="none", edgecolors="black", label=f"hollow: {', '.join(others)}"
        )
