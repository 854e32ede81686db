"""Calls of the compiled operations (rms_norm.c, rope.c, ...) with tensors.

Each function returns its results, or None where no compiled code fits: without a C compiler, for a
tensor on another device than the CPU, for a dtype other than fp32 and bf16, and for a subclass of
Tensor. The first call waits for the compiler, so that the numbers of a run do not depend on the
compiler's speed; `begin` starts it earlier. MINILORA_STEPS=torch switches the compiled code off.
"""

import ctypes
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from minilora_kernels import allocator
from minilora_kernels.c.compiler import Library

_FOLDER = Path(__file__).parent
_NAMES = ("attention", "cross_entropy", "linear_token", "rms_norm", "rope", "swiglu")
_SOURCES = [_FOLDER / f"{name}.c" for name in _NAMES]
_HEADERS = [_FOLDER / "numbers.h"]
_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
_LIBRARIES = {
    torch.float32: Library("operations", _SOURCES, _HEADERS, _FLAGS),
    torch.bfloat16: Library("operations", _SOURCES, _HEADERS, [*_FLAGS, "-DBF16"]),
}
# Tiles of products in fp32; a product and a sum are one instruction.
_TILES = Library(
    "attention_backward",
    [_FOLDER / "attention_backward.c"],
    [_FOLDER / "numbers.h", _FOLDER / "tile.h"],
    [*_FLAGS, "-ffp-contract=fast"],
)
_TILE_COLUMNS = 32  # a multiple of COLUMNS of tile.h, on every processor
_BLOCK_ROWS = 48  # ROWS of attention_backward.c
_BUSY = 0.75  # smallest share of its threads that attention_backward keeps busy
_TENSOR_TYPES = (Tensor, nn.Parameter, FakeTensor)


def begin(dtype: torch.dtype) -> None:
    """Start the compiler; it runs at the same time as the caller.

    Args:
        dtype: Dtype of the values that the operations will get.
    """
    if dtype in _LIBRARIES and wanted():
        _LIBRARIES[dtype].begin()
    if dtype == torch.float32 and wanted():
        _TILES.begin()


def wanted() -> bool:
    """Return False if MINILORA_STEPS=torch switches the compiled code and the kernels off."""
    return os.environ.get("MINILORA_STEPS") != "torch"


def ready(dtype: torch.dtype) -> bool:
    """Wait for the compiler, and return True if compiled code runs for a dtype.

    Args:
        dtype: Dtype of the values.
    """
    return wanted() and dtype in _LIBRARIES and _LIBRARIES[dtype].loaded(wait=True) is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor] | None:
    """Normalise the rows of x.

    Args:
        x: Tensor of shape (…, D).
        weight: Vector w, or w - 1 if `gemma`, of shape (D,).
        eps: ε of the norm.
        gemma: The weight is stored as w - 1.

    Returns:
        y with the shape and dtype of x, and r, fp32 of shape (…, 1); or None.
    """
    x = x.contiguous()
    y = allocator.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)  # (…, 1)
    if not _run("rms_norm", x, weight, y, r, r.numel(), x.shape[-1], eps, gemma):
        return None
    return y, r


def rms_norm_backward(
    x: Tensor, weight: Tensor, r: Tensor, dy: Tensor, with_weight: bool, gemma: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return the gradients of x and of the weight.

    Args:
        x: Input of the norm, of shape (…, D).
        weight: Vector w, or w - 1 if `gemma`, of shape (D,).
        r: Result of `rms_norm`, fp32 of shape (…, 1).
        dy: Gradient of y, of shape (…, D).
        with_weight: Also compute the gradient of the weight.
        gemma: The weight is stored as w - 1.

    Returns:
        dx with the shape and dtype of x, and dw, fp32 of shape (D,), or None without `with_weight`.
        None in place of both where no compiled code fits.
    """
    x = x.contiguous()
    dy = dy.contiguous()
    dx = allocator.empty_like(x)
    N = r.numel()
    D = x.shape[-1]
    if not _run("rms_norm_backward", x, weight, r, dy, dx, N, D, gemma):
        return None
    if not with_weight:
        return dx, None
    dw = torch.empty(D, dtype=torch.float32, device=x.device)  # (D,)
    _run("rms_norm_weight", x, r, dy, dw, N, D)
    return dx, dw


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor | None:
    """Return y = f(gate) up.

    Args:
        gate: Tensor of any shape.
        up: Tensor with the shape of `gate`.
        gelu: f is GELU in its tanh form; otherwise f is SiLU.

    Returns:
        y with the shape and dtype of `gate`; or None.
    """
    if gate.dtype != up.dtype:
        return None
    gate = gate.contiguous()
    up = up.contiguous()
    y = allocator.empty_like(gate)
    if not _run("gated", gate, up, y, gate.numel(), gelu):
        return None
    return y


def gated_backward(
    gate: Tensor, up: Tensor, dy: Tensor, gelu: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of the gate and of `up`.

    Args:
        gate: Tensor of any shape.
        up: Tensor with the shape of `gate`.
        dy: Gradient of y, with the shape of `gate`.
        gelu: f is GELU in its tanh form; otherwise f is SiLU.

    Returns:
        dgate and dup with the shape and dtype of `gate`; or None.
    """
    if gate.dtype != up.dtype:
        return None
    gate = gate.contiguous()
    up = up.contiguous()
    dy = dy.contiguous()
    dgate = allocator.empty_like(gate)
    dup = allocator.empty_like(up)
    if not _run("gated_backward", gate, up, dy, dgate, dup, gate.numel(), gelu):
        return None
    return dgate, dup


def cross_entropy(logits: Tensor, labels: Tensor, loss: Tensor, wanted: bool) -> bool:
    """Write the loss of each row and, on request, its gradient over the logits.

    All tensors are contiguous. A label outside [0, V) is left to torch, because C would not notice
    it.

    Args:
        logits: Matrix of shape (N, V).
        labels: Labels, int64 of shape (N,).
        loss: Receives the losses, fp32 of shape (N,).
        wanted: Overwrite the logits with their gradient.

    Returns:
        False if no compiled code fits; then nothing has been written.
    """
    if labels.dtype != torch.int64:
        return False
    N, V = logits.shape
    outside = (labels < 0) | (labels >= V)  # (N,)
    if bool(outside.any()):
        return False
    return _run("cross_entropy", logits, labels, loss, N, V, wanted)


def attention_weights(scores: Tensor, dP: Tensor, start: int, G: int) -> bool:
    """Overwrite scores and dP with the weights P and the gradient of the scores dS.

    Args:
        scores: Scores of a block of queries, contiguous, of shape (N, R, S); G rows a query.
        dP: Gradient of the weights, contiguous, with the shape of `scores`.
        start: Position of the first query of the block.
        G: Number of query heads that share a key head.

    Returns:
        False if no compiled code fits; then nothing has been written.
    """
    return _run("attention_weights", scores, dP, *scores.shape, start, G)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of causal attention of T queries on the same T keys, in fp32.

    A thread works on whole key heads. Where they would leave threads idle, the result is None.

    Args:
        q: Queries of shape (B, heads, T, d).
        k: Keys of shape (B, kv_heads, T, d).
        v: Values with the shape of k.
        dy: Gradient of the output, with the shape of q.
        scale: Factor on the scores.

    Returns:
        dq, a view of a contiguous (B, T, heads, d), and dk and dv with the shape of k; or None.
    """
    tensors = (q, k, v, dy)
    for x in tensors:
        if x.dtype != torch.float32 or x.stride(-1) != 1:
            return None
    B, heads, T, d = q.shape
    kv_heads = k.shape[1]
    threads = torch.get_num_threads()
    rounds = math.ceil(B * kv_heads / threads)
    if d % _TILE_COLUMNS != 0 or B * kv_heads < _BUSY * rounds * threads:
        return None
    width = math.ceil(T / _TILE_COLUMNS) * _TILE_COLUMNS  # T, rounded up
    part = 2 * width * d + 2 * _BLOCK_ROWS * width + _BLOCK_ROWS * d
    memory = allocator.empty((threads, part), q.dtype, q.device)
    dq = allocator.empty((B, T, heads, d), q.dtype, q.device).transpose(1, 2)  # (B, heads, T, d)
    dk = allocator.empty((B, kv_heads, T, d), q.dtype, q.device)
    dv = allocator.empty((B, kv_heads, T, d), q.dtype, q.device)
    steps = [x.stride()[:3] for x in (*tensors, dq)]
    outputs = (dq, dk, dv, memory)
    sizes = (tuple(q.shape), heads // kv_heads, *steps, scale, threads, part)
    if not _run("attention_backward", q, k, v, dy, *outputs, *sizes, library=_TILES):
        return None
    return dq, dk, dv


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor | None:
    """Rotate each head by the angles of its position.

    Args:
        x: Tensor of shape (B, heads, T, d).
        cos: Cosine of the angles, of shape (B or 1, 1, T, d), each angle in both halves.
        sin: Sine of the angles, with the shape of `cos`.
        sign: 1.0 to rotate forward, -1.0 to rotate back.

    Returns:
        y of shape (B, heads, T, d), a view of a contiguous (B, T, heads, d); or None.
    """
    if x.stride(-1) != 1 or x.dtype != cos.dtype:
        return None
    B, heads, T, d = x.shape
    cos = cos.contiguous()
    sin = sin.contiguous()
    y = allocator.empty((B, T, heads, d), x.dtype, x.device).transpose(1, 2)  # (B, heads, T, d)
    batch_stride = 0
    if len(cos) > 1:
        batch_stride = T * d
    sizes = (x.shape[:3], x.stride()[:3], y.stride()[:3], d // 2, batch_stride)
    if not _run("rotate", x, cos, sin, y, *sizes, sign):
        return None
    return y


def token_product(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """Return a function that takes one token through a dense layer.

    Sums are in fp32, and a sum with the bias is rounded once.

    Args:
        layer: A layer with a weight (out, in) and a bias or none, all of one dtype.

    Returns:
        A function from x (…, in), of one token and of the layer's dtype, to W x + bias (…, out);
        or None where no compiled code fits.
    """
    weight = layer.weight
    bias = layer.bias
    if not weight.is_cpu or not wanted() or weight.dtype not in _LIBRARIES:
        return None
    library = _LIBRARIES[weight.dtype].loaded(wait=True)
    if library is None:
        return None
    function = library.linear_token
    function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2]

    def multiply(x: Tensor) -> Tensor:
        x_32 = x.reshape(-1).float()  # (in,)
        y = x.new_empty((*x.shape[:-1], len(weight)))  # (…, out)
        bias_address = None if bias is None else bias.data_ptr()
        function(weight.data_ptr(), x_32.data_ptr(), bias_address, y.data_ptr(), *weight.shape)
        return y

    return multiply


def _run(name: str, first: Tensor, *arguments: Any, library: Library | None = None) -> bool:
    """Call a C function; return False where no compiled code fits the first tensor."""
    if not first.is_cpu or type(first) not in _TENSOR_TYPES or first.dtype not in _LIBRARIES:
        return False
    if not wanted():
        return False
    loaded = (library or _LIBRARIES[first.dtype]).loaded(wait=True)
    if loaded is None:
        return False
    if type(first) is not FakeTensor:  # a fake tensor has no values, nor have its results
        function = getattr(loaded, name)
        function(*map(_as_c, (first, *arguments)))
    return True


def _as_c(argument: Any) -> Any:
    """Return an argument as C takes it: a pointer to values, an array of sizes, or a number."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument)
