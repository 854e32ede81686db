# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernel for rotary position embeddings, in one launch.

Backward is the same kernel with negative angles. The reference implementation is in ops/rope.py.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)         x1, x2: the halves of a head

The kernel is bound by memory. It reads x once, with any strides, because q and k are views, and it
writes y once. A program has both halves of a head, and rounds every product where the reference
stores it, so that the bits are those of the reference.
"""

import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.triton.launch import cdiv, nearest, next_power_of_2, run


@triton.jit
def _rotate(
    x_ptr,  # bf16, fp16 or fp32 (B, heads, T, 2 HALF), with any strides but the last
    cos_ptr,  # like x (B or 1, T, 2 HALF), each angle in both halves
    sin_ptr,  # like cos
    y_ptr,  # like x (B, T, heads, 2 HALF)
    n_rows,  # B T heads
    n_heads,
    n_tokens,  # T
    x_batch_stride,  # in values
    x_head_stride,
    x_token_stride,
    angle_batch_stride,  # of cos and sin; 0 if all batch entries share them
    sign,  # of the angle
    HALF: tl.constexpr,  # half the size of a head
    PADDED: tl.constexpr,  # the power of two from HALF on
    VALUES: tl.constexpr,  # values of a half, in a program
):
    """Rotate ROWS heads, in the order of y."""
    ROWS: tl.constexpr = VALUES // PADDED if PADDED < VALUES else 1
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)  # there may be more than 2^31 values
    row_idx = program * ROWS + tl.arange(0, ROWS)[:, None]
    token = row_idx // n_heads
    batch = token // n_tokens
    position = token % n_tokens
    x_offset = batch * x_batch_stride
    head = row_idx % n_heads
    x_ptr += x_offset + head * x_head_stride + position * x_token_stride  # (ROWS, 1)
    y_ptr += row_idx * (2 * HALF)
    angle_offset = batch * angle_batch_stride + position * (2 * HALF)

    # load
    col_offsets = tl.arange(0, PADDED)[None, :]
    mask = (row_idx < n_rows) & (col_offsets < HALF)
    x1 = tl.load(x_ptr + col_offsets, mask=mask, other=0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + col_offsets, mask=mask, other=0).to(tl.float32)
    cos = tl.load(cos_ptr + angle_offset + col_offsets, mask=mask, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_offset + col_offsets, mask=mask, other=0).to(tl.float32)
    sin = sin * sign

    # compute and store
    x1_cos = nearest(x1 * cos, dtype).to(tl.float32)
    x2_sin = nearest(x2 * sin, dtype).to(tl.float32)
    y1 = x1_cos - x2_sin
    x2_cos = nearest(x2 * cos, dtype).to(tl.float32)
    x1_sin = nearest(x1 * sin, dtype).to(tl.float32)
    y2 = x2_cos + x1_sin
    tl.store(y_ptr + col_offsets, nearest(y1, dtype), mask=mask)
    tl.store(y_ptr + HALF + col_offsets, nearest(y2, dtype), mask=mask)


# ---- launcher


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate each head by the angles of its position.

    All tensors have one dtype (bf16, fp16 or fp32) and one device.

    Args:
        x: Tensor of shape (B, heads, T, d), whose last stride is 1.
        cos: Cosine of the angles, of shape (B or 1, 1, T, d), each angle in both halves.
        sin: Sine of the angles, with the shape of `cos`.
        sign: 1.0 to rotate forward, -1.0 to rotate back.

    Returns:
        y of shape (B, heads, T, d), a view of a contiguous (B, T, heads, d).
    """
    B, heads, T, d = x.shape
    cos = cos.contiguous()
    sin = sin.contiguous()
    y = allocator.empty((B, T, heads, d), x.dtype, x.device)
    rows = B * heads * T
    padded = next_power_of_2(d // 2)
    angle_batch_stride = 0
    if len(cos) > 1:
        angle_batch_stride = T * d
    sizes = (rows, heads, T, *x.stride()[:3], angle_batch_stride)

    def programs(VALUES: int) -> int:
        rows_per_program = max(1, VALUES // padded)
        return cdiv(rows, rows_per_program)

    run("rotate", _rotate, programs, x, cos, sin, y, *sizes, sign, HALF=d // 2, PADDED=padded)
    return y.transpose(1, 2)
