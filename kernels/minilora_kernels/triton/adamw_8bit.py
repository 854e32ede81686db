# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernel for one step of AdamW with both moments in 8 bits: one launch, 16 bytes a parameter.

The reference implementation is `AdamW8bit` (minilora/training/optim/adamw_8bit.py). This kernel has
its bits: it rounds every product, sum, root and quotient where the reference does. 256 values share
a scale; such a block is a row:

    m, v    from codes and scales           m = map[code] * scale
    p       the update of AdamW, in fp32
    m, v    back to codes                   y = m * (1 / max |m|)       code = midpoints below y

A binary search would take 8 comparisons for a code. One is enough, because the map consists of
seven straight lines. Decade i, up to 10^(i-6), has N_i = 2^i values of each sign (2^(i+1) in the
unsigned map) at equal distances. Therefore

    place_i(y) = y * N_i / (0.9 * 10^(i-6))  +  N_i * 8/9 - N_0 + 1/2

is the number of midpoints below y, up to a half, as if the line of decade i had no ends. Slopes
fall from decade to decade, and neighbouring lines cross where the decades meet, so that the
smallest of the seven values is the right one. Its integer part is the number of a bin that holds
one midpoint, a quarter of a bin or more away from either end. That midpoint decides:

    code = bin + (y > midpoint of the bin)
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, midpoints
from minilora_kernels.triton.launch import cdiv, run, table
from minilora_kernels.triton.nf4_dequantize import lookup

BLOCK = 256  # values that share a scale


@triton.jit
def _scaled(x):
    """Return max |x| (rows, 1, 1) and x / max |x| for fp32 (rows, words, 4).

    A maximum below 2^-126 counts as 2^-126 in the division.
    """
    # read as integers, positive floats keep their order, infinity is above them and NaN above
    # infinity: the maximum loses neither
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # of |x|
    bits = tl.max(tl.max(bits, axis=2), axis=1)[:, None, None]
    least = tl.maximum(bits, 0x00800000)  # 2^-126, the smallest normal number
    inverse = tl.div_rn(1.0, least.to(tl.float32, bitcast=True))
    return bits.to(tl.float32, bitcast=True), x * inverse


@triton.jit
def _codes(y, midpoints_ptr, SIGNED: tl.constexpr):
    """Return the codes of scaled values, int32 of the same shape.

    midpoints_ptr: fp32 (256,), made by `_signed_midpoints` or `_unsigned_midpoints`.
    """
    FIRST: tl.constexpr = 1 if SIGNED else 2  # N_0: values of each sign in decade 0
    magnitude = tl.abs(y)
    place = tl.fma(magnitude, FIRST / 0.9e-6, 8192.5 - FIRST / 9)
    for i in tl.static_range(1, 7):
        line = tl.fma(
            magnitude,
            (FIRST << i) / (0.9 * 10.0 ** (i - 6)),
            8192.5 + (FIRST << i) * 8 / 9 - FIRST,
        )
        place = tl.minimum(place, line)
    # near 2^13 the lowest ten bits of the mantissa are the fraction, the eight above the integer
    bin = place.to(tl.int32, bitcast=True) >> 10
    if SIGNED:  # 0, 1, 2, ... upwards from zero, -1, -2, -3, ... downwards
        bin = (bin ^ (y.to(tl.int32, bitcast=True) >> 31)) + 128
    bin = bin & 255  # last, so that a NaN reads inside the table too
    entries = tl.load(midpoints_ptr + tl.arange(0, 256))
    midpoint = lookup(midpoints_ptr, entries, bin)
    # y > midpoint is the sign of midpoint - y, which needs no predicate: shift it down and subtract
    above = (midpoint - y).to(tl.int32, bitcast=True) >> 31  # -1 or 0
    return bin - above - (1 if SIGNED else 0)


@triton.jit
def _adamw_8bit(
    p_ptr,  # fp32 (n,): parameters
    g_ptr,  # fp32 (n,): gradient
    m_ptr,  # int32 (64 K,): codes of the first moment, 4 a word
    m_scale_ptr,  # fp32 (K,)
    v_ptr,  # int32 (64 K,): codes of the second moment, 4 a word
    v_scale_ptr,  # fp32 (K,)
    signed_map_ptr,  # fp32 (256,): map of the first moment
    map_ptr,  # fp32 (256,): map of the second moment
    signed_midpoints_ptr,  # fp32 (256,)
    midpoints_ptr,  # fp32 (256,)
    n_elements,  # n
    n_rows,  # K = ceil(n/256)
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    correction,  # 1 / sqrt(1 - beta2^t)
    eps,
    decay,  # 1 - lr * weight_decay
    rate,  # -lr / (1 - beta1^t)
    ROWS: tl.constexpr,  # blocks a program
):
    """Update ROWS blocks of 64 words of 4 values."""
    program = tl.program_id(0).to(tl.int64)  # there may be more than 2^31 values
    row_idx = program * ROWS + tl.arange(0, ROWS)[:, None]
    word_offsets = row_idx * 64 + tl.arange(0, 64)[None, :]
    offsets = word_offsets[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    mask = offsets < n_elements
    row_mask = row_idx < n_rows

    # load
    p = tl.load(p_ptr + offsets, mask=mask, other=0)
    g = tl.load(g_ptr + offsets, mask=mask, other=0)
    shift = (tl.arange(0, 4) * 8)[None, None, :]
    m_word = tl.load(m_ptr + word_offsets, mask=row_mask, other=0)
    m_code = (m_word[:, :, None] >> shift) & 255
    v_word = tl.load(v_ptr + word_offsets, mask=row_mask, other=0)
    v_code = (v_word[:, :, None] >> shift) & 255
    m_scale = tl.load(m_scale_ptr + row_idx, mask=row_mask, other=0)[:, :, None]
    v_scale = tl.load(v_scale_ptr + row_idx, mask=row_mask, other=0)[:, :, None]
    m_map = tl.load(signed_map_ptr + tl.arange(0, 256))
    m = lookup(signed_map_ptr, m_map, m_code) * m_scale
    v_map = tl.load(map_ptr + tl.arange(0, 256))
    v = lookup(map_ptr, v_map, v_code) * v_scale

    # compute: m = beta1 m + (1 - beta1) g                  v = beta2 v + (1 - beta2) g^2
    #          p = p (1 - lr wd) + rate m / (sqrt(v) correction + eps)
    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    p = p * decay
    p = p + tl.div_rn(m, tl.sqrt_rn(v) * correction + eps) * rate
    m_scale, m = _scaled(m)
    v_scale, v = _scaled(v)
    m_word = tl.sum(_codes(m, signed_midpoints_ptr, True) << shift, axis=2)
    v_word = tl.sum(_codes(v, midpoints_ptr, False) << shift, axis=2)

    # store
    tl.store(p_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + word_offsets, m_word, mask=row_mask)
    tl.store(v_ptr + word_offsets, v_word, mask=row_mask)
    tl.store(m_scale_ptr + row_idx[:, :, None], m_scale, mask=row_mask[:, :, None])
    tl.store(v_scale_ptr + row_idx[:, :, None], v_scale, mask=row_mask[:, :, None])


# ---- launcher


def step(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Update the parameters and both moments in place.

    Args:
        p: Parameters, fp32 of shape (n,).
        g: Gradient, fp32 of shape (n,).
        moments: Codes, uint8 of shape (K, 256), and scales, fp32 of shape (K,), of the first
            moment, then of the second, with K = ceil(n / 256).
        numbers: beta1, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 - beta2^t), eps,
            1 - lr * weight_decay, and -lr / (1 - beta1^t).
    """
    m, m_scale, v, v_scale = moments
    m_words = m.view(-1).view(torch.int32)  # (64 K,)
    v_words = v.view(-1).view(torch.int32)  # (64 K,)
    tables = (
        table(_signed_map, p.device),
        table(_unsigned_map, p.device),
        table(_signed_midpoints, p.device),
        table(_unsigned_midpoints, p.device),
    )
    rows = len(m)
    arguments = (p, g, m_words, m_scale, v_words, v_scale, *tables, len(p), rows, *numbers)

    def programs(ROWS: int) -> int:
        return cdiv(rows, ROWS)

    run("adamw_8bit", _adamw_8bit, programs, *arguments)


def _signed_map() -> Tensor:
    """Return the dynamic map of the first moment, fp32 (256,)."""
    return dynamic_map()


def _unsigned_map() -> Tensor:
    """Return the dynamic map of the second moment, fp32 (256,)."""
    return dynamic_map(signed=False)


def _signed_midpoints() -> Tensor:
    """Return the midpoint of each bin of the signed map, fp32 (256,).

    The lowest bin of the negative values has no midpoint, because -1 is not in the map.
    """
    open_end = torch.tensor([-torch.inf], dtype=torch.float32, device="cpu")
    return torch.cat([open_end, midpoints(dynamic_map())])


def _unsigned_midpoints() -> Tensor:
    """Return the midpoint of each bin of the unsigned map, fp32 (256,); the last is never read."""
    open_end = torch.tensor([torch.inf], dtype=torch.float32, device="cpu")
    return torch.cat([midpoints(dynamic_map(signed=False)), open_end])
