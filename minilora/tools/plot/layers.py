"""Adapters as pictures, a cell a layer: what was learned and where, and what merging it would lose.

The singular values σ of ΔW = Σ s · B A over the active adapters come from B and A alone (tools/inspect.py).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import unknown
from minilora.lora.embedding_conv import Adapter, active_adapters
from minilora.lora.merging.merge import merged_weight
from minilora.lora.registry import lora_layers
from minilora.tools.inspect import spaces
from minilora.tools.merge_report import MergeReport
from minilora.tools.plot.style import MAP, MARKERS, canvas, line


def spectra(model: nn.Module, path: str | Path | None = None) -> Any:
    """What the active adapters learned: singular values of ΔW by target, and ‖ΔW‖ / ‖W‖ of every layer.

    A line is the median over the layers of one target. ValueError if no active adapter changes anything.
    """
    updates, shares = {}, {}
    for name, layer in lora_layers(model).items():
        if adapters := active_adapters(layer):
            down, up = zip(*map(_factors, adapters), strict=True)
            updates[name] = sigma = spaces(torch.cat(up, 1), torch.cat(down), 1.0)[1]  # (k,)
            shares[name] = (sigma.norm() / merged_weight(layer.base_layer).double().norm().cpu()).item()
    if not any(len(sigma) for sigma in updates.values()):
        raise ValueError("no active adapter changes anything: load_adapter, set_adapter or train first.")
    with canvas(9, 4, path) as figure:
        curves, cells = figure.subplots(1, 2)
        by_target: dict[str, list[Tensor]] = {}
        for name, sigma in updates.items():
            by_target.setdefault(_target(name), []).append(sigma)
        captions = _captions(by_target)
        for number, (target, found) in enumerate(by_target.items()):
            values = nn.utils.rnn.pad_sequence(found, batch_first=True).median(0).values  # (r,)
            place, marker = range(1, len(values) + 1), MARKERS[number % len(MARKERS)]
            curves.plot(place, values, marker=marker, markersize=4, label=captions[target], **line(number))
        curves.set(title="singular values of ΔW, median of the layers", xlabel="which, largest first", ylim=0)
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.legend(fontsize="small")
        figure.colorbar(_heat(cells, shares), ax=cells, label="‖ΔW‖ / ‖W‖")
        cells.set_title("where the update went")
    return figure


def merge_error(report: MergeReport, targets: Sequence[str] = (), path: str | Path | None = None) -> Any:
    """What merging to each storage would lose, a panel a storage and a cell a layer: 1 is the adapter's whole effect.

    targets: of `report`; all but float32 if none is given, whose error is fp32's rounding alone.
    """
    known = report.total.error
    for target in targets:
        if target not in known:
            raise unknown("targets", target, known)
    targets = targets or [target for target in known if target != "float32"]
    layers = sorted(report.layers, key=lambda layer: layer.name)  # the report has the worst first
    errors = {
        target: {layer.name: layer.error[target] for layer in layers if target in layer.error} for target in targets
    }
    with canvas(1.5 + 3 * len(targets), 4, path) as figure:
        panels = figure.subplots(1, len(targets), squeeze=False)[0]
        for axes, (target, found) in zip(panels, errors.items(), strict=True):
            words = "‖M − (W + ΔW)‖ / ‖ΔW‖" if axes is panels[-1] else ""
            figure.colorbar(_heat(axes, found), ax=axes, label=words)
            axes.set_title(f"{target}: {known[target]:.2g} in all")
    return figure


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A (r, in) and s · B (out, r) as matrices; of a convolution with groups, B of each beside the others."""
    A, B = adapter.lora_A.detach().cpu(), adapter.lora_B.detach().cpu().flatten(1)
    return A.flatten(1), adapter.scaling * torch.block_diag(*B.chunk(len(A) // B.shape[1]))


def _heat(axes: Any, values: Mapping[str, float]) -> Any:
    """A cell a layer: its number upwards (layers without one below them), its target across; grey where is none."""
    rows = sorted({_number(name) for name in values})
    columns = list(dict.fromkeys(map(_target, values)))
    grid = torch.full((len(rows), len(columns)), torch.nan)
    for name, value in values.items():
        grid[rows.index(_number(name)), columns.index(_target(name))] = value
    axes.set_facecolor("#dddddd")
    mesh = axes.pcolormesh(grid, cmap=MAP)
    every = max(1, -(-len(rows) // 16))
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), every)], ["–" if n < 0 else n for n in rows[::every]])
    axes.set_xticks([i + 0.5 for i in range(len(columns))], _captions(columns).values(), rotation=90)
    axes.set_ylabel("layer")
    return mesh


def _number(name: str) -> int:
    """Of the layer that a module is in: the first number of its path; -1 if it has none."""
    found = re.search(r"(?<![^.])\d+(?![^.])", name)
    return int(found[0]) if found else -1


def _target(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name, count=1)


def _captions(targets: Any) -> dict[str, str]:
    """The last word of each target where no two share it, else the whole of it."""
    ends = [target.rpartition(".")[2] for target in targets]
    return {target: end if ends.count(end) == 1 else target for target, end in zip(targets, ends, strict=True)}
