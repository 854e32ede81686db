"""Rounding of a merged weight to 4 bits.

A stored value is W = level[c] · absmax, with the code c and the scale absmax of its block. In units
of the scale, the merged value is

    x = level[c] + ΔW / absmax,        lo ≤ x ≤ hi        lo, hi: the two neighbouring levels

    nearest       the code of the level nearest to x, after new scales were computed
    stochastic    P(code of hi) = (x − lo) / (hi − lo), else the code of lo; the scales of the base

The base is a fixed point of nearest rounding: W is exactly on a level, |ΔW| / absmax is about 0.001
for a small adapter, and half of the narrowest gap between two levels is 0.040. So nearest rounding
returns c, and what the adapter learned is lost. With stochastic rounding

    E[level[code]]   = lo + P · (hi − lo) = x                 every value is right on average
    Var[level[code]] = (x − lo) · (hi − x) ≤ |ΔW| / absmax · (hi − lo)

and a product with many inputs adds the values, so that their independent errors mostly cancel. A
value without an update keeps its code. The variance grows only as fast as |ΔW|: a small adapter
moves few codes. For an update as large as a gap, the variance is that of the gap itself, and new
scales may be worth more than the right average: compare both with `merge_report`.

The draws depend on (seed, name of the layer) only, not on the order of the layers, on the number of
threads or on the device. The scales keep their bytes. Therefore an x beyond the outermost levels,
±1, takes the outermost level, and a block whose scale is zero stays zero; a layer that would lose
more than half of ‖ΔW‖² in this way is refused.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import named_modules
from minilora.lora.base_layers.dense_weight import dense_weight, no_dense_weight
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.changes import deltas
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import NF4Weight, nf4_codebook, quantize_nf4
from minilora_kernels.nf4.reference import TINY, pack, unpack

ROUNDINGS = ("stochastic", "nearest")
MOST_LOST = 0.5  # largest share of ‖ΔW‖² that may lie beyond the outermost levels
CHUNK = 1 << 20  # values at a time; a multiple of 4096, the largest block


@dataclass(frozen=True)
class DrawnCodes:
    """The result of stochastic rounding.

    Attributes:
        weight: The new codes with the scales of the base, whose memory they share.
        lost: Share of ‖ΔW‖² beyond the outermost levels, from 0 to 1.
    """

    weight: NF4Weight
    lost: float


def check_rounding(rounding: str) -> None:
    """Check the name of a rounding.

    Args:
        rounding: A name.

    Raises:
        ValueError: The name is not in ROUNDINGS.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}.")


def four_bit_weight(layer: LoRALayer, name: str, rounding: str, seed: int) -> NF4Weight:
    """Return W + Σ s · B A in 4 bits, in the format of the base.

    With stochastic rounding the scales share the memory of the base.

    Args:
        layer: A layer with an active adapter on an NF4Linear.
        name: Path of the layer in the model, on which the draws depend.
        rounding: A name of ROUNDINGS.
        seed: Seed of the draws.

    Raises:
        ValueError: An update is not finite, or the scales of the base cannot hold half of it.
    """
    base = layer.base_layer
    assert isinstance(base, NF4Linear)
    if rounding == "nearest":
        return nearest_weight(layer, base)
    drawn = draw_codes(base.weight, update(layer), name, seed)
    if drawn.lost > MOST_LOST:
        raise ValueError(
            f"{name}: {drawn.lost:.0%} of the update's squared norm lies beyond the largest value "
            "that the 4-bit scales of the base can store, expected at most half. "
            "Merge with rounding='nearest', which computes new scales, or into 16 bits."
        )
    return drawn.weight


def nearest_weight(layer: LoRALayer, base: NF4Linear) -> NF4Weight:
    """Return W + Σ s · B A quantised with the settings of the base, with new scales.

    Args:
        layer: A layer with an active adapter.
        base: Its base.
    """
    merged = update(layer).add_(base.dequantize(torch.float32))  # (out, in)
    weight = quantize_nf4(merged, base.blocksize, base.weight.double_quant)
    return replace(weight, dtype=base.dtype)


def original_weight(path: str, shape: torch.Size, original: nn.Module) -> Tensor:
    """Return the weight W₁₆ that a 4-bit weight was quantised from, in fp32.

    Args:
        path: Path of the layer in both models.
        shape: Shape of the weight.
        original: The model in 16 or 32 bits, with or without adapters.

    Raises:
        ValueError: `original` has no dense weight of this shape at `path`.
    """
    module = dict(named_modules(original, remove_duplicate=False)).get(path)
    if module is not None:
        module = unwrapped(module)  # the same adapter may be loaded there
    if module is None or no_dense_weight(module) or dense_weight(module).shape != shape:
        raise ValueError(
            f"original: expected a dense weight of shape {tuple(shape)} at {path}, got {module}. "
            "Pass the model in 16 or 32 bits."
        )
    return dense_weight(module)


def requantized_original(layer: LoRALayer, path: str, original: nn.Module) -> NF4Weight:
    """Return W₁₆ + Σ s · B A quantised with the settings of the base, with new scales.

    W₁₆ is not on the levels, so that nearest rounding keeps the update on average: about as many
    values are just below a threshold as just above it.

    Args:
        layer: A layer with an active adapter on an NF4Linear.
        path: Path of the layer in both models.
        original: The model that the base was quantised from.

    Raises:
        ValueError: `original` has no dense weight of this shape at `path`.
    """
    base = layer.base_layer
    assert isinstance(base, NF4Linear)
    delta = update(layer)  # (out, in)
    delta.add_(original_weight(path, delta.shape, original).to(delta.device))
    weight = quantize_nf4(delta, base.blocksize, base.weight.double_quant)
    return replace(weight, dtype=base.dtype)


def update(layer: LoRALayer) -> Tensor:
    """Return Σ s · B A over the active adapters, in fp32.

    Args:
        layer: A layer with an active adapter.

    Returns:
        The change of the weight in the layout of the base, in memory of its own.
    """
    total = None
    for delta in deltas(layer, torch.float32):
        total = delta.contiguous() if total is None else total.add_(delta)
    assert total is not None
    return total


@torch.no_grad()
def draw_codes(weight: NF4Weight, delta: Tensor, name: str, seed: int) -> DrawnCodes:
    """Round W + ΔW to one of the two neighbouring levels of each value, at random.

    Args:
        weight: The 4-bit W of n values.
        delta: ΔW, fp32, with the shape of W.
        name: Path of the layer, on which the draws depend.
        seed: Seed of the draws.

    Returns:
        The weight with the drawn codes, and the share of ΔW that its scales cannot store.

    Raises:
        ValueError: ΔW is not finite.
    """
    if not torch.isfinite(delta).all():
        raise ValueError(f"{name}: the update of the weight is not finite; the adapter is damaged.")
    generator = torch.Generator("cpu").manual_seed(_draw_seed(seed, name))
    levels = nf4_codebook().to(weight.device)  # (16,)
    delta_N = delta.reshape(-1)  # (n,)
    absmax_K = weight.absmax  # (K,)
    packed = torch.empty_like(weight.packed)  # (ceil(n / 2),)
    lost_square = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.numel, CHUNK):
        stop = min(start + CHUNK, weight.numel)
        half = slice(start // 2, (stop + 1) // 2)  # of the packed bytes
        first_block = start // weight.blocksize
        last_block = -(-stop // weight.blocksize)
        scale_N = absmax_K[first_block:last_block].repeat_interleave(weight.blocksize)
        scale_N = scale_N[: stop - start]  # (N',)
        inverse_N = torch.where(scale_N.abs() < TINY, 0.0, 1 / scale_N)  # (N',)
        old_N = levels[unpack(weight.packed[half])[: stop - start].int()]  # (N',)
        # x = level[c] + ΔW / absmax
        x_N = old_N + delta_N[start:stop] * inverse_N  # (N',)
        draws_N = torch.rand(stop - start, generator=generator, dtype=torch.float32, device="cpu")
        codes_N = _neighbour(x_N, levels, draws_N.to(weight.device))  # (N',)
        odd = len(codes_N) % 2
        packed[half] = pack(F.pad(codes_N, (0, odd), value=7))  # 7 is the level 0
        storable_N = (x_N.clamp(-1, 1) - old_N) * scale_N  # (N',)
        lost_square += (delta_N[start:stop] - storable_N).double().square().sum()
    delta_square = delta_N.double().square().sum()
    lost = 0.0
    if delta_square > 0:
        lost = (lost_square / delta_square).item()
    return DrawnCodes(replace(weight, packed=packed), lost)


def _neighbour(x_N: Tensor, levels: Tensor, draws_N: Tensor) -> Tensor:
    """Return the code of the upper neighbour of x where the draw is below its probability.

    Beyond the outermost levels the probability is below 0 or at least 1, which is the outermost
    code.
    """
    upper_N = torch.bucketize(x_N, levels, out_int32=True).clamp(1, len(levels) - 1)  # (N',)
    lo_N = levels[upper_N - 1]  # (N',)
    hi_N = levels[upper_N]  # (N',)
    # P = (x − lo) / (hi − lo)
    probability_N = (x_N - lo_N) / (hi_N - lo_N)  # (N',)
    codes_N = torch.where(draws_N < probability_N, upper_N, upper_N - 1)  # (N',)
    return codes_N.to(torch.uint8)


def _draw_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed of a layer's draws.

    It differs from the seed of the layer's A (inject.py): with equal seeds the draws would be the
    values of A, and not independent of ΔW.
    """
    digest = hashlib.sha256(f"{seed}:{name}:4-bit merge".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
