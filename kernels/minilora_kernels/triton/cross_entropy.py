# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (a kernel is Triton, not Python, and its tuples and constants are not typed)
"""Loss and gradient of a language-model head on a GPU, in place of a chunk of its logits, in one launch.

    loss      = logsumexp(z) - z_y                       z: a row of V logits, y: its label
    z_j      <- lift * (p_j - [j = y])                   p = softmax(z)

The logits come from a matrix product and the gradient goes into one; both are the vendor's, chunk by chunk
(kernels/minilora_kernels/ops/cross_entropy.py, whose `_rows` is the plain form). What stands between is bound by
memory: a row is read twice and written once, and nothing of its size is kept.

First reading: each thread keeps the largest logit m that it has met and sum exp(z - m), rescaled when m grows, of all
words but the label. With that sum apart, p_y - 1 = -(sum of the others) / (sum of all) loses no digit when p_y is near
1, where subtracting would leave nothing. Second reading: exp(z - m) / sum, written over the logit.
"""

from contextlib import nullcontext

import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.triton.launch import rounded, run

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x log2 e)
LOWEST = tl.constexpr(-1e38)  # below every logit, and yet finite: infinity minus infinity is no number


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def _cross_entropy(
    logits_ptr,  # bf16, fp16, fp32 or fp64 (C, V)
    labels_ptr,  # int64 (C,)
    loss_ptr,  # fp32 (C,)
    out_ptr,  # (C, V): where the gradient goes, the logits themselves but in the interpreter
    columns,  # V
    lift,  # factor on the gradient
    GRADIENT: tl.constexpr,  # whether it is wanted
    WIDTH: tl.constexpr,  # logits of a step
):
    # who am I: one row; 64-bit, since a chunk may have more than 2^31 logits
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    out_ptr += row * columns
    label = tl.load(labels_ptr + row)
    own = tl.load(logits_ptr + label, mask=(label >= 0) & (label < columns), other=float("nan")).to(tl.float32)

    # sum exp(z - m) of the others, and m; thread by thread, then together
    most = tl.full([WIDTH], LOWEST, tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        z = tl.load(logits_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        z = tl.where(column == label, float("-inf"), z)
        smaller = _exp(-tl.abs(z - most))
        total = tl.where(z > most, total * smaller + 1, total + smaller)
        most = tl.maximum(most, z)
    top = tl.max(most, axis=0)
    others = tl.sum(total * _exp(most - top), axis=0)

    # with the label
    top_of_all = tl.maximum(top, own)
    others = others * _exp(top - top_of_all)
    total_of_all = others + _exp(own - top_of_all)
    tl.store(loss_ptr + row, top_of_all - own + tl.log(total_of_all))

    if GRADIENT:
        scale = lift / total_of_all
        for start in range(0, columns, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < columns
            z = tl.load(logits_ptr + column, mask=inside, other=0).to(tl.float32)
            error = tl.where(column == label, -others, _exp(z - top_of_all)) * scale
            tl.store(out_ptr + column, error.to(out_ptr.dtype.element_ty), mask=inside)


# ---- launcher


def cross_entropy(logits: Tensor, labels: Tensor, loss: Tensor, gradient: bool, lift: float) -> None:
    """Writes the loss of each row, fp32 (C,), and, if `gradient`, lift times its gradient over the logits (C, V).

    All contiguous; labels int64 (C,). A label outside [0, V) makes its row NaN, loss and gradient.
    """
    with rounded(logits) if gradient else nullcontext(logits) as out:
        arguments = (logits, labels, loss, out, logits.shape[1], lift)
        run("cross_entropy", _cross_entropy, len(logits), *arguments, GRADIENT=gradient)
