"""Measurement of the loss from merging, on the weights, before anything is written.

Let W be the weight that the adapter was trained on, ΔW = Σ s · B A, and M(t) the weight that a
merge would store at target t:

    size       ‖ΔW‖ / ‖W‖                      the size of the update relative to the weight
    error(t)   ‖M(t) − (W + ΔW)‖ / ‖ΔW‖         distance from the trained model; at 1 it is as large
                                               as the adapter's whole effect
    cosine(t)  of M(t) − base(t) with ΔW       the share of ΔW's direction that remains

The targets float32, bfloat16, float16 and nf4 (4-bit bases only) round W + ΔW, with base(t) = W.
The target "original" uses W₁₆, the 16-bit weight that W was quantised from, with base(t) = W₁₆.
There M = W₁₆ + ΔW keeps ΔW but removes the quantisation error, which was present during training;
the error of this target is the quantisation error. All norms are Frobenius norms. W + ΔW is
computed in fp64, and M as `merge` computes it.

The weights alone do not show what a merge costs: rounding is an error in random directions, which
may leave the loss unchanged. With held-out rows the report therefore measures losses L:

    kept(t) = (L(base) − L(t)) / (L(base) − L(trained))     the share of what the adapter learned

and ends in one sentence a target. Without rows it states that the cost is unknown.
"""

import math
from collections.abc import Iterator
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
from minilora.lora.base_layers.dense_weight import dense_dtype, dense_weight, no_dense_weight
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.changes import deltas
from minilora.lora.merging.merge import STORAGES, check_dense_weights, merge, merged_weight
from minilora.lora.registry import lora_layers
from minilora.quant.nf4_linear import NF4Linear
from minilora.tools.merge_conclusions import conclusion_from_weights, measured_conclusion
from minilora_kernels import dequantize_nf4, quantize_nf4

SHOWN = 10  # layers in the printed table


@dataclass(frozen=True)
class LayerReport:
    """The figures of one layer, or of all layers as one long vector.

    Attributes:
        name: Path of the layer in the model, or "all layers".
        size: ‖ΔW‖ / ‖W‖.
        error: Maps a target to its error.
        cosine: Maps a target to its cosine.
    """

    name: str
    size: float
    error: dict[str, float]
    cosine: dict[str, float]


@dataclass(frozen=True)
class MergeReport:
    """The figures of all layers; prints as a table.

    Attributes:
        layers: The layers with an effective adapter, largest error first.
        total: All layers as one long vector.
        losses: Maps a target, "trained" (with the adapter) or "base" (without it) to a measured
            loss; empty if no loss was measured.
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport
    losses: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        targets = list(self.total.error)
        columns = "".join(f"{target:>16}" for target in targets)
        lines = [f"{'error / cosine, by target':<34}‖ΔW‖/‖W‖{columns}"]
        for layer in self.layers[:SHOWN]:
            lines.append(_table_line(layer, targets))
        omitted = len(self.layers) - SHOWN
        if omitted > 0:
            lines.append(f"… {omitted} layers with a smaller error")
        lines.append(_table_line(self.total, targets))
        for target, loss in self.losses.items():
            lines.append(f"loss {target:<12}{loss:.4f}")
        return "\n".join([*lines, *self._sentences()])

    def _repr_html_(self) -> str:
        targets = list(self.total.error)
        rows = []
        for layer in [*self.layers[:SHOWN], self.total]:
            rows.append([layer.name, f"{layer.size:.2%}", *_cells(layer, targets)])
        if self.losses:
            losses = [_loss_text(self.losses.get(target)) for target in targets]
            rows.append(["loss", "", *losses])
        return html_table(["error / cosine", "‖ΔW‖/‖W‖", *targets], rows, self._sentences())

    @property
    def kept(self) -> dict[str, float]:
        """The share of what the adapter learned that each target keeps.

        Empty if no loss was measured, or if the adapter does not lower the loss on the rows.
        """
        base = self.losses.get("base", -math.inf)
        trained = self.losses.get("trained", math.inf)
        if not base > trained:
            return {}
        shares = {}
        for target in self.total.error:
            if target in self.losses:
                shares[target] = (base - self.losses[target]) / (base - trained)
        return shares

    @property
    def conclusions(self) -> dict[str, str]:
        """One sentence a target: what a merge into it keeps, and what to do."""
        kept = self.kept
        sentences = {}
        for target in self.total.error:
            if target in kept:
                sentences[target] = measured_conclusion(kept, target)
            else:
                sentences[target] = conclusion_from_weights(
                    target, self.total.error[target], self.total.cosine[target]
                )
        return sentences

    def _sentences(self) -> list[str]:
        """Return the conclusions as lines, with a remark on losses that say nothing."""
        lines = []
        if "base" in self.losses and not self.kept:
            lines.append(
                f"The adapter does not lower the loss on these rows ({self.losses['base']:.4f} "
                f"without it, {self.losses['trained']:.4f} with it), so they cannot show what a "
                "merge loses. Give rows of the adapter's task."
            )
        for target, sentence in self.conclusions.items():
            lines.append(f"merge into {target}: {sentence}")
        return lines


def _cells(layer: LayerReport, targets: list[str]) -> list[str]:
    """Return error and cosine of each target; empty where the layer lacks the target."""
    cells = []
    for target in targets:
        cell = ""
        if target in layer.error:
            cell = f"{layer.error[target]:.2g} / {layer.cosine[target]:.3f}"
        cells.append(cell)
    return cells


def _loss_text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


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
) -> MergeReport:
    """Measure every layer with an active adapter, without changing the model.

    Layers whose ΔW is zero are left out. With `data` the losses of the base, of the trained model
    and of each merge are measured too, one merged copy of the model at a time.

    Args:
        model: A model with an active adapter.
        original: A model with the same layer names that contains the weights `model` was
            quantised from; it adds the target "original". None leaves that target out. Its loss
            is measured if the same adapter is active in it.
        tokenizer: The model's tokenizer, for `data`.
        data: Held-out rows of the adapter's task, in any form that `train` accepts. None measures
            no loss.

    Returns:
        The figures by layer and in total, and one sentence a target.

    Raises:
        ValueError: No active adapter changes a weight, a dense weight cannot be read, `original`
            lacks a layer or contains it in another shape, or `data` has no `tokenizer`.
    """
    if data is not None and tokenizer is None:
        raise ValueError("data: the loss of rows needs the tokenizer, which is None: pass it.")
    model = unwrap_model(model)
    check_dense_weights(model)
    sums_by_layer: dict[str, dict[str, Tensor]] = {}
    active = {path: layer for path, layer in lora_layers(model).items() if layer.active}
    with ProgressBar("measure", len(active), "layer") as bar:
        for path, layer in active.items():
            sums = _sums(path, layer, original)
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
    layers = [_report(path, sums) for path, sums in sums_by_layer.items()]
    layers.sort(key=lambda layer: -max(layer.error.values()))
    report = MergeReport(tuple(layers), _report("all layers", total))
    if data is None:
        return report
    return replace(report, losses=_losses(model, original, list(total), tokenizer, data))


def merged_as(model: nn.Module, original: nn.Module | None, target: str) -> nn.Module:
    """Return the merged model as a target of the report stores it.

    Args:
        model: The model with its active adapter.
        original: The model that was quantised, with the same adapter; for the target "original".
        target: "original", or a key of STORAGES.
    """
    if target == "original":
        assert original is not None
        return merge(original)
    merged = merge(model, target)
    dtype = STORAGES.get(target)
    return merged if dtype is None else merged.to(dtype)


def _losses(
    model: nn.Module, original: nn.Module | None, targets: list[str], tokenizer: Any, data: Any
) -> dict[str, float]:
    """Return the losses without the adapter, with it, and after each merge."""
    rows = read_dataset(data)

    def loss(measured: nn.Module) -> float:
        return evaluate(measured, tokenizer, rows, max_new_tokens=0).loss

    with disable_adapters(model):
        losses = {"base": loss(model)}
    losses["trained"] = loss(model)
    for target in targets:
        if target == "original" and not _has_active_adapter(original):
            continue
        losses[target] = loss(merged_as(model, original, target))
    return losses


def _has_active_adapter(model: nn.Module | None) -> bool:
    return model is not None and any(layer.active for layer in lora_layers(model).values())


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


def _sums(path: str, layer: LoRALayer, original: nn.Module | None) -> dict[str, Tensor]:
    """Return by target the fp64 sums that the figures need; they add up over layers.

    The five sums are ‖ΔW‖², ‖M − W − ΔW‖², ‖M − base‖², ⟨M − base, ΔW⟩ and ‖W‖².
    """
    W = merged_weight(layer.base_layer).double()  # (out, in)
    delta = sum(deltas(layer, torch.float64))  # (out, in)
    assert isinstance(delta, Tensor)
    sums = {}
    for target, M, base in _targets(path, layer, W, original):
        stored = M - base  # (out, in)
        error = M - W - delta  # (out, in)
        values = [
            _inner(delta, delta),
            _inner(error, error),
            _inner(stored, stored),
            _inner(stored, delta),
            _inner(W, W),
        ]
        sums[target] = torch.stack(values).cpu()  # (5,)
    return sums


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape."""
    return a.flatten() @ b.flatten()


def _targets(
    path: str, layer: LoRALayer, W: Tensor, original: nn.Module | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (target, M, base) in fp64; only a layer in 4 bits has the target "nf4"."""
    merged = merged_weight(layer)  # (out, in)
    base = layer.base_layer
    for target, dtype in STORAGES.items():
        if dtype is not None:
            yield target, merged.to(dtype).double(), W
        elif isinstance(base, NF4Linear):
            quantized = quantize_nf4(merged, base.blocksize, base.weight.double_quant)
            yield target, dequantize_nf4(quantized, torch.float32).double(), W
    if original is None:
        return
    module = dict(named_modules(original, remove_duplicate=False)).get(path)
    if module is not None:
        module = unwrapped(module)  # the same adapter may be loaded there
    if module is None or no_dense_weight(module) or dense_weight(module).shape != W.shape:
        raise ValueError(
            f"original: expected a dense weight of shape {tuple(W.shape)} at {path}, got {module}. "
            "Pass the model in 16 or 32 bits."
        )
    original_weight = dense_weight(module)  # (out, in)
    merged_original = sum(deltas(layer, torch.float32), original_weight)  # (out, in)
    stored = merged_original.to(dense_dtype(module) or torch.float32)  # (out, in)
    yield "original", stored.double(), original_weight.double()


def _report(name: str, sums: dict[str, Tensor]) -> LayerReport:
    """Compute the figures from the sums of `_sums`."""
    error = {}
    cosine = {}
    for target, values in sums.items():
        delta_square, error_square, stored_square, stored_delta, _ = values
        error[target] = math.sqrt(error_square / delta_square)
        norms = (delta_square * stored_square).sqrt()
        cosine[target] = (stored_delta / norms).nan_to_num(0).item()
    delta_square, _, _, _, weight_square = sums["float32"]
    size = (delta_square / weight_square).sqrt().item()
    return LayerReport(name, size, error, cosine)


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
