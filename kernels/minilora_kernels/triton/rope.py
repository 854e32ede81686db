# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""Rotary positions on a GPU in one launch; backward turns by the negative angle. Plain form:
kernels/minilora_kernels/ops/rope.py.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)         x1, x2: the halves of a head

Bound by memory: x is read and y written once, by its strides as it comes, since q and k are views. Both halves are in
hand at once, and every product is rounded where the plain form stores it, so that the bits are the plain form's.
"""

import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.triton.launch import nearest, run


@triton.jit
def _rotate(
    x_ptr,  # bf16, fp16 or fp32: (B, heads, T, 2 half), by its strides
    cos_ptr,  # likewise (B or 1, T, 2 half), each angle in both halves
    sin_ptr,  # likewise
    y_ptr,  # likewise (B, T, heads, 2 half)
    n_heads,  # B T heads
    heads,
    length,  # T
    stride_b,  # of x, in values
    stride_h,
    stride_t,
    per_row,  # values of cos and sin from one b to the next; 0: all share them
    sign,  # of the angle
    HALF: tl.constexpr,  # half
    PADDED: tl.constexpr,  # the power of two from half on
    VALUES: tl.constexpr,  # of a half, in a program
):
    # who am I: ROWS heads, in the order of y; 64-bit, since there may be more than 2^31 values
    ROWS: tl.constexpr = VALUES // PADDED if PADDED < VALUES else 1
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token = number // heads
    b = token // length
    t = token % length
    x_ptr += b * stride_b + number % heads * stride_h + t * stride_t  # (ROWS, 1)
    y_ptr += number * (2 * HALF)
    angle = b * per_row + t * (2 * HALF)

    # load
    i = tl.arange(0, PADDED)[None, :]
    inside = (number < n_heads) & (i < HALF)
    x1 = tl.load(x_ptr + i, mask=inside, other=0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + i, mask=inside, other=0).to(tl.float32)
    cos = tl.load(cos_ptr + angle + i, mask=inside, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + angle + i, mask=inside, other=0).to(tl.float32) * sign

    # compute, store
    y1 = nearest(x1 * cos, dtype).to(tl.float32) - nearest(x2 * sin, dtype).to(tl.float32)
    y2 = nearest(x2 * cos, dtype).to(tl.float32) + nearest(x1 * sin, dtype).to(tl.float32)
    tl.store(y_ptr + i, nearest(y1, dtype), mask=inside)
    tl.store(y_ptr + HALF + i, nearest(y2, dtype), mask=inside)


# ---- launcher


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (B, heads, T, d), its last stride 1, cos and sin (B or 1, 1, T, d) -> y, contiguous as (B, T, heads, d).

    All of one dtype, bf16, fp16 or fp32, on one device.
    """
    (B, heads, T, d), cos, sin = x.shape, cos.contiguous(), sin.contiguous()
    y = allocator.empty((B, T, heads, d), x.dtype, x.device)
    padded = 1 << (d // 2 - 1).bit_length()
    arguments = (x, cos, sin, y, B * heads * T, heads, T, *x.stride()[:3], T * d if len(cos) > 1 else 0, sign)

    def programs(VALUES: int) -> int:
        return -(-B * heads * T // max(1, VALUES // padded))

    run("rotate", _rotate, programs, *arguments, HALF=d // 2, PADDED=padded)
    return y.transpose(1, 2)
