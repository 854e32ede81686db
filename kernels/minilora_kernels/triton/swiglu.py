# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernels for the gate of an MLP (SwiGLU, GeGLU), forward and backward in one launch each.

The reference implementation is in ops/swiglu.py.

    y = f(g) u,  f(g) = g s(z),  s(z) = 1 / (1 + e^-z)      SiLU: z = g
    du = dy f(g),  dg = dy u f'(g)                          GELU in its tanh form:
    f'(g) = s + g s (1 - s) dz/dg                           z = sqrt(8 / pi) (g + 0.044715 g^3),
                                                            because (1 + tanh v) / 2 = s(2 v)

The kernels are bound by memory: 6 bytes a value of bf16 forward, and 10 backward. They round f(g)
and dy u to the dtype in which the reference stores them. e^-z may be infinite; its inverse is 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.triton.launch import cdiv, nearest, run

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e)


@triton.jit
def _sigmoid_and_slope(x, GELU: tl.constexpr):
    """Return s(z) and dz/dx."""
    if GELU:
        square = x * x
        z = 1.5957691216057308 * x * (1 + 0.044715 * square)  # sqrt(8 / pi)
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        z = x
        slope = 1.0
    sigmoid = 1 / (1 + tl.exp2(z * -LOG2_E))
    return sigmoid, slope


@triton.jit
def _gated(
    gate_ptr,  # bf16, fp16 or fp32 (n,)
    up_ptr,  # like gate
    y_ptr,  # like gate
    n_elements,  # n
    GELU: tl.constexpr,  # True for GELU, False for SiLU
    VALUES: tl.constexpr,  # values of a program
):
    """Compute VALUES values of y."""
    first = tl.program_id(0).to(tl.int64) * VALUES  # there may be more than 2^31 values
    offsets = tl.arange(0, VALUES)
    mask = offsets < n_elements - first
    gate = tl.load(gate_ptr + first + offsets, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + first + offsets, mask=mask, other=0).to(tl.float32)
    sigmoid, _ = _sigmoid_and_slope(gate, GELU)
    active = nearest(gate * sigmoid, y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + first + offsets, nearest(active * up, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward(
    gate_ptr,  # bf16, fp16 or fp32 (n,)
    up_ptr,  # like gate
    dy_ptr,  # like gate
    dgate_ptr,  # like gate
    dup_ptr,  # like gate
    n_elements,  # n
    GELU: tl.constexpr,  # True for GELU, False for SiLU
    VALUES: tl.constexpr,  # values of a program
):
    """Compute VALUES values of dgate and dup."""
    first = tl.program_id(0).to(tl.int64) * VALUES
    offsets = tl.arange(0, VALUES)
    mask = offsets < n_elements - first
    dtype: tl.constexpr = dup_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + first + offsets, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + first + offsets, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + first + offsets, mask=mask, other=0).to(tl.float32)
    sigmoid, slope = _sigmoid_and_slope(gate, GELU)
    active = gate * sigmoid  # f(g)
    dup_ptrs = dup_ptr + first + offsets
    dup = dy * nearest(active, dtype).to(tl.float32)
    tl.store(dup_ptrs, nearest(dup, dtype), mask=mask)
    dy_up = nearest(dy * up, dtype).to(tl.float32)
    dgate = dy_up * (sigmoid + active * (1 - sigmoid) * slope)
    tl.store(dgate_ptr + first + offsets, nearest(dgate, dtype), mask=mask)


# ---- launchers: all tensors have one shape, one dtype (bf16, fp16 or fp32) and one device


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Return y = f(gate) up.

    Args:
        gate: Tensor g of any shape.
        up: Tensor u with the shape of `gate`.
        gelu: f is GELU in its tanh form; otherwise f is SiLU.

    Returns:
        y with the shape and dtype of `gate`.
    """
    gate = gate.contiguous()
    up = up.contiguous()
    y = allocator.empty_like(gate)
    n = y.numel()

    def programs(VALUES: int) -> int:
        return cdiv(n, VALUES)

    run("gated", _gated, programs, gate, up, y, n, GELU=gelu)
    return y


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of the gate and of `up`.

    Args:
        gate: Tensor g of any shape.
        up: Tensor u with the shape of `gate`.
        dy: Gradient of y, with the shape of `gate`.
        gelu: f is GELU in its tanh form; otherwise f is SiLU.

    Returns:
        dgate and dup with the shape and dtype of `gate`.
    """
    gate = gate.contiguous()
    up = up.contiguous()
    dy = dy.contiguous()
    dgate = allocator.empty_like(gate)
    dup = allocator.empty_like(up)
    n = gate.numel()

    def programs(VALUES: int) -> int:
        return cdiv(n, VALUES)

    arguments = (gate, up, dy, dgate, dup, n)
    run("gated_backward", _gated_backward, programs, *arguments, GELU=gelu)
    return dgate, dup
