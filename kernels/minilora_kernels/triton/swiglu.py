# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""The gate of an MLP on a GPU, forward and backward in one launch each; the plain form is
kernels/minilora_kernels/ops/swiglu.py's.

    y = f(g) u,  f(g) = g s(z),  s(z) = 1 / (1 + e^-z)      SiLU: z = g
    du = dy f(g),  dg = dy u f'(g)                          GELU's tanh form, as (1 + tanh v) / 2 = s(2 v):
    f'(g) = s + g s (1 - s) dz/dg                           z = sqrt(8 / pi) (g + 0.044715 g^3)

Bound by memory: 6 bytes a value of bf16 forward and 10 backward. f(g) and dy u are rounded to the dtype in which the
plain form stores them. e^-z may be infinite, whose inverse is 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.triton.launch import nearest, run

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e)


@triton.jit
def _sigmoid_and_slope(x, GELU: tl.constexpr):
    """s(z), dz/dx."""
    if GELU:
        square = x * x
        z = 1.5957691216057308 * x * (1 + 0.044715 * square)  # sqrt(8 / pi)
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        z = x
        slope = 1.0
    return 1 / (1 + tl.exp2(z * -LOG2_E)), slope


@triton.jit
def _gated(
    gate_ptr,  # bf16, fp16 or fp32 (n,)
    up_ptr,  # likewise
    y_ptr,  # likewise
    n,  # values
    GELU: tl.constexpr,  # else SiLU
    VALUES: tl.constexpr,  # of a program
):
    # who am I: VALUES values; 64-bit, since there may be more than 2^31
    first = tl.program_id(0).to(tl.int64) * VALUES
    i = tl.arange(0, VALUES)
    inside = i < n - first
    gate = tl.load(gate_ptr + first + i, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_ptr + first + i, mask=inside, other=0).to(tl.float32)
    sigmoid, _ = _sigmoid_and_slope(gate, GELU)
    active = nearest(gate * sigmoid, y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + first + i, nearest(active * up, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    gate_ptr,  # bf16, fp16 or fp32 (n,)
    up_ptr,  # likewise, as all below
    dy_ptr,
    dgate_ptr,
    dup_ptr,
    n,  # values
    GELU: tl.constexpr,  # else SiLU
    VALUES: tl.constexpr,  # of a program
):
    first = tl.program_id(0).to(tl.int64) * VALUES
    i = tl.arange(0, VALUES)
    inside = i < n - first
    dtype: tl.constexpr = dup_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + first + i, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_ptr + first + i, mask=inside, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + first + i, mask=inside, other=0).to(tl.float32)
    sigmoid, slope = _sigmoid_and_slope(gate, GELU)
    active = gate * sigmoid
    tl.store(dup_ptr + first + i, nearest(dy * nearest(active, dtype).to(tl.float32), dtype), mask=inside)
    dgate = nearest(dy * up, dtype).to(tl.float32) * (sigmoid + active * (1 - sigmoid) * slope)
    tl.store(dgate_ptr + first + i, nearest(dgate, dtype), mask=inside)


# ---- launchers: tensors of one shape, one dtype, bf16, fp16 or fp32, on one device


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """-> y."""
    (gate, up), y = (t.contiguous() for t in (gate, up)), allocator.empty_like(gate)
    run("gated", _gated, lambda VALUES: -(-y.numel() // VALUES), gate, up, y, y.numel(), GELU=gelu)
    return y


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """-> dgate, dup."""
    gate, up, dy = (t.contiguous() for t in (gate, up, dy))
    dgate, dup, n = allocator.empty_like(gate), allocator.empty_like(up), gate.numel()
    arguments = (gate, up, dy, dgate, dup, n)
    run("gated_backward", _gated_backward, lambda VALUES: -(-n // VALUES), *arguments, GELU=gelu)
    return dgate, dup
