"""Steps between a weight and its 4 bits, in the names of the specification (nf4/reference.py).

    quantise         block → absmax → normalised → code → nibbles → byte
    double quantise  absmax → offset → centred absmax → nested absmax → nested code
    dequantise       byte → nibbles → code → level · absmax = W

Stored values can be shown at any time. The values that exist only while quantising (block,
normalised, the absmax before it was rounded to 8 bits) need the weight that was quantised. They are
recomputed from it, and must lead to the stored codes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minilora_kernels import NF4Weight, dequantize_nf4, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.reference import scaled_blocks, unpack

Row = tuple[Tensor, str, str]  # value, name, maths


def weight_rows(weight: NF4Weight, source: Tensor | None) -> Iterator[Row]:
    """Generate the steps of a 4-bit weight with n values in K blocks.

    Args:
        weight: The weight (out, in).
        source: The dense weight (out, in) that was quantised; None leaves out the steps that exist
            only while quantising.

    Yields:
        Value, name and maths of each step.

    Raises:
        ValueError: If `source` has another shape or other codes.
    """
    n = weight.numel
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 0xF], dim=1)  # (⌈n/2⌉, 2)
    code = unpack(weight.packed)[:n]  # (n,)
    if source is not None:
        yield from _quantisation_rows(weight, source, code)
    yield code.view(weight.shape), "code", "number of thresholds below normalised"
    yield nibbles, "nibbles", "pairs of codes"
    yield weight.packed, "byte", "16 · first nibble + second"
    if weight.nested_absmax is not None and weight.offset is not None:
        yield weight.offset, "offset", "mean(absmax)"
        if source is not None:
            _, absmax = scaled_blocks(_flat(source, weight), weight.blocksize)  # (K,)
            yield absmax - weight.offset, "centred absmax", "absmax - offset"
        yield weight.nested_absmax, "nested absmax", "max |absmax - offset| of 256 blocks"
        yield weight.scales, "nested code", "number of midpoints below centred / nested absmax"
        yield weight.absmax, "decoded absmax", "map[nested code] · nested absmax + offset"
    elif source is None:
        yield weight.scales, "absmax", "max |block|"
    level = nf4_codebook().to(code.device)[code.int()]  # (n,)
    yield level.view(weight.shape), "level", "value of code in the codebook"
    if source is not None:
        error = dequantize_nf4(weight, torch.float32) - source.to(weight.device)  # (out, in)
        yield error, "error", "level · absmax - the source"


def _flat(source: Tensor, weight: NF4Weight) -> Tensor:
    """Return the dense weight as the quantiser reads it: flat, in fp32."""
    return source.detach().to(weight.device).reshape(-1).float()


def _quantisation_rows(weight: NF4Weight, source: Tensor, code: Tensor) -> Iterator[Row]:
    """Generate the steps that exist only while quantising; refuse a source with other codes."""
    if source.shape != weight.shape:
        raise ValueError(
            f"source: expected the shape {tuple(weight.shape)}, got {tuple(source.shape)}."
        )
    flat = _flat(source, weight)  # (n,)
    B = weight.blocksize
    normalised, absmax = scaled_blocks(flat, B)  # (K, B), (K,)
    source_code = torch.bucketize(normalised, nf4_thresholds().to(flat.device))  # (K, B)
    source_code = source_code.reshape(-1)[: len(code)]  # (n,)
    wrong = int((source_code != code).sum())
    if wrong:
        raise ValueError(
            f"source: {wrong} of its {len(code)} codes differ from the stored ones. Give the "
            "tensor that was quantised, in its original dtype."
        )
    block = torch.nn.functional.pad(flat, (0, -len(flat) % B)).view(-1, B)  # (K, B)
    yield block, "block", f"the weight, {B} values a row"
    yield absmax, "absmax", "max |block|"
    yield normalised, "normalised", "block · (1 / absmax)"
