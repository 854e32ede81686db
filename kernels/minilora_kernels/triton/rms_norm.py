# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernels for RMSNorm, forward and backward in one launch each.

The reference implementation is in ops/rms_norm.py.

    h = x r,  r = 1 / sqrt(mean(x^2) + eps)      y = w h
    dx = r (dh - h mean(dh h)),  dh = w dy       dw = sum over rows of dy h

Gemma stores w - 1, and does not round h before the product.

The kernels are bound by memory. Forward reads x and writes y; backward reads x and dy and writes
dx; no other tensor of their size exists. A program has a few complete rows. A row longer than
VALUES is read in pieces, twice; the second read comes from the cache. One program sums a row. dw,
for a weight that is trained, is summed in strips of rows and then over the strips, in a fixed
order, so that the same values give the same bits.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.triton.launch import cdiv, nearest, next_power_of_2, run, tile_for

STEPS = 16  # a strip of rms_norm_weight has STEPS times ROWS rows


@triton.jit
def _rms_norm(
    x_ptr,  # bf16, fp16 or fp32 (N, D)
    w_ptr,  # like x (D,)
    y_ptr,  # like x (N, D)
    r_ptr,  # fp32 (N,)
    n_rows,  # N
    eps,
    D: tl.constexpr,  # values of a row
    GEMMA: tl.constexpr,  # True if the weight is stored as w - 1
    PADDED: tl.constexpr,  # the power of two from D on
    VALUES: tl.constexpr,  # values of a program at a time: complete rows, or a piece of one
):
    """Normalise ROWS rows."""
    WIDTH: tl.constexpr = PADDED if PADDED < VALUES else VALUES
    ROWS: tl.constexpr = VALUES // WIDTH
    program = tl.program_id(0).to(tl.int64)  # there may be more than 2^31 values
    row_idx = program * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row_idx < n_rows
    x_ptr += row_idx * D  # (ROWS, 1)
    y_ptr += row_idx * D
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    # r = 1 / sqrt(mean(x^2) + eps)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        col_offsets = start + tl.arange(0, WIDTH)[None, :]
        mask = row_mask & (col_offsets < D)
        x = tl.load(x_ptr + col_offsets, mask=mask, other=0).to(tl.float32)
        squares += x * x
    mean = tl.sum(squares, axis=1)[:, None] / D
    r = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    tl.store(r_ptr + row_idx, r, mask=row_mask)

    # y = w h
    for start in range(0, D, WIDTH):
        col_offsets = start + tl.arange(0, WIDTH)[None, :]
        mask = row_mask & (col_offsets < D)
        x = tl.load(x_ptr + col_offsets, mask=mask, other=0)
        h = x.to(tl.float32) * r
        w = tl.load(w_ptr + col_offsets, mask=col_offsets < D, other=0).to(tl.float32)
        if GEMMA:
            y = (1 + w) * h
        else:
            y = w * nearest(h, dtype).to(tl.float32)
        tl.store(y_ptr + col_offsets, nearest(y, dtype), mask=mask)


@triton.jit
def _rms_norm_backward(
    x_ptr,  # bf16, fp16 or fp32 (N, D)
    w_ptr,  # like x (D,)
    r_ptr,  # fp32 (N,)
    dy_ptr,  # like x (N, D)
    dx_ptr,  # like x (N, D)
    n_rows,  # N
    D: tl.constexpr,  # values of a row
    GEMMA: tl.constexpr,  # True if the weight is stored as w - 1
    PADDED: tl.constexpr,  # the power of two from D on
    VALUES: tl.constexpr,  # values of a program at a time: complete rows, or a piece of one
):
    """Compute dx of ROWS rows."""
    WIDTH: tl.constexpr = PADDED if PADDED < VALUES else VALUES
    ROWS: tl.constexpr = VALUES // WIDTH
    program = tl.program_id(0).to(tl.int64)
    row_idx = program * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row_idx < n_rows
    x_ptr += row_idx * D  # (ROWS, 1)
    dy_ptr += row_idx * D
    dx_ptr += row_idx * D
    r = tl.load(r_ptr + row_idx, mask=row_mask, other=0)

    # mean(dh h), dh = w dy
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        col_offsets = start + tl.arange(0, WIDTH)[None, :]
        mask = row_mask & (col_offsets < D)
        w = tl.load(w_ptr + col_offsets, mask=col_offsets < D, other=0)
        w = w.to(tl.float32) + GEMMA
        dy = tl.load(dy_ptr + col_offsets, mask=mask, other=0)
        dh = dy.to(tl.float32) * w
        x = tl.load(x_ptr + col_offsets, mask=mask, other=0)
        h = x.to(tl.float32) * r
        products += dh * h
    mean = tl.sum(products, axis=1)[:, None] / D

    # dx = r (dh - h mean(dh h))
    for start in range(0, D, WIDTH):
        col_offsets = start + tl.arange(0, WIDTH)[None, :]
        mask = row_mask & (col_offsets < D)
        w = tl.load(w_ptr + col_offsets, mask=col_offsets < D, other=0)
        w = w.to(tl.float32) + GEMMA
        dy = tl.load(dy_ptr + col_offsets, mask=mask, other=0)
        dh = dy.to(tl.float32) * w
        x = tl.load(x_ptr + col_offsets, mask=mask, other=0)
        h = x.to(tl.float32) * r
        dx_ptrs = dx_ptr + col_offsets
        dx = (dh - h * mean) * r
        tl.store(dx_ptrs, nearest(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_weight(
    x_ptr,  # bf16, fp16 or fp32 (N, D)
    r_ptr,  # fp32 (N,)
    dy_ptr,  # like x (N, D)
    sums_ptr,  # fp32 (ceil(N / (ROWS STEPS)), D)
    n_rows,  # N
    D: tl.constexpr,  # values of a row
    STEPS: tl.constexpr,  # steps of a strip
    ROWS: tl.constexpr,  # rows of a step
    COLUMNS: tl.constexpr,  # columns of a program
):
    """Sum dy h over one strip of rows, for COLUMNS columns."""
    n_pieces: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    strip = tl.program_id(0) // n_pieces
    first_row = strip.to(tl.int64) * (STEPS * ROWS)
    n_steps = tl.minimum(tl.cdiv(n_rows - first_row, ROWS), STEPS).to(tl.int32)
    piece = tl.program_id(0) % n_pieces
    col_offsets = piece * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(n_steps):
        row_idx = first_row + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row_idx < n_rows) & (col_offsets < D)[None, :]
        r = tl.load(r_ptr + row_idx, mask=row_idx < n_rows, other=0)
        x = tl.load(x_ptr + row_idx * D + col_offsets[None, :], mask=mask, other=0)
        h = x.to(tl.float32) * r
        dy = tl.load(dy_ptr + row_idx * D + col_offsets[None, :], mask=mask, other=0)
        total += dy.to(tl.float32) * h
    col_mask = col_offsets < D
    strip_ptrs = sums_ptr + strip.to(tl.int64) * D + col_offsets
    tl.store(strip_ptrs, tl.sum(total, axis=0), mask=col_mask)


# ---- launchers: all tensors have one dtype (bf16, fp16 or fp32) and one device


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Normalise the rows of x.

    Args:
        x: Tensor of shape (…, D).
        weight: Vector w, or w - 1 if `gemma`, of shape (D,).
        eps: ε of the norm.
        gemma: The weight is stored as w - 1.

    Returns:
        y with the shape and dtype of x, and r, fp32 of shape (…, 1).
    """
    x = x.contiguous()
    weight = weight.contiguous()
    y = allocator.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)  # (…, 1)
    arguments = (x, weight, y, r, r.numel(), eps)
    run("rms_norm", _rms_norm, _programs(r, x), *arguments, GEMMA=gemma, **_sizes(x))
    return y, r


def rms_norm_backward(x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, gemma: bool) -> Tensor:
    """Return the gradient of x.

    Args:
        x: Input of the norm, of shape (…, D).
        weight: Vector w, or w - 1 if `gemma`, of shape (D,).
        r: Result of `rms_norm`, fp32 of shape (…, 1).
        dy: Gradient of y, of shape (…, D).
        gemma: The weight is stored as w - 1.

    Returns:
        dx with the shape and dtype of x.
    """
    x = x.contiguous()
    weight = weight.contiguous()
    dy = dy.contiguous()
    dx = allocator.empty_like(x)
    arguments = (x, weight, r, dy, dx, r.numel())
    programs = _programs(r, x)
    run("rms_norm_backward", _rms_norm_backward, programs, *arguments, GEMMA=gemma, **_sizes(x))
    return dx


def rms_norm_weight(x: Tensor, r: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of the weight.

    Args:
        x: Input of the norm, of shape (…, D).
        r: Result of `rms_norm`, fp32 of shape (…, 1).
        dy: Gradient of y, of shape (…, D).

    Returns:
        dw, fp32 of shape (D,).
    """
    x = x.contiguous()
    dy = dy.contiguous()
    N = r.numel()
    D = x.shape[-1]
    constants = dict(tile_for("rms_norm_weight").constants)
    strips = cdiv(N, constants["ROWS"] * STEPS)
    pieces = cdiv(D, constants["COLUMNS"])
    sums = torch.empty(strips, D, dtype=torch.float32, device=x.device)  # (strips, D)
    arguments = (x, r, dy, sums, N)
    run("rms_norm_weight", _rms_norm_weight, strips * pieces, *arguments, D=D, STEPS=STEPS)
    return sums.sum(0)


def _programs(r: Tensor, x: Tensor) -> Callable[..., int]:
    """Return the function from the tile's VALUES to the number of programs."""

    def programs(VALUES: int) -> int:
        rows_per_program = max(1, VALUES // _sizes(x)["PADDED"])
        return cdiv(r.numel(), rows_per_program)

    return programs


def _sizes(x: Tensor) -> dict[str, int]:
    """Return the kernel's constants for the length of a row."""
    D = x.shape[-1]
    return {"D": D, "PADDED": next_power_of_2(D)}
