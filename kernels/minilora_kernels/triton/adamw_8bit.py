# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""One step of AdamW with both moments in 8 bits, on a GPU, in one launch: 16 bytes of traffic a parameter and no more.

The plain form is `AdamW8bit` (minilora/training/optim/adamw_8bit.py), whose bits this kernel has: every product, sum,
root and quotient is rounded where it is rounded there. 256 values share a scale, one block a row:

    m, v    from codes and scales           m = map[code] * scale
    p       AdamW's update, in fp32
    m, v    back to codes                   y = m * (1 / max |m|)       code = number of the map's 255 midpoints below y

A code takes 8 comparisons by halving. Here it takes one, as the map is seven straight lines: decade i, up to 10^(i-6),
holds N_i = 2^i values of each sign (the unsigned map 2^(i+1)) at equal distances, so that

    place_i(y) = y * N_i / (0.9 * 10^(i-6))  +  N_i * 8/9 - N_0 + 1/2

counts the midpoints of decade i below y, give or take a half, as if the line had no end. Slopes fall from decade to
decade and neighbours meet where the decades do, so the least of the seven is the right one. Its whole number names a
bin that holds one midpoint, a quarter of a bin or more from either end, and the midpoint itself settles the rest:

    code = bin + (y > the bin's own midpoint)
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, midpoints
from minilora_kernels.triton.launch import run, table
from minilora_kernels.triton.nf4_dequantize import lookup

BLOCK = 256  # values that share a scale


@triton.jit
def _scaled(x):
    """(rows, words, 4) fp32 -> max |x| (rows, 1, 1), and x / max |x|; what is below 2^-126 counts as that."""
    # read as integers, positive floats keep their order, with infinity above and NaN on top: max loses neither
    bits = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=1)[:, None, None]
    least = tl.maximum(bits, 0x00800000)  # 2^-126, the smallest normal
    inverse = tl.div_rn(1.0, least.to(tl.float32, bitcast=True))
    return bits.to(tl.float32, bitcast=True), x * inverse


@triton.jit
def _codes(y, midpoints_ptr, SIGNED: tl.constexpr):
    """Scaled values -> codes, int32 of the same shape. midpoints_ptr: fp32 (256,), see `_padded_midpoints`."""
    FIRST: tl.constexpr = 1 if SIGNED else 2  # values of each sign in decade 0
    magnitude = tl.abs(y)
    place = tl.fma(magnitude, FIRST / 0.9e-6, 8192.5 - FIRST / 9)
    for i in tl.static_range(1, 7):
        line = tl.fma(magnitude, (FIRST << i) / (0.9 * 10.0 ** (i - 6)), 8192.5 + (FIRST << i) * 8 / 9 - FIRST)
        place = tl.minimum(place, line)
    # near 2^13 the lowest ten bits of the mantissa are the fraction, the eight above them the whole number
    bin = (place.to(tl.int32, bitcast=True) >> 10) & 255
    if SIGNED:  # 0, 1, 2 ... upwards from zero, -1, -2, -3 ... downwards
        bin = (bin ^ (y.to(tl.int32, bitcast=True) >> 31)) + 128
    midpoint = lookup(midpoints_ptr, tl.load(midpoints_ptr + tl.arange(0, 256)), bin)
    # y > midpoint is the sign of midpoint - y, which needs no predicate: shift it down and subtract
    above = (midpoint - y).to(tl.int32, bitcast=True) >> 31  # -1 or 0
    return bin - above - (1 if SIGNED else 0)


@triton.jit
def _step(
    p_ptr,  # fp32 (n,): parameters
    g_ptr,  # fp32 (n,): gradient
    m_ptr,  # int32 (64 K,): codes of the first moment, 4 a word
    m_scale_ptr,  # fp32 (K,)
    v_ptr,  # int32 (64 K,): codes of the second
    v_scale_ptr,  # fp32 (K,)
    signed_map_ptr,  # fp32 (256,): of the first moment
    map_ptr,  # fp32 (256,): of the second
    signed_midpoints_ptr,  # fp32 (256,)
    midpoints_ptr,  # fp32 (256,)
    n,  # values
    n_rows,  # K = ceil(n/256)
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    correction,  # 1 / sqrt(1 - beta2^t)
    eps,
    decay,  # 1 - lr weight_decay
    rate,  # -lr / (1 - beta1^t)
    ROWS: tl.constexpr,  # blocks a program
):
    # who am I: ROWS blocks of 64 words of 4 values
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    word = row * 64 + tl.arange(0, 64)[None, :]
    value = word[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    inside, there = value < n, row < n_rows

    # load
    p = tl.load(p_ptr + value, mask=inside, other=0)
    g = tl.load(g_ptr + value, mask=inside, other=0)
    shift = (tl.arange(0, 4) * 8)[None, None, :]
    m_code = (tl.load(m_ptr + word, mask=there, other=0)[:, :, None] >> shift) & 255
    v_code = (tl.load(v_ptr + word, mask=there, other=0)[:, :, None] >> shift) & 255
    m_scale = tl.load(m_scale_ptr + row, mask=there, other=0)[:, :, None]
    v_scale = tl.load(v_scale_ptr + row, mask=there, other=0)[:, :, None]
    m = lookup(signed_map_ptr, tl.load(signed_map_ptr + tl.arange(0, 256)), m_code) * m_scale
    v = lookup(map_ptr, tl.load(map_ptr + tl.arange(0, 256)), v_code) * v_scale

    # compute: m = beta1 m + (1 - beta1) g; v likewise of g^2; p = p (1 - lr wd) - rate m / (sqrt(v) correction + eps)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay + tl.div_rn(m, tl.sqrt_rn(v) * correction + eps) * rate
    m_scale, m = _scaled(m)
    v_scale, v = _scaled(v)
    m_code = tl.sum(_codes(m, signed_midpoints_ptr, True) << shift, axis=2)
    v_code = tl.sum(_codes(v, midpoints_ptr, False) << shift, axis=2)

    # store
    tl.store(p_ptr + value, p, mask=inside)
    tl.store(m_ptr + word, m_code, mask=there)
    tl.store(v_ptr + word, v_code, mask=there)
    tl.store(m_scale_ptr + row[:, :, None], m_scale, mask=there[:, :, None])
    tl.store(v_scale_ptr + row[:, :, None], v_scale, mask=there[:, :, None])


# ---- launcher


def step(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Moves p, fp32 (n,), and both moments in place.

    moments: codes uint8 (K, 256) and scales fp32 (K,) of the first, then of the second, K = ceil(n/256).
    numbers: beta1, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 - beta2^t), eps, 1 - lr weight_decay, -lr / (1 - beta1^t).
    """
    m, m_scale, v, v_scale = moments
    words = m.view(-1).view(torch.int32), m_scale, v.view(-1).view(torch.int32), v_scale
    tables = (table(make, p.device) for make in (_signed_map, _unsigned_map, _signed_midpoints, _unsigned_midpoints))
    rows = len(m)
    arguments = (p, g, *words, *tables, len(p), rows, *numbers)
    run("adamw_8bit", _step, lambda ROWS: -(-rows // ROWS), *arguments)


def _signed_map() -> Tensor:
    return dynamic_map()


def _unsigned_map() -> Tensor:
    return dynamic_map(signed=False)


def _signed_midpoints() -> Tensor:
    """fp32 (256,): an open end below, as the lowest bin of the negatives has no midpoint: no -1 is in the map."""
    return torch.cat([torch.tensor([-torch.inf], device="cpu"), midpoints(dynamic_map())])


def _unsigned_midpoints() -> Tensor:
    """fp32 (256,): the last is never asked for."""
    return torch.cat([midpoints(dynamic_map(signed=False)), torch.tensor([torch.inf], device="cpu")])
