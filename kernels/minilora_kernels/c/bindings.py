"""operations.c for tensors: each function gives its results, or None where nothing compiled fits.

That is: no C compiler, another device than the CPU, another dtype than fp32 and bf16, or a tensor of another kind.
The first call waits for the compiler (`begin` starts it sooner), so that a run's numbers do not hang on its speed.
MINILORA_STEPS=torch does without.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from minilora_kernels import allocator
from minilora_kernels.c.compiler import Library

_SOURCE, _FLAGS = (
    Path(__file__).with_name("operations.c"),
    ("-fno-math-errno", "-fno-trapping-math"),
)
_KINDS = (Tensor, nn.Parameter, FakeTensor)
_LIBRARIES = {torch.float32: Library(_SOURCE, *_FLAGS), torch.bfloat16: Library(_SOURCE, *_FLAGS, "-DBF16")}


def begin(dtype: torch.dtype) -> None:
    """Start the compiler for values of `dtype`, beside whatever comes next."""
    if dtype in _LIBRARIES and wanted():
        _LIBRARIES[dtype].begin()


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor] | None:
    """x (…, D), weight (D,) -> y like x, r fp32 (…, 1)."""
    x, y = x.contiguous(), allocator.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return (y, r) if _run("rms_norm", x, weight, y, r, r.numel(), x.shape[-1], eps, gemma) else None


def rms_norm_backward(
    x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, with_weight: bool, gemma: bool
) -> tuple[Tensor, Tensor | None] | None:
    """x, dy (…, D), r fp32 (…, 1) -> dx like x, and dw fp32 (D,) if asked for."""
    (x, dy), dx, D = (t.contiguous() for t in (x, dy)), allocator.empty_like(x), x.shape[-1]
    if not _run("rms_norm_backward", x, weight, r, dy, dx, r.numel(), D, gemma):
        return None
    dw = torch.empty(D, dtype=torch.float32, device=x.device) if with_weight else None
    if dw is not None:
        _run("rms_norm_weight", x, r, dy, dw, r.numel(), D)
    return dx, dw


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor | None:
    """Tensors of one shape -> y."""
    (gate, up), y = (t.contiguous() for t in (gate, up)), allocator.empty_like(gate)
    return y if gate.dtype == up.dtype and _run("gated", gate, up, y, gate.numel(), gelu) else None


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor] | None:
    """Tensors of one shape -> dgate, dup."""
    gate, up, dy = (t.contiguous() for t in (gate, up, dy))
    dgate, dup = allocator.empty_like(gate), allocator.empty_like(up)
    done = gate.dtype == up.dtype and _run("gated_backward", gate, up, dy, dgate, dup, gate.numel(), gelu)
    return (dgate, dup) if done else None


def cross_entropy(logits: Tensor, labels: Tensor, loss: Tensor, wanted: bool) -> bool:
    """logits (N, V), labels int64 (N,) -> loss fp32 (N,), written; if `wanted` its gradient stands in place of the
    logits. All contiguous. False: nothing was done, also for a label outside [0, V), which C would not notice."""
    inside = not labels.numel() or bool((labels.min() >= 0) & (labels.max() < logits.shape[1]))
    return inside and labels.dtype == torch.int64 and _run("cross_entropy", logits, labels, loss, *logits.shape, wanted)


def attention_weights(scores: Tensor, dP: Tensor, start: int, G: int) -> bool:
    """scores, dP (N, R, S) contiguous, rows from query `start` on, G a query -> the weights and the scores' gradient,
    in their place. False: nothing was done."""
    return _run("attention_weights", scores, dP, *scores.shape, start, G)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor | None:
    """x (B, heads, T, d), cos and sin (B or 1, 1, T, d) -> y (B, heads, T, d), contiguous as (B, T, heads, d)."""
    if x.stride(-1) != 1 or x.dtype != cos.dtype:
        return None
    (B, heads, T, d), cos, sin = x.shape, cos.contiguous(), sin.contiguous()
    y = allocator.empty((B, T, heads, d), x.dtype, x.device).transpose(1, 2)
    per_row = T * d if len(cos) > 1 else 0
    done = _run("rotate", x, cos, sin, y, x.shape[:3], x.stride()[:3], y.stride()[:3], d // 2, per_row, sign)
    return y if done else None


def wanted() -> bool:
    """Whether steps in one pass are: MINILORA_STEPS=torch does without."""
    return os.environ.get("MINILORA_STEPS") != "torch"


def _run(name: str, first: Tensor, *arguments: Any) -> bool:
    if not first.is_cpu or type(first) not in _KINDS or first.dtype not in _LIBRARIES:
        return False
    library = _LIBRARIES[first.dtype].loaded(wait=True) if wanted() else None
    if library is None:
        return False
    if type(first) is not FakeTensor:  # which has no values, and its results have none either
        getattr(library, name)(*map(_c, (first, *arguments)))
    return True


def _c(x: Any) -> Any:
    """An argument as C takes it: a pointer to a tensor's values, an array of sizes, a number."""
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, tuple):
        return (ctypes.c_int64 * len(x))(*x)
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)
