"""Pictures of adapters with one cell a layer: the learned update, and the error of merging it.

The singular values σ of ΔW = Σ s · B A over the active adapters are computed from B and A alone,
without the dense product (tools/inspect.py).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import unknown_name, unwrap_model
from minilora.lora.embedding_conv import Adapter, active_adapters
from minilora.lora.merging.merge import merged_weight
from minilora.lora.registry import lora_layers
from minilora.tools.inspect import spaces
from minilora.tools.merge_report import MergeReport
from minilora.tools.plot.style import MAP, MARKERS, canvas, line

_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a module path that is a number


def spectra(model: nn.Module, path: str | Path | None = None) -> Any:
    """Draw the update that the active adapters learned.

    The left panel shows the singular values of ΔW, a line for each target: the median over its
    layers. The right panel shows ‖ΔW‖ / ‖W‖ of every layer.

    Args:
        model: A model with adapters.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If the update is zero in every layer.
    """
    model = unwrap_model(model)
    updates: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for name, layer in lora_layers(model).items():
        adapters = active_adapters(layer)
        if not adapters:
            continue
        sigma = _singular_values(adapters)  # (k,)
        base_norm = merged_weight(layer.base_layer).double().norm().cpu()
        updates[name] = sigma
        shares[name] = (sigma.norm() / base_norm).item()
    if not any(len(sigma) for sigma in updates.values()):
        raise ValueError(
            "no active adapter changes anything. Use load_adapter, set_adapter or train first."
        )
    with canvas(9, 4, path) as figure:
        curves, cells = figure.subplots(1, 2)
        _draw_singular_values(curves, updates)
        figure.colorbar(_heat_map(cells, shares), ax=cells, label="‖ΔW‖ / ‖W‖")
        cells.set_title("relative size of the update by layer")
    return figure


def _singular_values(adapters: Sequence[Adapter]) -> Tensor:
    """Return the singular values of the summed update of several adapters, (k,), largest first."""
    factors = [_factors(adapter) for adapter in adapters]
    A = torch.cat([a for a, _ in factors])  # (Σ r, in)
    sB = torch.cat([b for _, b in factors], 1)  # (out, Σ r)
    return spaces(sB, A, 1.0)[1]


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and s · B (out, r); B is block-diagonal for grouped convolutions."""
    A = adapter.lora_A.detach().cpu()
    B = adapter.lora_B.detach().cpu().flatten(1)  # (out, r / groups)
    groups = len(A) // B.shape[1]
    return A.flatten(1), adapter.scaling * torch.block_diag(*B.chunk(groups))


def _draw_singular_values(axes: Any, updates: Mapping[str, Tensor]) -> None:
    """Draw a line for each target: the median of its layers' singular values."""
    by_target: dict[str, list[Tensor]] = {}
    for name, sigma in updates.items():
        by_target.setdefault(_target(name), []).append(sigma)
    captions = _captions(by_target)
    for number, (target, sigmas) in enumerate(by_target.items()):
        padded = nn.utils.rnn.pad_sequence(sigmas, batch_first=True)  # (layers, r)
        median = padded.median(0).values  # (r,)
        axes.plot(
            range(1, len(median) + 1),
            median,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=captions[target],
            **line(number),
        )
    axes.set(
        title="singular values of ΔW, median of the layers", xlabel="index, largest first", ylim=0
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def merge_error(
    report: MergeReport, targets: Sequence[str] = (), path: str | Path | None = None
) -> Any:
    """Draw the relative error of merging, with a panel for each storage format and a cell a layer.

    The error is ‖M − (W + ΔW)‖ / ‖ΔW‖ for the merged weight M. An error of 1 is as large as the
    whole update.

    Args:
        report: Result of `merge_report`.
        targets: Storage formats of the report. The default is all but float32, whose error is
            only the rounding of fp32.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If the report does not contain a target.
    """
    total = report.total.error
    for target in targets:
        if target not in total:
            raise unknown_name("targets", target, total)
    targets = targets or [target for target in total if target != "float32"]
    layers = sorted(report.layers, key=lambda layer: layer.name)  # the report has the worst first
    with canvas(1.5 + 3 * len(targets), 4, path) as figure:
        panels = figure.subplots(1, len(targets), squeeze=False)[0]
        for axes, target in zip(panels, targets, strict=True):
            errors = {layer.name: layer.error[target] for layer in layers if target in layer.error}
            label = "‖M − (W + ΔW)‖ / ‖ΔW‖" if axes is panels[-1] else ""
            figure.colorbar(_heat_map(axes, errors), ax=axes, label=label)
            axes.set_title(f"{target}: {total[target]:.2g} over all layers")
    return figure


def _heat_map(axes: Any, values: Mapping[str, float]) -> Any:
    """Draw a cell for each layer, by number (upwards) and target; grey where a layer is missing."""
    rows = sorted({_number(name) for name in values})
    columns = list(dict.fromkeys(_target(name) for name in values))
    grid = torch.full((len(rows), len(columns)), torch.nan)  # (rows, columns)
    for name, value in values.items():
        grid[rows.index(_number(name)), columns.index(_target(name))] = value
    axes.set_facecolor("#dddddd")
    mesh = axes.pcolormesh(grid, cmap=MAP)
    stride = max(1, -(-len(rows) // 16))  # at most 16 labels
    labels = [_row_label(number) for number in rows[::stride]]
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), stride)], labels)
    axes.set_xticks(
        [i + 0.5 for i in range(len(columns))], _captions(columns).values(), rotation=90
    )
    axes.set_ylabel("layer")
    return mesh


def _row_label(number: int) -> str:
    """Return the label of a row; modules without a layer number have a dash."""
    return "–" if number < 0 else str(number)


def _number(name: str) -> int:
    """Return the layer number of a module: the first number of its path, or -1 without one."""
    match = _LAYER_NUMBER.search(name)
    return int(match[0]) if match else -1


def _target(name: str) -> str:
    """Return the path of a module with * in place of its layer number."""
    return _LAYER_NUMBER.sub("*", name, count=1)


def _captions(targets: Iterable[str]) -> dict[str, str]:
    """Return the last word of each target, or the full target where two share their last word."""
    last_words = {target: target.rpartition(".")[2] for target in targets}
    words = list(last_words.values())
    captions = {}
    for target, word in last_words.items():
        captions[target] = word if words.count(word) == 1 else target
    return captions
