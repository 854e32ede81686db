# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""RMSNorm on a GPU, forward and backward in one launch each; the plain form is
kernels/minilora_kernels/ops/rms_norm.py's.

    h = x r,  r = 1 / sqrt(mean(x^2) + eps)      y = w h          (Gemma stores w - 1, and does not round h before)
    dx = r (dh - h mean(dh h)),  dh = w dy       dw = sum over rows of dy h

Bound by memory: x is read and y written, x and dy are read and dx written, and nothing else of their size exists. A
program holds some rows whole, or if they are longer than VALUES reads them a second time, when they lie in the cache. A
row is summed within its program; dw, where the weight trains, in strips of rows and then over the strips, so that the
same values give the same bits.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.triton.launch import nearest, run, tile_for

STEPS = 16  # of a strip: how many times ROWS rows


@triton.jit
def _rms_norm(
    x_ptr,  # bf16, fp16 or fp32 (N, D)
    w_ptr,  # likewise (D,)
    y_ptr,  # likewise (N, D)
    r_ptr,  # fp32 (N,)
    n_rows,  # N
    eps,
    D: tl.constexpr,  # values of a row
    GEMMA: tl.constexpr,  # whether the weight is stored as w - 1
    PADDED: tl.constexpr,  # the power of two from D on
    VALUES: tl.constexpr,  # of a program at a time: whole rows, or a piece of one
):
    # who am I: ROWS rows; 64-bit, since there may be more than 2^31 values
    WIDTH: tl.constexpr = PADDED if PADDED < VALUES else VALUES
    ROWS: tl.constexpr = VALUES // WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < n_rows
    x_ptr += row * D  # (ROWS, 1)
    y_ptr += row * D
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    # r = 1 / sqrt(mean(x^2) + eps)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + column, mask=there & (column < D), other=0).to(tl.float32)
        squares += x * x
    mean = tl.sum(squares, axis=1)[:, None] / D
    r = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    tl.store(r_ptr + row, r, mask=there)

    # y = w h
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = there & (column < D)
        h = tl.load(x_ptr + column, mask=inside, other=0).to(tl.float32) * r
        w = tl.load(w_ptr + column, mask=column < D, other=0).to(tl.float32)
        if GEMMA:
            y = (1 + w) * h
        else:
            y = w * nearest(h, dtype).to(tl.float32)
        tl.store(y_ptr + column, nearest(y, dtype), mask=inside)


@triton.jit
def _rms_norm_backward(
    x_ptr,  # bf16, fp16 or fp32 (N, D)
    w_ptr,  # likewise (D,)
    r_ptr,  # fp32 (N,)
    dy_ptr,  # like x (N, D)
    dx_ptr,  # like x (N, D)
    n_rows,  # N
    D: tl.constexpr,  # values of a row
    GEMMA: tl.constexpr,  # whether the weight is stored as w - 1
    PADDED: tl.constexpr,  # the power of two from D on
    VALUES: tl.constexpr,  # of a program at a time: whole rows, or a piece of one
):
    # who am I: ROWS rows
    WIDTH: tl.constexpr = PADDED if PADDED < VALUES else VALUES
    ROWS: tl.constexpr = VALUES // WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < n_rows
    x_ptr += row * D  # (ROWS, 1)
    dy_ptr += row * D
    dx_ptr += row * D
    r = tl.load(r_ptr + row, mask=there, other=0)

    # mean(dh h), dh = w dy
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = there & (column < D)
        w = tl.load(w_ptr + column, mask=column < D, other=0).to(tl.float32) + GEMMA
        dh = tl.load(dy_ptr + column, mask=inside, other=0).to(tl.float32) * w
        products += dh * (tl.load(x_ptr + column, mask=inside, other=0).to(tl.float32) * r)
    mean = tl.sum(products, axis=1)[:, None] / D

    # dx = r (dh - h mean(dh h))
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = there & (column < D)
        w = tl.load(w_ptr + column, mask=column < D, other=0).to(tl.float32) + GEMMA
        dh = tl.load(dy_ptr + column, mask=inside, other=0).to(tl.float32) * w
        h = tl.load(x_ptr + column, mask=inside, other=0).to(tl.float32) * r
        tl.store(dx_ptr + column, nearest((dh - h * mean) * r, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_weight(
    x_ptr,  # bf16, fp16 or fp32 (N, D)
    r_ptr,  # fp32 (N,)
    dy_ptr,  # like x (N, D)
    sums_ptr,  # fp32 (ceil(N / (ROWS STEPS)), D)
    n_rows,  # N
    D: tl.constexpr,  # values of a row
    STEPS: tl.constexpr,  # of ROWS rows
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at a time
):
    # who am I: one strip of rows, COLUMNS of their values
    pieces: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    strip = tl.program_id(0) // pieces
    first = strip.to(tl.int64) * (STEPS * ROWS)
    steps = tl.minimum(tl.cdiv(n_rows - first, ROWS), STEPS).to(tl.int32)
    column = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < n_rows) & (column < D)[None, :]
        r = tl.load(r_ptr + row, mask=row < n_rows, other=0)
        h = tl.load(x_ptr + row * D + column[None, :], mask=inside, other=0).to(tl.float32) * r
        total += tl.load(dy_ptr + row * D + column[None, :], mask=inside, other=0).to(tl.float32) * h
    tl.store(sums_ptr + strip.to(tl.int64) * D + column, tl.sum(total, axis=0), mask=column < D)


# ---- launchers: tensors of one dtype, bf16, fp16 or fp32, on one device


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """x (…, D), weight (D,) -> y like x, r fp32 (…, 1)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, r = allocator.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    run("rms_norm", _rms_norm, _rows(r, x), x, weight, y, r, r.numel(), eps, GEMMA=gemma, **_width(x))
    return y, r


def rms_norm_backward(x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, gemma: bool) -> Tensor:
    """x, dy (…, D), weight (D,), r fp32 (…, 1) -> dx like x."""
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    dx = allocator.empty_like(x)
    arguments = (x, weight, r, dy, dx, r.numel())
    run("rms_norm_backward", _rms_norm_backward, _rows(r, x), *arguments, GEMMA=gemma, **_width(x))
    return dx


def rms_norm_weight(x: Tensor, r: Tensor, dy: Tensor) -> Tensor:
    """x, dy (…, D), r fp32 (…, 1) -> dw fp32 (D,)."""
    (x, dy), N, D = (t.contiguous() for t in (x, dy)), r.numel(), x.shape[-1]
    rows, columns = (dict(tile_for("rms_norm_weight").constants)[name] for name in ("ROWS", "COLUMNS"))
    sums = torch.empty(-(-N // (rows * STEPS)), D, dtype=torch.float32, device=x.device)
    programs = len(sums) * -(-D // columns)
    run("rms_norm_weight", _rms_norm_weight, programs, x, r, dy, sums, N, D=D, STEPS=STEPS)
    return sums.sum(0)


def _rows(r: Tensor, x: Tensor) -> Callable[..., int]:
    """How many programs it takes."""
    return lambda VALUES: -(-r.numel() // max(1, VALUES // _width(x)["PADDED"]))


def _width(x: Tensor) -> dict[str, int]:
    D = x.shape[-1]
    return {"D": D, "PADDED": 1 << (D - 1).bit_length()}
