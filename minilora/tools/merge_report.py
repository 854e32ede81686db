"""What merging costs, measured on the weights before anything is written.

With W the weight the adapter was trained on, ΔW = Σ s · B A, and M(t) what would be stored at target t:

    size      ‖ΔW‖ / ‖W‖                     how much there is to lose
    error(t)  ‖M(t) − (W + ΔW)‖ / ‖ΔW‖        distance from the model that was trained; 1 = the adapter's whole effect
    cosine(t) of M(t) − base(t) with ΔW       how much of ΔW's direction is left

Targets: float32, bfloat16, float16 and nf4 (4-bit bases only) round W + ΔW, base(t) = W. "original" is the 16-bit
weight that W was quantised from, base(t) = W₁₆: M = W₁₆ + ΔW keeps ΔW and takes back the quantisation error, which the
adapter was trained to live with; its error is that error. Frobenius norms; W + ΔW in fp64, M as `merge` computes it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.lora.layer import LoRALayer
from minilora.lora.merging.merge import STORAGES, deltas, merged_weight
from minilora.lora.registry import lora_layers
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import dequantize_nf4, quantize_nf4

SHOWN = 10  # layers in the table


@dataclass(frozen=True)
class LayerReport:
    """One layer, or all of them as one long vector: size, and error and cosine by target (see above)."""

    name: str
    size: float
    error: dict[str, float]
    cosine: dict[str, float]


@dataclass(frozen=True)
class MergeReport:
    """Layers worst first, their total, and losses where someone measured them (by target, and "trained")."""

    layers: tuple[LayerReport, ...]
    total: LayerReport
    losses: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [f"{'error / cosine, by target':<34}‖ΔW‖/‖W‖" + "".join(f"{target:>16}" for target in self.total.error)]
        for layer in (*self.layers[:SHOWN], self.total):
            cells = (
                f"{layer.error[t]:.2g} / {layer.cosine[t]:.3f}" if t in layer.error else "" for t in self.total.error
            )
            rows.append(f"{layer.name[-33:]:<34}{layer.size:8.2%}" + "".join(f"{cell:>16}" for cell in cells))
        if len(self.layers) > SHOWN:
            rows.insert(-1, f"… {len(self.layers) - SHOWN} layers with a smaller error")
        return "\n".join(rows + [f"loss {target:<12}{loss:.4f}" for target, loss in self.losses.items()])


@torch.no_grad()
def merge_report(model: nn.Module, original: nn.Module | None = None) -> MergeReport:
    """Measure every layer with an active adapter; layers whose ΔW is zero are left out. Nothing is changed.

    original: a model with the same layer names that holds the weights `model` was quantised from.
    Raises ValueError if no active adapter does anything, or `original` lacks a layer or has it in another shape.
    """
    sums = {path: _sums(path, layer, original) for path, layer in lora_layers(model).items() if layer.active}
    sums = {path: found for path, found in sums.items() if found["float32"][0]}
    if not sums:
        raise ValueError("no active adapter changes anything: load_adapter, set_adapter or train first.")
    total: dict[str, Tensor] = {}
    for found in sums.values():
        total |= {target: total.get(target, 0) + value for target, value in found.items()}
    layers = sorted((_report(*item) for item in sums.items()), key=lambda layer: -max(layer.error.values()))
    return MergeReport(tuple(layers), _report("all layers", total))


def _sums(path: str, layer: LoRALayer, original: nn.Module | None) -> dict[str, Tensor]:
    """Target -> fp64 (‖ΔW‖², ‖error‖², ‖what is left‖², ⟨what is left, ΔW⟩, ‖W‖²), which add up over layers."""
    W, delta = merged_weight(layer.base_layer).double(), sum(deltas(layer, torch.float64))
    assert isinstance(delta, Tensor)
    found = {}
    for target, M, base in _targets(path, layer, W, original):
        left, error = M - base, M - W - delta
        pairs = (delta, delta), (error, error), (left, left), (left, delta), (W, W)
        found[target] = torch.stack([a.flatten() @ b.flatten() for a, b in pairs]).cpu()
    return found


def _targets(
    path: str, layer: LoRALayer, W: Tensor, original: nn.Module | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(target, M, base) in fp64; a layer that is not in 4 bits has no "nf4"."""
    merged, base = merged_weight(layer), layer.base_layer
    for target, dtype in STORAGES.items():
        if dtype is not None:
            yield target, merged.to(dtype).double(), W
        elif isinstance(base, NF4Linear):
            again = quantize_nf4(merged, base.blocksize, base.weight.double_quant)
            yield target, dequantize_nf4(again, torch.float32).double(), W
    if original is not None:
        weight = getattr(dict(original.named_modules(remove_duplicate=False)).get(path), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != W.shape:
            raise ValueError(f"original: expected a dense weight of shape {tuple(W.shape)} at {path}, got {weight}.")
        M = sum(deltas(layer, torch.float32), weight.detach().float()).to(weight.dtype)
        yield "original", M.double(), weight.detach().double()


def _report(name: str, sums: dict[str, Tensor]) -> LayerReport:
    error = {target: math.sqrt(e / d) for target, (d, e, *_) in sums.items()}
    cosine = {target: (dot / (d * left).sqrt()).nan_to_num(0).item() for target, (d, _, left, dot, _) in sums.items()}
    d, *_, w = sums["float32"]
    return LayerReport(name, (d / w).sqrt().item(), error, cosine)


@torch.inference_mode()
def first_difference(model: nn.Module, other: nn.Module, *inputs: Tensor) -> str | None:
    """The first module without children, in order of execution, whose output differs by a bit; None if none does."""
    outputs: list[tuple[str, object]] = []
    runs = []
    for one in (model, other):
        leaves = [(name, module) for name, module in one.named_modules() if not any(module.children())]
        hooks = [m.register_forward_hook(lambda _m, _i, y, n=name: outputs.append((n, y))) for name, m in leaves]
        try:
            one(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        runs.append([(name, y) for name, y in outputs if isinstance(y, Tensor)])
        outputs.clear()
    for (name, y), (again, z) in zip(*runs, strict=True):
        if name != again or not torch.equal(y, z):
            return name
    return None
