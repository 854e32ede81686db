"""steps.c for tensors: each function writes its results and says True, or does nothing and says False.

False: no C compiler, another device than the CPU, another dtype than fp32 and bf16, or a tensor of another kind. The
first call waits for the compiler (`begin` starts it sooner), so that a run's numbers do not hang on its speed.
What is written must be contiguous; what is read is made so.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import Library

_SOURCE, _FLAGS = Path(__file__).with_name("steps.c"), ("-fno-math-errno", "-fno-trapping-math", "-mprefer-vector-width=512")
_LIBRARIES = {torch.float32: Library(_SOURCE, *_FLAGS), torch.bfloat16: Library(_SOURCE, *_FLAGS, "-DBF16")}


def begin(dtype: torch.dtype) -> None:
    """Start the compiler for values of `dtype`, beside whatever comes next."""
    if dtype in _LIBRARIES and _wanted():
        _LIBRARIES[dtype].begin()


def rms_norm(x: Tensor, weight: Tensor, y: Tensor, r: Tensor, eps: float, gemma: bool) -> bool:
    """x (N, D), weight (D,) -> y (N, D), r fp32 (N, 1)."""
    return _run("rms_norm", x.contiguous(), weight, y, r, *x.shape, eps, gemma)


def rms_norm_backward(
    x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, dx: Tensor, dw: Tensor | None, gemma: bool
) -> bool:
    """x, dy (N, D), r fp32 (N, 1) -> dx (N, D) and, unless None, dw fp32 (D,)."""
    x, dy = x.contiguous(), dy.contiguous()
    done = _run("rms_norm_backward", x, weight, r, dy, dx, *x.shape, gemma)
    return done and (dw is None or _run("rms_norm_weight", x, r, dy, dw, *x.shape))


def gated(gate: Tensor, up: Tensor, y: Tensor, gelu: bool) -> bool:
    """Three tensors of one shape."""
    return gate.dtype == up.dtype and _run("gated", gate.contiguous(), up.contiguous(), y, gate.numel(), gelu)


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor, gelu: bool) -> bool:
    """Five tensors of one shape."""
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    return gate.dtype == up.dtype and _run("gated_backward", gate, up, dy, dgate, dup, gate.numel(), gelu)


def cross_entropy(logits: Tensor, labels: Tensor, loss: Tensor, wanted: bool) -> bool:
    """logits (N, V), labels int64 (N,) -> loss fp32 (N,); if `wanted` its gradient stands in place of the logits."""
    return _run("cross_entropy", logits, labels.contiguous(), loss, *logits.shape, wanted)


def attention_weights(scores: Tensor, dP: Tensor, start: int, G: int) -> bool:
    """scores, dP (N, R, S), rows from query `start` on, G a query -> the weights and the scores' gradient, in place."""
    return _run("attention_weights", scores, dP, *scores.shape, start, G)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, sign: float) -> bool:
    """x (B, heads, T, d) of any strides but the last, cos and sin (B or 1, 1, T, d) -> y (B, heads, T, d)."""
    if x.stride(-1) != 1 or y.stride(-1) != 1 or x.dtype != cos.dtype:
        return False
    cos, sin = cos.contiguous(), sin.contiguous()
    size, half = x.shape[:3], x.shape[3] // 2
    per_row = cos[0].numel() if len(cos) > 1 else 0
    return _run("rotate", x, cos, sin, y, size, x.stride()[:3], y.stride()[:3], half, per_row, sign)


def _wanted() -> bool:
    return os.environ.get("MINILORA_STEPS") != "torch"


def _run(name: str, first: Tensor, *arguments: Any) -> bool:
    if not first.is_cpu or type(first) not in (Tensor, nn.Parameter, FakeTensor) or first.dtype not in _LIBRARIES:
        return False
    library = _LIBRARIES[first.dtype].loaded(wait=True) if _wanted() else None
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
