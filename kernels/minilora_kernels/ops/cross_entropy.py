"""The loss of a language-model head, without ever holding the logits of a whole batch.

    logits = h W^T                       (N, V): 16k tokens x 128k words x 4 bytes = 8 GB
    loss   = sum_n  logsumexp(logits_n) - logits_n[y_n]
    dloss/dlogits = softmax(logits) - onehot(y)
    dloss/dh      = (softmax(logits) - onehot(y)) W

The gradient needs nothing but the logits, so both are computed chunk by chunk in the forward pass, and each chunk's
logits are overwritten by the next; only dloss/dh (N, D) is kept. Within a chunk fp32 is needed for a few rows at a
time, which stay in a CPU's cache; on a GPU a kernel turns a chunk's logits into loss and gradient in one launch
(minilora_kernels/triton/cross_entropy.py). That holds while W is frozen, as it is in LoRA. The gradient of a W that
trains needs the factor that comes from outside, so backward makes each chunk's logits once more:

    dloss/dW = sum over chunks of  (softmax(logits) - onehot(y))^T  (dloss/dloss_n h_n)

A head that is not a plain matrix goes through `in_chunks`, which recomputes its chunks in backward.
The loss is a *sum* over tokens: whoever calls divides, once, by the tokens of the whole step.
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

CHUNK_BYTES = 2**25  # of logits held at a time, whatever the vocabulary
GPU_ROWS = 512  # and yet at least so many: with fewer a GPU reads W for longer than it multiplies (docs/LOG.md)
IGNORE = -100  # the label of a token that is read but not learned; F.cross_entropy's, too
LIFT = {torch.float16: 2.0**10}  # an exact factor that keeps small gradients away from underflow


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N,) in [0, V) or IGNORE -> the summed loss, fp32. The specification."""
    logits = (hidden @ weight.T).float()  # (N, V)
    return F.cross_entropy(logits, labels, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """`plain_cross_entropy`, `chunk` rows at a time; the gradient flows into a weight only if that requires grad."""
    return _losses(hidden, weight, labels, chunk).sum()


def head_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int | None = None) -> Tensor:
    """The same for any output layer: a frozen `nn.Linear` takes the fast path, everything else is called in chunks."""
    return head_logprobs(hidden, head, labels, chunk).sum().neg()


def head_logprobs(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int | None = None) -> Tensor:
    """log p(label) of each row, (N,) in fp32: the terms of which `head_cross_entropy` is minus the sum."""
    if type(head) is nn.Linear and head.bias is None:
        return -_losses(hidden, head.weight, labels, chunk)
    _check(hidden, labels, chunk)
    return -in_chunks(_row_losses(head), chunk or rows_at_a_time(head), hidden, labels)


def in_chunks(function: Callable[..., Tensor], chunk: int, *rows: Tensor) -> Tensor:
    """`function(*rows)` on `chunk` rows at a time; backward computes again what it held inside.

    function: maps tensors of C rows each to (C, ...); it may use parameters, which get their gradients.
    """
    parts = zip(*(tensor.split(chunk) for tensor in rows), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])  # (N, ...)


def rows_at_a_time(head: nn.Module) -> int:
    """How many rows of logits, in fp32, make CHUNK_BYTES; 256 for a head that does not tell its size."""
    shape = getattr(getattr(head, "weight", None), "shape", None)
    return max(1, CHUNK_BYTES // 4 // shape[0]) if shape is not None else 256


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None) -> Tensor:
    """-log p(label) of each row (N,), for an output layer that is a plain matrix; 0 where the label is IGNORE."""
    _check(hidden, labels, chunk)
    autocast = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
    if autocast:
        hidden = hidden.to(torch.get_autocast_dtype(weight.device.type))
    least = 1 if weight.device.type == "cpu" else GPU_ROWS
    size = CHUNK_BYTES * (4 if weight.requires_grad else 1)  # each chunk is added to a dW as large as W
    chunk = chunk or max(least, size // hidden.dtype.itemsize // weight.shape[0])
    if weight.requires_grad and weight.dtype != hidden.dtype and not autocast:
        return in_chunks(_row_losses(lambda rows: F.linear(rows, weight)), chunk, hidden, labels)
    if not torch.is_grad_enabled():  # no gradient is asked for: compute none
        hidden, weight = hidden.detach(), weight.detach()
    ignored = labels == IGNORE
    losses: Any = _Head.apply(hidden, weight, labels.masked_fill(ignored, 0), chunk)
    return losses.masked_fill(ignored, 0)  # which backward turns into a factor of 0


def _row_losses(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda rows, targets: F.cross_entropy(head(rows).float(), targets, reduction="none")


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.chunk, again = chunk, ctx.needs_input_grad[1]
        loss = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)  # (N,)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not again else None
        W = weight.to(hidden.dtype)  # another one under autocast
        for part, logits in _chunks(hidden, W, chunk):
            _rows(logits, labels[part], loss[part], gradient is not None)
            if gradient is not None:
                torch.mm(logits, W, out=gradient[part])  # (C, D)
        ctx.save_for_backward(*((hidden, weight, labels) if again else (gradient,)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        kept, *rest = ctx.saved_tensors
        factor = grads[0][:, None] / LIFT.get(kept.dtype, 1)  # (N, 1)
        if not rest:
            return _times(kept, factor), None, None, None
        weight, labels = rest
        gradient, dW, loss = torch.empty_like(kept), torch.zeros_like(weight), torch.empty_like(grads[0])
        W = weight.to(kept.dtype)
        for part, logits in _chunks(kept, W, ctx.chunk):
            _rows(logits, labels[part], loss[part], True)
            torch.mm(logits, W, out=gradient[part])  # (C, D)
            gradient[part] = _times(gradient[part], factor[part])
            h = _times(kept[part], factor[part])
            dW.addmm_(logits.T, h) if W is weight else dW.add_(logits.T @ h)  # (V, D)
        return gradient, dW, None, None


def _chunks(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their logits (C, V), each of which overwrites the one before."""
    buffer = allocator.empty((min(chunk, len(hidden)), len(weight)), hidden.dtype, hidden.device, once=True)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        yield part, torch.mm(hidden[part], weight.T, out=buffer[: len(hidden[part])])


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """In fp32, for a loss scale of 2^16 is infinite in fp16."""
    return (x.float() * factor).to(x.dtype)


def _rows(logits: Tensor, labels: Tensor, loss: Tensor, wanted: bool) -> None:
    """Write -log p(label) (C,) and, if `wanted`, lift · (softmax(logits) - onehot(y)) in place of the logits (C, V)."""
    if has_kernels(logits.device):
        torch.ops.minilora.cross_entropy_(logits, labels, loss, wanted, LIFT.get(logits.dtype, 1))
        return
    if fast() and bindings.cross_entropy(logits, labels, loss, wanted):
        return
    for rows in row_blocks(len(logits), logits.shape[1], logits.device, 2**21):
        targets = labels[rows, None]  # (R, 1)
        log_p = logits[rows].log_softmax(-1, dtype=torch.float32)  # (R, V)
        log_p_y = log_p.gather(1, targets)
        loss[rows] = -log_p_y.squeeze(1)
        if wanted:
            # dloss/dlogits = softmax(logits) - onehot(y)
            error = log_p.exp_().scatter_(1, targets, log_p_y.expm1())  # p - 1 without cancellation
            logits[rows] = error.mul_(LIFT[logits.dtype]) if logits.dtype in LIFT else error


def _kernel(logits: Tensor, labels: Tensor, loss: Tensor, gradient: bool, lift: float) -> None:
    from minilora_kernels.triton.cross_entropy import cross_entropy

    cross_entropy(logits, labels, loss, gradient, lift)


# a custom op, which torch.compile takes as one piece
_SCHEMA = "(Tensor(a!) logits, Tensor labels, Tensor(b!) loss, bool gradient, float lift) -> ()"
register("cross_entropy_", _kernel, lambda *arguments: None, _SCHEMA)


def _check(hidden: Tensor, labels: Tensor, chunk: int | None) -> None:
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"cross-entropy: expected hidden (N, D) and labels (N,), got {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}. Select the labelled positions first."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is the number of rows at a time and must be at least 1, got {chunk}")
