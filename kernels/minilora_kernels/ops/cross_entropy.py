"""Loss of a language-model head that never holds the logits of a whole batch.

    logits = h Wᵀ                        (N, V): 16k tokens x 128k words x 4 bytes = 8 GB
    loss   = sum_n  logsumexp(logits_n) - logits_n[y_n]
    dloss/dlogits = softmax(logits) - onehot(y)
    dloss/dh      = (softmax(logits) - onehot(y)) W

The gradient needs only the logits. The forward pass therefore computes loss and gradient chunk by
chunk, the logits of each chunk overwrite those of the chunk before, and backward keeps only
dloss/dh (N, D). Inside a chunk, a few rows at a time are in fp32, which stay in the cache of a
CPU; on a GPU one kernel turns the logits of a chunk into loss and gradient
(triton/cross_entropy.py).

This is possible while W is frozen, as in LoRA. The gradient of a W that is trained needs the factor
that comes from outside. Then backward keeps h and W, and computes the logits of each chunk again:

    dloss/dW = sum over chunks of  (softmax(logits) - onehot(y))ᵀ  (dloss/dloss_n h_n)

A head that is not a plain matrix goes through `in_chunks`, which recomputes its chunks in backward.

The loss is a *sum* over tokens. The caller divides it once, by the number of tokens of the whole
step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minilora_kernels import allocator
from minilora_kernels.allocator import row_blocks
from minilora_kernels.backend import has_kernels
from minilora_kernels.c import bindings
from minilora_kernels.custom_op import register
from minilora_kernels.ops.mode import fast
from minilora_kernels.quantized_weight import QuantizedWeight

CHUNK_BYTES = 2**25  # size of the logits of a chunk, for any vocabulary
GPU_ROWS = 512  # smallest chunk on a GPU: with fewer rows, reading W takes longer than multiplying
IGNORE = -100  # label of a token that the loss does not count; the same as in F.cross_entropy
LIFT = {torch.float16: 2.0**10}  # exact factor that keeps small gradients from underflow


# ---- public functions


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss: the reference implementation.

    Args:
        hidden: Hidden states h of shape (N, D).
        weight: Matrix W of the head, of shape (V, D).
        labels: Labels y in [0, V) or IGNORE, int64 of shape (N,).

    Returns:
        The loss, a scalar in fp32.
    """
    logits = (hidden @ weight.T).float()  # (N, V)
    return F.cross_entropy(logits, labels, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """Return the summed loss of a head that is a matrix, chunk by chunk.

    Args:
        hidden: Hidden states h of shape (N, D).
        weight: Matrix W of the head, of shape (V, D). It receives a gradient if it requires one.
        labels: Labels y in [0, V) or IGNORE, int64 of shape (N,).
        chunk: Number of rows at a time. None stands for as many as make CHUNK_BYTES of logits.

    Returns:
        The loss, a scalar in fp32.

    Raises:
        ValueError: If the shapes do not fit, or `chunk` is less than 1.
    """
    return _losses(hidden, weight, labels, chunk).sum()


def head_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """Return the summed loss of any output layer.

    An `nn.Linear` without bias takes the path of `linear_cross_entropy`, and so does a quantised
    layer, whose W is dense during the call. Any other module is called in chunks.

    Args:
        hidden: Hidden states h of shape (N, D).
        head: Output layer, from (C, D) to (C, V).
        labels: Labels y in [0, V) or IGNORE, int64 of shape (N,).
        chunk: Number of rows at a time. None stands for as many as make CHUNK_BYTES of logits.

    Returns:
        The loss, a scalar in fp32.

    Raises:
        ValueError: If the shapes do not fit, or `chunk` is less than 1.
    """
    return head_logprobs(hidden, head, labels, chunk).sum().neg()


def head_logprobs(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """Return log p(label) of each row; the loss is minus their sum.

    Args:
        hidden: Hidden states h of shape (N, D).
        head: Output layer, from (C, D) to (C, V).
        labels: Labels y in [0, V) or IGNORE, int64 of shape (N,).
        chunk: Number of rows at a time. None stands for as many as make CHUNK_BYTES of logits.

    Returns:
        Log-probabilities, fp32 of shape (N,), 0 where the label is IGNORE.

    Raises:
        ValueError: If the shapes do not fit, or `chunk` is less than 1.
    """
    weight: Any = getattr(head, "weight", None)
    has_bias = getattr(head, "bias", None) is not None
    if type(head) is nn.Linear and not has_bias:
        return -_losses(hidden, weight, labels, chunk)
    if isinstance(weight, QuantizedWeight) and not has_bias and not hasattr(head, "adapters"):
        return -_losses(hidden, weight.dequantize(hidden.dtype), labels, chunk)
    _check(hidden, labels, chunk)
    size = chunk or rows_at_a_time(head)
    return -in_chunks(_row_losses(head), size, hidden, labels)


def in_chunks(function: Callable[..., Tensor], chunk: int, *rows: Tensor) -> Tensor:
    """Apply a function to some rows at a time.

    Backward keeps only the rows, and computes each chunk again.

    Args:
        function: Maps tensors of C rows each to (C, …). It may use parameters, which receive their
            gradients.
        chunk: Number of rows C at a time.
        *rows: Tensors of N rows each.

    Returns:
        The results of all chunks, (N, …).
    """
    splits = [tensor.split(chunk) for tensor in rows]
    results = []
    for inputs in zip(*splits, strict=True):
        results.append(checkpoint(function, *inputs, use_reentrant=False))
    return torch.cat(results)


def rows_at_a_time(head: nn.Module) -> int:
    """Return the number of rows whose logits in fp32 make CHUNK_BYTES.

    Args:
        head: Output layer with a `weight` of shape (V, D).

    Returns:
        The number of rows, at least 1; 256 for a head without a weight.
    """
    shape = getattr(getattr(head, "weight", None), "shape", None)
    if shape is None:
        return 256
    return max(1, CHUNK_BYTES // 4 // shape[0])


# ---- a head that is a matrix


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None) -> Tensor:
    """Return -log p(label) of each row (N,), 0 where the label is IGNORE."""
    _check(hidden, labels, chunk)
    device = weight.device
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast:
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    size = chunk or _chunk_rows(hidden, weight)
    if weight.requires_grad and weight.dtype != hidden.dtype and not autocast:
        row_losses = _row_losses(lambda rows: F.linear(rows, weight))
        return in_chunks(row_losses, size, hidden, labels)
    if not torch.is_grad_enabled():  # no gradient is needed, so compute none
        hidden = hidden.detach()
        weight = weight.detach()
    ignored = labels == IGNORE  # (N,)
    losses: Any = _Head.apply(hidden, weight, labels.masked_fill(ignored, 0), size)
    return losses.masked_fill(ignored, 0)  # in backward, this multiplies the gradient by 0


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """Return the default number of rows of a chunk."""
    size = CHUNK_BYTES
    if weight.requires_grad:
        size *= 4  # fewer chunks, because each one is added to a dW that is as large as W
    rows = size // hidden.dtype.itemsize // weight.shape[0]
    smallest = 1 if weight.device.type == "cpu" else GPU_ROWS
    return max(smallest, rows)


def _row_losses(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function from rows and labels to the losses of a head."""

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        logits = head(rows).float()  # (C, V)
        return F.cross_entropy(logits, labels, reduction="none")

    return losses


class _Head(torch.autograd.Function):
    """The losses (N,) of a head that is a matrix.

    Keeps dloss/dh if the weight is frozen; otherwise hidden, weight and labels.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.chunk = chunk
        ctx.trains_weight = ctx.needs_input_grad[1]
        with_gradient = ctx.needs_input_grad[0] and not ctx.trains_weight
        loss = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)  # (N,)
        gradient = None
        if with_gradient:
            gradient = torch.empty_like(hidden)  # (N, D)
        W = weight.to(hidden.dtype)  # (V, D); a copy under autocast
        for rows, logits in _logits_in_chunks(hidden, W, chunk):
            _loss_and_gradient(logits, labels[rows], loss[rows], with_gradient)
            if gradient is not None:
                torch.mm(logits, W, out=gradient[rows])  # (C, D)
        if ctx.trains_weight:
            ctx.save_for_backward(hidden, weight, labels)
        else:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        if ctx.trains_weight:
            hidden, weight, labels = ctx.saved_tensors
            dh, dW = _gradients(hidden, weight, labels, grads[0], ctx.chunk)
            return dh, dW, None, None
        (gradient,) = ctx.saved_tensors
        factor = grads[0][:, None] / LIFT.get(gradient.dtype, 1)  # (N, 1)
        return _scaled(gradient, factor), None, None, None


def _gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, dloss: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return dh (N, D) and dW (V, D) from logits that are computed again."""
    factor = dloss[:, None] / LIFT.get(hidden.dtype, 1)  # (N, 1)
    dh = torch.empty_like(hidden)  # (N, D)
    dW = torch.zeros_like(weight)  # (V, D)
    loss = torch.empty_like(dloss)  # (N,), not used
    W = weight.to(hidden.dtype)  # (V, D)
    for rows, logits in _logits_in_chunks(hidden, W, chunk):
        _loss_and_gradient(logits, labels[rows], loss[rows], True)
        torch.mm(logits, W, out=dh[rows])  # (C, D)
        dh[rows] = _scaled(dh[rows], factor[rows])
        h = _scaled(hidden[rows], factor[rows])  # (C, D)
        if W is weight:
            dW.addmm_(logits.T, h)
        else:
            dW.add_(logits.T @ h)
    return dh, dW


def _logits_in_chunks(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and their logits (C, V), which overwrite those of the slice before."""
    N = len(hidden)
    shape = (min(chunk, N), len(weight))
    buffer = allocator.empty(shape, hidden.dtype, hidden.device, once=True)  # (C, V)
    for start in range(0, N, chunk):
        rows = slice(start, start + chunk)
        inputs = hidden[rows]  # (C, D)
        yield rows, torch.mm(inputs, weight.T, out=buffer[: len(inputs)])


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x · factor, computed in fp32: a loss scale of 2^16 is infinite in fp16."""
    return (x.float() * factor).to(x.dtype)


def _loss_and_gradient(logits: Tensor, labels: Tensor, loss: Tensor, with_gradient: bool) -> None:
    """Write -log p(label) (C,), and lift · dloss/dlogits over the logits (C, V) if it is wanted."""
    if has_kernels(logits.device):
        lift = LIFT.get(logits.dtype, 1)
        torch.ops.minilora.cross_entropy_(logits, labels, loss, with_gradient, lift)
        return
    if fast() and bindings.cross_entropy(logits, labels, loss, with_gradient):
        return
    C, V = logits.shape
    for rows in row_blocks(C, V, logits.device, 2**21):
        targets = labels[rows, None]  # (R, 1)
        log_p = logits[rows].log_softmax(-1, dtype=torch.float32)  # (R, V)
        log_p_label = log_p.gather(1, targets)  # (R, 1)
        loss[rows] = -log_p_label.squeeze(1)
        if with_gradient:
            # dloss/dlogits = softmax(logits) - onehot(y); expm1 gives p - 1 without cancellation
            error = log_p.exp_().scatter_(1, targets, log_p_label.expm1())  # (R, V)
            if logits.dtype in LIFT:
                error = error.mul_(LIFT[logits.dtype])
            logits[rows] = error


def _kernel(logits: Tensor, labels: Tensor, loss: Tensor, gradient: bool, lift: float) -> None:
    """Run the GPU kernel."""
    from minilora_kernels.triton.cross_entropy import cross_entropy

    cross_entropy(logits, labels, loss, gradient, lift)


def _kernel_fake(logits: Tensor, labels: Tensor, loss: Tensor, gradient: bool, lift: float) -> None:
    """Do nothing: the kernel returns nothing."""


# a custom op, which is opaque to torch.compile
register(
    "cross_entropy_",
    _kernel,
    _kernel_fake,
    "(Tensor(a!) logits, Tensor labels, Tensor(b!) loss, bool gradient, float lift) -> ()",
)


def _check(hidden: Tensor, labels: Tensor, chunk: int | None) -> None:
    """Raise ValueError unless the arguments of a loss fit together."""
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"cross-entropy: expected hidden (N, D) and labels (N,), got {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}. Select the labelled positions first."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(
            f"chunk is the number of rows at a time and must be at least 1, got {chunk}"
        )
