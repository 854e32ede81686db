# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""GPU kernel for the loss and the gradient of a language-model head, in place of its logits.

    loss      = logsumexp(z) - z_y                       z: a row of V logits, y: its label
    z_j      <- lift * (p_j - [j = y])                   p = softmax(z)

The logits come from a matrix product, and the gradient goes into another one. Both products are
those of the vendor's library, chunk by chunk (ops/cross_entropy.py, whose `_loss_and_gradient` has
the reference implementation). The step between them is bound by memory: the kernel reads a row
twice and writes it once, and keeps nothing of its size.

First pass: each thread keeps the largest logit m that it has read, and sum exp(z - m) over all
words but the label; it rescales the sum when m grows. Because the label is not in that sum,
p_y - 1 = -(sum of the others) / (sum of all) loses no digit when p_y is near 1, where a
subtraction would cancel. Second pass: exp(z - m) / sum, written over the logit.
"""

from contextlib import nullcontext

import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton.launch import rounded, run

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e)
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: infinity minus infinity is NaN


@triton.jit
def _exp(x):
    """Return e^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _cross_entropy(
    logits_ptr,  # bf16, fp16, fp32 or fp64 (C, V)
    labels_ptr,  # int64 (C,)
    loss_ptr,  # fp32 (C,)
    out_ptr,  # (C, V): receives the gradient; the logits themselves, except in the interpreter
    n_cols,  # V
    lift,  # factor on the gradient
    GRADIENT: tl.constexpr,  # True if the gradient is wanted
    WIDTH: tl.constexpr,  # logits of a step
):
    """Compute the loss of one row, and write its gradient."""
    row_idx = tl.program_id(0).to(tl.int64)  # a chunk may have more than 2^31 logits
    logits_ptr += row_idx * n_cols
    out_ptr += row_idx * n_cols
    label = tl.load(labels_ptr + row_idx)
    label_mask = (label >= 0) & (label < n_cols)
    z_label = tl.load(logits_ptr + label, mask=label_mask, other=float("nan")).to(tl.float32)

    # m and sum exp(z - m) of all words but the label: thread by thread, then together
    thread_max = tl.full([WIDTH], LOWEST, tl.float32)
    thread_sum = tl.zeros([WIDTH], tl.float32)
    for start in range(0, n_cols, WIDTH):
        col_offsets = start + tl.arange(0, WIDTH)
        mask = col_offsets < n_cols
        z = tl.load(logits_ptr + col_offsets, mask=mask, other=float("-inf")).to(tl.float32)
        z = tl.where(col_offsets == label, float("-inf"), z)
        smaller = _exp(-tl.abs(z - thread_max))
        grows = z > thread_max
        thread_sum = tl.where(grows, thread_sum * smaller + 1, thread_sum + smaller)
        thread_max = tl.maximum(thread_max, z)
    max_others = tl.max(thread_max, axis=0)
    sum_others = tl.sum(thread_sum * _exp(thread_max - max_others), axis=0)

    # with the label
    max_all = tl.maximum(max_others, z_label)
    sum_others = sum_others * _exp(max_others - max_all)
    sum_all = sum_others + _exp(z_label - max_all)
    tl.store(loss_ptr + row_idx, max_all - z_label + tl.log(sum_all))

    if GRADIENT:
        scale = lift / sum_all
        for start in range(0, n_cols, WIDTH):
            col_offsets = start + tl.arange(0, WIDTH)
            mask = col_offsets < n_cols
            z = tl.load(logits_ptr + col_offsets, mask=mask, other=0).to(tl.float32)
            is_label = col_offsets == label
            gradient = tl.where(is_label, -sum_others, _exp(z - max_all)) * scale
            tl.store(out_ptr + col_offsets, gradient.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launcher


def cross_entropy(
    logits: Tensor, labels: Tensor, loss: Tensor, gradient: bool, lift: float
) -> None:
    """Write the loss of each row and, on request, the gradient in place of the logits.

    All tensors are contiguous.

    Args:
        logits: Matrix of shape (C, V), in bf16, fp16, fp32 or fp64.
        labels: Labels, int64 of shape (C,). A label outside [0, V) makes the loss and the gradient
            of its row NaN.
        loss: Receives the loss of each row, fp32 of shape (C,).
        gradient: Overwrite the logits with `lift` times the gradient.
        lift: Factor on the gradient.
    """
    with rounded(logits) if gradient else nullcontext(logits) as out:
        arguments = (logits, labels, loss, out, logits.shape[1], lift)
        run("cross_entropy", _cross_entropy, len(logits), *arguments, GRADIENT=gradient)
