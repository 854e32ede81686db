"""NF4 as pictures: where the levels lie and what rounding to them costs; how real weights use them."""

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

BINS = 96  # of the fine histogram


def codebook(others: Mapping[str, Tensor] | None = None, path: str | Path | None = None) -> Any:
    """NF4's 16 levels on the normal law they are quantiles of, and the error of rounding to them over [-1, 1].

    others: further codebooks whose error is drawn beside it, by name, each ascending (n,); None is Int4's even steps.
    """
    others = {"Int4: 15 even steps": torch.linspace(-1, 1, 15)} if others is None else others
    for name, levels in others.items():
        if levels.dim() != 1 or len(levels) < 2 or not (levels.diff() > 0).all():
            raise ValueError(
                f"others[{name!r}]: expected ascending levels (n,), got shape {tuple(levels.shape)}: sort."
            )
    levels, sigma = nf4_codebook(), 1 / torch.special.ndtri(torch.tensor(P_MAX)).item()  # of what is 1 at Q(p_max)

    def density(x: Tensor) -> Tensor:
        return (-0.5 * (x / sigma) ** 2).exp() / (sigma * math.sqrt(2 * math.pi))

    with canvas(9, 3.2, path) as figure:
        law, error = figure.subplots(1, 2)
        edges = [-1.2, *nf4_thresholds().tolist(), 1.2]
        for code, level in enumerate(levels):
            x = torch.linspace(edges[code], edges[code + 1], 9)
            law.fill_between(x, density(x), color=("#dddddd", "#f3f3f3")[code % 2], linewidth=0)
            side = (code > 7) - (code < 7)  # of the curve, where it falls off
            style = {"textcoords": "offset points", "ha": ("center", "left", "right")[side], "fontsize": 7}
            law.annotate(f"{code}", (level, density(level)), (side, 2), **style)
        law.vlines(levels, 0, density(levels), colors=line(0)["color"], label="a level and its code")
        x = torch.linspace(-1.2, 1.2, 97)
        law.plot(x, density(x), color="black", linewidth=0.8, label="normal law")
        law.set(title="NF4: levels at even quantiles of a normal law", xlabel="value / absmax of its block")
        law.set(yticks=[], ylim=(0, 1.3 * density(torch.zeros(())).item()))
        law.legend(loc="upper left", fontsize="small")
        for number, (name, found) in enumerate({"NF4": levels, **others}.items()):
            error.plot(*_rounding(found), label=name, linewidth=1.2, **line(number))
        error.axhline(0, color="black", linewidth=0.5)
        error.set(title="what rounding to the nearest level adds", xlabel="value / absmax of its block", ylabel="error")
        low, high = error.get_ylim()
        error.set_ylim(low, high + 0.25 * (high - low))
        error.legend(loc="upper center", ncols=3)
    return figure


def _rounding(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of (x, level(x) - x) over [-1, 1], two a level: (2 n,) each."""
    edges = torch.cat([-torch.ones(1), midpoints(levels.float()).clamp(-1, 1), torch.ones(1)])  # (n + 1,)
    x = torch.stack([edges[:-1], edges[1:]], dim=1)  # (n, 2)
    return x.flatten(), (levels.float()[:, None] - x).flatten()


def histogram(weight: NF4Weight, source: Tensor | None = None, path: str | Path | None = None) -> Any:
    """The values of a 4-bit weight against the 16 levels, and how often each code is used.

    source: the tensor it was made from, in its shape: drawn as a fine histogram, with the error of the whole.
    """
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"histogram: expected an NF4Weight (quantize_nf4, or .weight of a layer), got {type(weight)}.")
    if source is not None and source.shape != weight.shape:
        raise ValueError(f"source: expected the tensor that was quantised, {tuple(weight.shape)}, got {source.shape}.")
    codes = unpack(weight.packed.cpu())[: weight.numel].long()  # (n,)
    shares = torch.bincount(codes, minlength=16) / len(codes)  # (16,)
    edges = torch.cat([-torch.ones(1), nf4_thresholds(), torch.ones(1)])  # (17,)
    title = f"{weight.numel:,} values in blocks of {weight.blocksize}"
    with canvas(9, 3.2, path) as figure:
        values, used = figure.subplots(1, 2, width_ratios=(3, 2))
        values.bar(edges[:-1], shares / edges.diff(), edges.diff(), align="edge", label="as codes", **area(0))
        values.vlines(nf4_codebook(), 0, (shares / edges.diff()), colors="black", label="level")
        if source is not None:
            absmax = weight.absmax.cpu().repeat_interleave(weight.blocksize)[: weight.numel]  # (n,)
            x = source.detach().cpu().float().flatten() / absmax.clamp_min(TINY)
            counts = torch.histc(x.clamp(-1, 1), BINS, -1, 1)
            values.stairs(counts / len(x) * BINS / 2, torch.linspace(-1, 1, BINS + 1), color="#d55e00", label="before")
            lost = (dequantize_nf4(weight, torch.float32).cpu() - source.detach().cpu().float()).norm()
            title += f"; ‖error‖ / ‖W‖ = {(lost / source.detach().float().norm()).item():.2%}"
        values.set(title=title, xlabel="value / absmax of its block", ylabel="density")
        values.legend(loc="upper right", fontsize="small")
        used.bar(range(16), 100 * shares, **area(0))
        used.axhline(100 / 16, color="black", linestyle="--", linewidth=0.8)
        used.set(title="how often a code is used (dashes: 1/16)", xlabel="code", ylabel="%", xticks=range(16))
        used.tick_params("x", labelsize="small")
    return figure
