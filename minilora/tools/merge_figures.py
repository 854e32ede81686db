"""The figures of a merge that the weights show, by layer and target.

Let W be the weight that the adapter was trained on, ΔW = Σ s · B A, M(t) the weight that a merge
stores at target t, and ΔŴ(t) = M(t) − base(t) the change that is stored:

    size           ‖ΔW‖ / ‖W‖                     the size of the update relative to the weight
    projection(t)  ⟨ΔŴ, ΔW⟩ / ⟨ΔW, ΔW⟩            the part of ΔW that is stored; 1 is all of it
    error(t)       ‖M(t) − (W + ΔW)‖ / ‖ΔW‖        distance from the trained model
    cosine(t)      ⟨ΔŴ, ΔW⟩ / (‖ΔŴ‖ ‖ΔW‖)          direction of the stored change, with its noise

The targets float32, bfloat16, float16 and nf4 (4-bit bases only) store W + ΔW, with base(t) = W.
The targets "original" and "original-nf4" use W₁₆, the weight that W was quantised from. "original"
stores W₁₆ + ΔW in its dtype, with base(t) = W₁₆: it keeps ΔW but removes the quantisation error,
which was present during training; the error of this target is the quantisation error.
"original-nf4" quantises W₁₆ + ΔW, with base(t) = W. All norms are Frobenius norms. W + ΔW is
computed in fp64, and M as `merge` computes it.

Error and cosine do not tell what a merge costs, because noise counts in them as much as a lost
update. Stochastic rounding to 4 bits stores ΔW with a projection near 1 and noise that is several
times as long as ΔW: the cosine is 0.1, and the loss hardly changes. Nearest rounding stores almost
nothing of ΔW: the projection is near 0, and the loss is that of the base.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.common import named_modules
from minilora.lora.base_layers.dense_weight import dense_dtype
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.changes import deltas
from minilora.lora.merging.four_bits import (
    draw_codes,
    nearest_weight,
    original_weight,
    requantized_original,
    update,
)
from minilora.lora.merging.merge import STORAGES, merged_weight
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import dequantize_nf4

FOUR_BITS = ("nf4", "original-nf4")  # targets that store 4 bits


@dataclass(frozen=True)
class LayerReport:
    """The figures of one layer, or of all layers as one long vector.

    Attributes:
        name: Path of the layer in the model, or "all layers".
        size: ‖ΔW‖ / ‖W‖.
        error: Maps a target to its error.
        cosine: Maps a target to its cosine.
        projection: Maps a target to its projection.
    """

    name: str
    size: float
    error: dict[str, float]
    cosine: dict[str, float]
    projection: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounding:
    """Rounding of the target "nf4".

    Attributes:
        name: "stochastic" or "nearest".
        seed: Seed of the draws.
    """

    name: str = "stochastic"
    seed: int = 0


def layer_sums(
    path: str, layer: LoRALayer, original: nn.Module | None, rounding: Rounding
) -> dict[str, Tensor]:
    """Return by target the fp64 sums that the figures need; they add up over layers.

    The five sums are ‖ΔW‖², ‖M − W − ΔW‖², ‖ΔŴ‖², ⟨ΔŴ, ΔW⟩ and ‖W‖².

    Args:
        path: Path of the layer in the model.
        layer: A layer with an active adapter.
        original: The model that was quantised, or None.
        rounding: How the target "nf4" rounds.
    """
    W = merged_weight(layer.base_layer).double()  # (out, in)
    delta = sum(deltas(layer, torch.float64))  # (out, in)
    assert isinstance(delta, Tensor)
    sums = {}
    for target, M, base in _targets(path, layer, W, original, rounding):
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


def layer_report(name: str, sums: dict[str, Tensor]) -> LayerReport:
    """Compute the figures from the sums of `layer_sums`.

    Args:
        name: Name of the layer, or of several together.
        sums: The sums by target, added over the layers.
    """
    error = {}
    cosine = {}
    projection = {}
    for target, values in sums.items():
        delta_square, error_square, stored_square, stored_delta, _ = values
        error[target] = math.sqrt(error_square / delta_square)
        norms = (delta_square * stored_square).sqrt()
        cosine[target] = (stored_delta / norms).nan_to_num(0).item()
        projection[target] = (stored_delta / delta_square).item()
    delta_square, _, _, _, weight_square = sums["float32"]
    size = (delta_square / weight_square).sqrt().item()
    return LayerReport(name, size, error, cosine, projection)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape."""
    return a.flatten() @ b.flatten()


def _targets(
    path: str, layer: LoRALayer, W: Tensor, original: nn.Module | None, rounding: Rounding
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (target, M, base) in fp64; only a layer in 4 bits has the targets in 4 bits."""
    merged = merged_weight(layer)  # (out, in)
    base = layer.base_layer
    for target, dtype in STORAGES.items():
        if dtype is not None:
            yield target, merged.to(dtype).double(), W
        elif isinstance(base, NF4Linear):
            yield target, _in_four_bits(path, layer, base, rounding), W
    if original is None:
        return
    W16 = original_weight(path, W.shape, original).to(W.device)  # (out, in)
    stored = (update(layer) + W16).to(_dtype_at(path, original))  # (out, in)
    yield "original", stored.double(), W16.double()
    if isinstance(base, NF4Linear):
        quantized = requantized_original(layer, path, original)
        yield "original-nf4", dequantize_nf4(quantized, torch.float32).double(), W


def _in_four_bits(path: str, layer: LoRALayer, base: NF4Linear, rounding: Rounding) -> Tensor:
    """Return M of the target "nf4" in fp64, also where `merge` refuses it."""
    if rounding.name == "nearest":
        weight = nearest_weight(layer, base)
    else:
        weight = draw_codes(base.weight, update(layer), path, rounding.seed).weight
    return dequantize_nf4(weight, torch.float32).double()


def _dtype_at(path: str, model: nn.Module) -> torch.dtype:
    """Return the dtype of the weight at a path."""
    module = dict(named_modules(model, remove_duplicate=False))[path]
    return dense_dtype(unwrapped(module)) or torch.float32
