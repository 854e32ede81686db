"""The steps between a weight and its 4 bits, in the names of the specification (minilora_kernels/nf4/reference.py).

    quantise      block → absmax → normalised → code → nibbles → byte
    absmax again  centred absmax → nested absmax → nested code, if double-quantised
    dequantise    byte → nibbles → code → level · absmax = W

What is stored can be shown at any time. What was there only before (block, normalised, the absmax that was rounded to
8 bits) needs the weight that was quantised: it is computed anew from it, and must lead to the stored codes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minilora_kernels import NF4Weight, dequantize_nf4, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.reference import scaled_blocks, unpack

Row = tuple[Tensor, str, str]  # value, name, maths


def weight_rows(weight: NF4Weight, source: Tensor | None) -> Iterator[Row]:
    """The steps of a weight (out, in), n values in K blocks; with `source`, the weight that was quantised, all.

    ValueError if `source` has another shape or other codes.
    """
    n = weight.numel
    pairs = torch.stack([weight.packed >> 4, weight.packed & 0xF], dim=1)  # (⌈n/2⌉, 2)
    code = unpack(weight.packed)[:n]  # (n,)
    if source is not None:
        yield from _before(weight, source.detach().to(weight.device), code)
    yield code.view(weight.shape), "code", "thresholds below normalised, 0 to 15"
    yield pairs, "nibbles", "two codes side by side"
    yield weight.packed, "byte", "16 · first nibble + second"
    absmax = weight.scales
    if weight.nested_absmax is not None and weight.offset is not None:
        yield weight.offset, "offset", "mean(absmax)"
        yield weight.nested_absmax, "nested absmax", "max |absmax - offset| of 256 blocks"
        yield absmax, "nested code", "midpoints below (absmax - offset) / nested absmax"
        absmax = weight.absmax
        yield absmax, "decoded absmax", "map[nested code] · nested absmax + offset"
    elif source is None:
        yield absmax, "absmax", "max |block|"
    yield nf4_codebook().to(code.device)[code.int()].view(weight.shape), "level", "the codebook's value of code"
    if source is not None:
        yield dequantize_nf4(weight, torch.float32) - source.to(weight.device), "error", "level · absmax - the source"


def _before(weight: NF4Weight, source: Tensor, code: Tensor) -> Iterator[Row]:
    """What was there while quantising."""
    if source.shape != weight.shape:
        raise ValueError(f"source: expected the shape {tuple(weight.shape)}, got {tuple(source.shape)}.")
    flat, B = source.reshape(-1).float(), weight.blocksize
    normalised, absmax = scaled_blocks(flat, B)  # (K, B), (K,)
    found = torch.bucketize(normalised, nf4_thresholds().to(flat.device)).reshape(-1)[: len(code)]
    if wrong := int((found != code).sum()):
        raise ValueError(
            f"source: {wrong} of {len(code)} of its codes are others than the stored ones. Give the tensor that was "
            "quantised, in the dtype it had then."
        )
    yield torch.nn.functional.pad(flat, (0, -len(flat) % B)).view(-1, B), "block", f"the weight, {B} values a row"
    yield absmax, "absmax", "max |block|"
    yield normalised, "normalised", "block · (1 / absmax)"
    if weight.offset is not None:
        yield absmax - weight.offset, "centred absmax", "absmax - offset"
