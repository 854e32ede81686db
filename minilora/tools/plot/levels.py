"""Pictures of NF4: its levels and their rounding error, and the codes of a real weight."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.tools.plot.style import area, canvas, line
from minilora_kernels import NF4Weight, dequantize_nf4, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.codebook import P_MAX, midpoints
from minilora_kernels.nf4.reference import TINY, unpack

BINS = 96  # bins of the fine histogram


def codebook(others: Mapping[str, Tensor] | None = None, path: str | Path | None = None) -> Any:
    """Draw NF4's 16 levels on the normal distribution, and the rounding error over [-1, 1].

    Args:
        others: Further codebooks by name, each ascending (n,), whose rounding error is drawn for
            comparison. None is the 15 even steps of Int4.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If the levels of a codebook do not ascend.
    """
    if others is None:
        # In fp64, whose rounding does not depend on the processor, as in `dynamic_map`.
        even_steps = torch.linspace(-1, 1, 15, dtype=torch.float64).float()  # (15,)
        others = {"Int4: 15 even steps": even_steps}
    for name, levels in others.items():
        ascending = levels.dim() == 1 and len(levels) > 1 and bool((levels.diff() > 0).all())
        if not ascending:
            raise ValueError(
                f"others[{name!r}]: expected ascending levels (n,), got shape "
                f"{tuple(levels.shape)}. Sort them."
            )
    with canvas(9, 3.2, path) as figure:
        distribution, error = figure.subplots(1, 2)
        _draw_levels(distribution)
        _draw_rounding_errors(error, {"NF4": nf4_codebook(), **others})
    return figure


def _draw_levels(axes: Any) -> None:
    """Draw the normal density, the area that each code covers, and the levels."""
    levels = nf4_codebook()  # (16,)
    edges = [-1.2, *nf4_thresholds().tolist(), 1.2]
    for code, level in enumerate(levels):
        x = torch.linspace(edges[code], edges[code + 1], 9, dtype=torch.float64)  # (9,)
        shade = "#dddddd" if code % 2 == 0 else "#f3f3f3"
        axes.fill_between(x, _density(x), color=shade, linewidth=0)
        # the label stands outside the curve: left of it for low codes, right of it for high ones
        offset, alignment = 0, "center"
        if code < 7:
            offset, alignment = -1, "right"
        elif code > 7:
            offset, alignment = 1, "left"
        axes.annotate(
            f"{code}",
            (level, _density(level)),
            (offset, 2),
            textcoords="offset points",
            ha=alignment,
            fontsize=7,
        )
    axes.vlines(levels, 0, _density(levels), colors=line(0)["color"], label="level, with its code")
    x = torch.linspace(-1.2, 1.2, 97, dtype=torch.float64)  # (97,)
    axes.plot(x, _density(x), color="black", linewidth=0.8, label="normal distribution")
    axes.set(
        title="NF4: levels at even quantiles of the normal distribution",
        xlabel="value / absmax of the block",
    )
    axes.set(yticks=[], ylim=(0, 1.3 * _density(torch.zeros((), dtype=torch.float32)).item()))
    axes.legend(loc="upper left", fontsize="small")


def _density(x: Tensor) -> Tensor:
    """Return the density of the normal distribution whose quantile at P_MAX is 1, in fp64.

    In fp32 the last digits of a picture would depend on the instruction set.
    """
    x = x.double()
    sigma = 1 / torch.special.ndtri(torch.tensor(P_MAX, dtype=torch.float32).double()).item()
    return (-0.5 * (x / sigma) ** 2).exp() / (sigma * math.sqrt(2 * math.pi))


def _draw_rounding_errors(axes: Any, codebooks: Mapping[str, Tensor]) -> None:
    """Draw the error of rounding to the nearest level, a line for each codebook."""
    for number, (name, levels) in enumerate(codebooks.items()):
        axes.plot(*_rounding(levels), label=name, linewidth=1.2, **line(number))
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(
        title="error of rounding to the nearest level",
        xlabel="value / absmax of the block",
        ylabel="error",
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))
    axes.legend(loc="upper center", ncols=3)


def _rounding(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners of the line (x, level(x) - x) over [-1, 1], two for each level: (2 n,)."""
    levels = levels.float()
    one = torch.ones(1, dtype=torch.float32)
    edges = torch.cat([-one, midpoints(levels).clamp(-1, 1), one])  # (n + 1,)
    x = torch.stack([edges[:-1], edges[1:]], dim=1)  # (n, 2)
    return x.flatten(), (levels[:, None] - x).flatten()  # (2 n,), (2 n,)


def histogram(
    weight: NF4Weight, source: Tensor | None = None, path: str | Path | None = None
) -> Any:
    """Draw the values of a 4-bit weight at the 16 levels, and how often each code occurs.

    Args:
        weight: A 4-bit weight.
        source: The tensor that was quantised, in the same shape. It is drawn as a fine histogram,
            and the title states the relative error. None draws the codes alone.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If `weight` is not an NF4Weight, or `source` has another shape.
    """
    if not isinstance(weight, NF4Weight):
        raise ValueError(
            "histogram: expected an NF4Weight (the result of quantize_nf4, or .weight of a layer), "
            f"got {type(weight)}."
        )
    if source is not None and source.shape != weight.shape:
        raise ValueError(
            f"source: expected the tensor that was quantised, {tuple(weight.shape)}, "
            f"got {tuple(source.shape)}."
        )
    codes = unpack(weight.packed.cpu())[: weight.numel].long()  # (n,)
    shares = torch.bincount(codes, minlength=16) / len(codes)  # (16,)
    title = f"{weight.numel:,} values in blocks of {weight.blocksize}"
    with canvas(9, 3.2, path) as figure:
        values, usage = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_code_density(values, shares)
        if source is not None:
            source = source.detach().cpu().float()
            _draw_source_density(values, weight, source)
            error = (dequantize_nf4(weight, torch.float32).cpu() - source).norm()
            title += f"; ‖error‖ / ‖W‖ = {(error / source.norm()).item():.2%}"
        values.set(title=title, xlabel="value / absmax of the block", ylabel="density")
        values.legend(loc="upper right", fontsize="small")
        usage.bar(range(16), 100 * shares, **area(0))
        usage.axhline(100 / 16, color="black", linestyle="--", linewidth=0.8)
        usage.set(
            title="frequency of each code (dashed: 1/16)",
            xlabel="code",
            ylabel="%",
            xticks=range(16),
        )
        usage.tick_params("x", labelsize="small")
    return figure


def _draw_code_density(axes: Any, shares: Tensor) -> None:
    """Draw the share of each code, spread over the values that are rounded to it."""
    one = torch.ones(1, dtype=torch.float32)
    edges = torch.cat([-one, nf4_thresholds(), one])  # (17,)
    widths = edges.diff()  # (16,)
    axes.bar(edges[:-1], shares / widths, widths, align="edge", label="quantised", **area(0))
    axes.vlines(nf4_codebook(), 0, shares / widths, colors="black", label="level")


def _draw_source_density(axes: Any, weight: NF4Weight, source: Tensor) -> None:
    """Draw a fine histogram of the values before quantisation, divided by their block's absmax."""
    absmax = weight.absmax.cpu().repeat_interleave(weight.blocksize)[: weight.numel]  # (n,)
    x = source.flatten() / absmax.clamp_min(TINY)  # (n,)
    counts = torch.histc(x.clamp(-1, 1), BINS, -1, 1)  # (BINS,)
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float32)  # (BINS + 1,)
    axes.stairs(counts / len(x) * BINS / 2, edges, color="#d55e00", label="original")
