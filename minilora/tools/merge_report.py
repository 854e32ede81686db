"""Measurement of the loss from merging, before anything is written.

The weights alone do not show what a merge costs (merge_figures.py). With held-out rows the report
therefore measures losses L, in nats per token:

    recovery(t) = (L(base) − L(t)) / (L(base) − L(trained))    the share of what the adapter learned
    nats(t)     = L(t) − L(trained)                            the cost of the merge

L(trained) is the loss with the adapter unmerged, and L(base) the loss without it, of a base in the
same storage: for the target "original" the base before its quantisation. The report ends in one
sentence a target. Without rows it states how much of the update is stored, and that the cost is
unknown.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import named_modules, unwrap_model
from minilora.common.notebook import html_table
from minilora.common.progress import ProgressBar
from minilora.data.read_rows import read_dataset
from minilora.evaluation.evaluate import evaluate
from minilora.lora.active import disable_adapters
from minilora.lora.merging.four_bits import check_rounding
from minilora.lora.merging.merge import STORAGES, check_dense_weights, merge
from minilora.lora.registry import lora_layers
from minilora.tools.merge_conclusions import (
    Measured,
    conclusion_from_weights,
    measured_conclusion,
    refusal,
)
from minilora.tools.merge_figures import (
    FOUR_BITS,
    LayerReport,
    Rounding,
    layer_report,
    layer_sums,
)

ROWS = 64  # whose losses differ by the merge alone: each target is measured on the same rows
ORIGINAL_BASE = "original base"  # key of the loss of the original without the adapter
SHOWN = 10  # layers in the printed table


@dataclass(frozen=True)
class MergeReport:
    """The figures of all layers; prints as a table.

    Attributes:
        layers: The layers with an effective adapter, largest error first.
        total: All layers as one long vector.
        losses: Maps a target, "trained" (with the adapter), "base" (without it) or "original base"
            to a measured loss in nats per token; empty if no loss was measured.
        refused: Maps a target to the reason why `merge` refuses it; only for measured losses.
        rows: Number of rows of the losses.
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport
    losses: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rows: int = 0

    def __str__(self) -> str:
        targets = list(self.total.error)
        columns = "".join(f"{target:>16}" for target in targets)
        lines = [f"{'error / projection, by target':<34}‖ΔW‖/‖W‖{columns}"]
        for layer in self.layers[:SHOWN]:
            lines.append(_table_line(layer, targets))
        omitted = len(self.layers) - SHOWN
        if omitted > 0:
            lines.append(f"… {omitted} layers with a smaller error")
        lines.append(_table_line(self.total, targets))
        measured = self.measured
        for name, loss in self.losses.items():
            line = f"loss {name:<14}{loss:.4f}"
            if name in measured:
                line += f"   recovery {measured[name].recovery:.4f}"
                line += f"   {measured[name].nats:+.4f} nats"
            lines.append(line)
        if self.rows:
            lines.append(f"losses of {self.rows} held-out rows, in nats per token")
        return "\n".join([*lines, *self._sentences()])

    def _repr_html_(self) -> str:
        targets = list(self.total.error)
        rows = []
        for layer in [*self.layers[:SHOWN], self.total]:
            rows.append([layer.name, f"{layer.size:.2%}", *_cells(layer, targets)])
        if self.losses:
            losses = [_number(self.losses.get(target)) for target in targets]
            rows.append(["loss", "", *losses])
        measured = self.measured
        if measured:
            recovery = [_number(self.recovery.get(target)) for target in targets]
            rows.append(["recovery", "", *recovery])
        return html_table(["error / projection", "‖ΔW‖/‖W‖", *targets], rows, self._sentences())

    @property
    def measured(self) -> dict[str, Measured]:
        """Recovery and nats of each target with a measured loss.

        Empty if no loss was measured; without a target whose base has no higher loss than the
        trained model, because such rows do not show what the adapter learned.
        """
        trained = self.losses.get("trained", math.inf)
        figures = {}
        for target in self.total.error:
            base = self.losses.get("base", -math.inf)
            if target == "original":
                base = self.losses.get(ORIGINAL_BASE, base)
            if target in self.losses and base > trained:
                loss = self.losses[target]
                recovery = (base - loss) / (base - trained)
                figures[target] = Measured(recovery, loss - trained)
        return figures

    @property
    def recovery(self) -> dict[str, float]:
        """The share of what the adapter learned that each measured target keeps."""
        return {target: figures.recovery for target, figures in self.measured.items()}

    @property
    def conclusions(self) -> dict[str, str]:
        """One sentence a target: what a merge into it keeps, and what to do."""
        measured = self.measured
        total = self.total
        sentences = {}
        for target in total.error:
            if target in self.refused:
                sentences[target] = f"is refused. {self.refused[target]}"
            elif target in measured:
                sentences[target] = measured_conclusion(measured, target)
            else:
                sentences[target] = conclusion_from_weights(
                    target, total.error[target], total.projection[target], total.size
                )
        return sentences

    @property
    def preferred(self) -> str | None:
        """The target in 4 bits with the lowest loss; None unless several were measured."""
        measured = [target for target in FOUR_BITS if target in self.losses]
        if len(measured) < 2:
            return None
        return min(measured, key=self.losses.__getitem__)

    def refusal(self, target: str) -> str | None:
        """Return why a merge into 4 bits should not be written; None if it may be.

        Args:
            target: A target of the report. Targets in 16 and 32 bits are never refused.
        """
        if target not in FOUR_BITS or target not in self.total.projection:
            return None
        if target in self.refused:
            return self.refused[target]
        return refusal(target, self.measured, self.total.projection[target])

    def _sentences(self) -> list[str]:
        """Return the conclusions as lines, with a remark on losses that say nothing."""
        lines = []
        if "base" in self.losses and not self.measured:
            lines.append(
                f"The adapter does not lower the loss on these rows ({self.losses['base']:.4f} "
                f"without it, {self.losses['trained']:.4f} with it), so they cannot show what a "
                "merge loses. Give rows of the adapter's task."
            )
        for target, sentence in self.conclusions.items():
            lines.append(f"merge into {target}: {sentence}")
        if self.preferred is not None:
            lines.append(f"in 4 bits, {self.preferred} has the lowest loss.")
        return lines


def _cells(layer: LayerReport, targets: list[str]) -> list[str]:
    """Return error and projection of each target; empty where the layer lacks the target."""
    cells = []
    for target in targets:
        cell = ""
        if target in layer.error:
            cell = f"{layer.error[target]:.2g} / {layer.projection[target]:.3f}"
        cells.append(cell)
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table_line(layer: LayerReport, targets: list[str]) -> str:
    """Return a layer's line; a cell is empty where the layer lacks the target."""
    cells = "".join(f"{cell:>16}" for cell in _cells(layer, targets))
    return f"{layer.name[-33:]:<34}{layer.size:8.2%}{cells}"


@torch.no_grad()
def merge_report(
    model: nn.Module,
    original: nn.Module | None = None,
    *,
    tokenizer: Any = None,
    data: Any = None,
    rows: int | None = ROWS,
    rounding: str = "stochastic",
    seed: int = 0,
) -> MergeReport:
    """Measure every layer with an active adapter, without changing the model.

    Layers whose ΔW is zero are left out. With `data` the losses of the base, of the trained model
    and of each merge are measured too, one merged copy of the model at a time.

    Args:
        model: A model with an active adapter.
        original: A model with the same layer names that contains the weights `model` was
            quantised from; it adds the targets "original" and, of a 4-bit base, "original-nf4".
            None leaves them out. The loss of "original" is measured if the same adapter is active
            in it.
        tokenizer: The model's tokenizer, for `data`.
        data: Held-out rows of the adapter's task, in any form that `train` accepts. None measures
            no loss.
        rows: Number of rows of `data`, from the first; None takes all.
        rounding: How the target "nf4" rounds, as in `merge`.
        seed: Seed of the draws of the target "nf4".

    Returns:
        The figures by layer and in total, and one sentence a target.

    Raises:
        ValueError: No active adapter changes a weight, a dense weight cannot be read, `original`
            lacks a layer or contains it in another shape, `data` has no `tokenizer`, the rounding
            is unknown, or `rows` is below 1.
    """
    if data is not None and tokenizer is None:
        raise ValueError("data: the loss of rows needs the tokenizer, which is None: pass it.")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected at least 1, or None for all, got {rows}.")
    check_rounding(rounding)
    model = unwrap_model(model)
    check_dense_weights(model)
    four_bit_rounding = Rounding(rounding, seed)
    report = _report_of_weights(model, original, four_bit_rounding)
    if data is None:
        return report
    measured_rows = read_dataset(data)[:rows]
    losses = _Losses(model, original, tokenizer, measured_rows, four_bit_rounding)
    return losses.added_to(report)


def _report_of_weights(
    model: nn.Module, original: nn.Module | None, rounding: Rounding
) -> MergeReport:
    """Return the report without losses."""
    sums_by_layer: dict[str, dict[str, Tensor]] = {}
    active = {path: layer for path, layer in lora_layers(model).items() if layer.active}
    with ProgressBar("measure", len(active), "layer") as bar:
        for path, layer in active.items():
            sums = layer_sums(path, layer, original, rounding)
            delta_square = sums["float32"][0]
            if delta_square:
                sums_by_layer[path] = sums
            bar.update()
    if not sums_by_layer:
        raise ValueError(
            "no active adapter changes anything: call load_adapter, set_adapter or train first."
        )
    total: dict[str, Tensor] = {}
    for sums in sums_by_layer.values():
        for target, values in sums.items():
            total[target] = total.get(target, 0) + values  # (5,)
    layers = [layer_report(path, sums) for path, sums in sums_by_layer.items()]
    layers.sort(key=lambda layer: -max(layer.error.values()))
    return MergeReport(tuple(layers), layer_report("all layers", total))


def merged_as(
    model: nn.Module,
    original: nn.Module | None,
    target: str,
    rounding: str = "stochastic",
    seed: int = 0,
) -> nn.Module:
    """Return the merged model as a target of the report stores it.

    Args:
        model: The model with its active adapter.
        original: The model that was quantised, for the targets "original", for which the same
            adapter is active in it, and "original-nf4".
        target: "original", "original-nf4", or a key of STORAGES.
        rounding: How the target "nf4" rounds, as in `merge`.
        seed: Seed of the draws of the target "nf4".
    """
    if target == "original":
        assert original is not None
        return merge(original)
    if target == "original-nf4":
        assert original is not None
        return merge(model, "nf4", original=original)
    if target == "nf4":
        return merge(model, "nf4", rounding=rounding, seed=seed)
    merged = merge(model, target)
    dtype = STORAGES.get(target)
    return merged if dtype is None else merged.to(dtype)


@dataclass(frozen=True)
class _Losses:
    """The models and rows whose losses are measured."""

    model: nn.Module
    original: nn.Module | None
    tokenizer: Any
    rows: Any
    rounding: Rounding

    def added_to(self, report: MergeReport) -> MergeReport:
        """Return the report with the losses without the adapter, with it, and after each merge."""
        with disable_adapters(self.model):
            losses = {"base": self._loss(self.model)}
        losses["trained"] = self._loss(self.model)
        refused = {}
        for target in report.total.error:
            if target == "original":
                if self.original is None or not _has_active_adapter(self.original):
                    continue
                with disable_adapters(self.original):
                    losses[ORIGINAL_BASE] = self._loss(self.original)
            try:
                merged = merged_as(
                    self.model, self.original, target, self.rounding.name, self.rounding.seed
                )
            except ValueError as error:  # the scales of the base cannot hold the update
                if target not in FOUR_BITS:
                    raise
                refused[target] = str(error)
                continue
            losses[target] = self._loss(merged)
        return replace(report, losses=losses, refused=refused, rows=len(self.rows))

    def _loss(self, measured: nn.Module) -> float:
        """Return the loss on the rows, in nats per supervised token."""
        return evaluate(measured, self.tokenizer, self.rows, max_new_tokens=0).loss


def _has_active_adapter(model: nn.Module) -> bool:
    return any(layer.active for layer in lora_layers(model).values())


@torch.inference_mode()
def first_difference(model: nn.Module, other: nn.Module, *inputs: Tensor) -> str | None:
    """Return the first module without children whose output differs between two models.

    Args:
        model: A model.
        other: A model with the same modules, which run in the same order.
        *inputs: Positional inputs of both models.

    Returns:
        The name of the first module, in order of execution, whose outputs differ in any bit; None
        if all outputs are equal.
    """
    outputs = _leaf_outputs(model, inputs)
    other_outputs = _leaf_outputs(other, inputs)
    for (name, output), (other_name, other_output) in zip(outputs, other_outputs, strict=True):
        if name != other_name or not torch.equal(output, other_output):
            return name
    return None


def _leaf_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    """Run the model and return the output of each module without children, as they run."""
    outputs: list[tuple[str, Tensor]] = []

    def add_hook(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def record(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return module.register_forward_hook(record)

    hooks = []
    for name, module in named_modules(model):
        if not any(module.children()):
            hooks.append(add_hook(name, module))
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
