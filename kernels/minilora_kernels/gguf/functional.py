"""Custom operators of the quantised types of GGUF.

The operators take tensors and numbers, not a GGUFWeight, and are opaque to torch.compile. The
backward pass has an operator name of its own, as that of NF4 has (nf4/functional.py).

On a CPU compiled C does the work (c/gguf), elsewhere torch. The environment variable MINILORA_NF4
switches C off, as it does for NF4 (backend.py).
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.backend import ENVIRONMENT
from minilora_kernels.c.gguf import call
from minilora_kernels.custom_op import register
from minilora_kernels.gguf.weight import GGUFWeight, check_matrix, decode_rows, row_order

FEW = 8  # rows of x up to which a product from the codes is faster than one with a dense W
_CHUNK = 1 << 18  # values that torch decodes at a time: 1 MiB of fp32


def multiplier(
    weight: GGUFWeight, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Return a function that multiplies few rows by a weight without a dense W.

    The look-ups that every call would repeat are done once. The function holds the address of the
    bytes: it is valid until they move.

    Args:
        weight: Weight of shape (out, in).
        dtype: Dtype of x.

    Returns:
        A function of contiguous x (…, in), at most FEW rows, and bias (out,) or None, which returns
        W x + bias (…, out). None if no compiled code fits, or if the environment forbids it.
    """
    blocks, shape, type_name, heads = weight.parts()
    if not _c_allowed(blocks) or not blocks.is_contiguous():
        return None
    return call.multiplier(blocks, shape, type_name, heads, dtype)


def _dequantize(
    blocks: Tensor, shape: Sequence[int], type_name: str, heads: int, dtype: torch.dtype
) -> Tensor:
    """Return a new dense matrix of `shape` and `dtype`."""
    out = allocator.empty(shape, dtype, blocks.device)  # (out, in)
    _dequantize_out(blocks, type_name, heads, out)
    return out


def _dequantize_fake(blocks, shape, type_name, heads, dtype) -> Tensor:
    """Return the shape of `_dequantize`."""
    return blocks.new_empty(shape, dtype=dtype)


def _dequantize_out(blocks: Tensor, type_name: str, heads: int, out: Tensor) -> None:
    """Write the dense matrix to a contiguous `out`, in its shape and dtype."""
    check_matrix(blocks, out.shape, type_name, heads)
    if not out.is_contiguous():
        raise ValueError(
            "dequantize_gguf_out: expected a contiguous out, got one with strides "
            f"{out.stride()}; call out.contiguous() first"
        )
    rows, inner = out.shape
    if out.numel() == 0:
        return
    if _c_allowed(blocks) and out.is_cpu and call.dequantize(blocks, type_name, heads, out):
        return
    order = row_order(rows, heads, blocks.device)
    rows_at_a_time = max(1, _CHUNK // inner)
    for start in range(0, rows, rows_at_a_time):
        stop = min(start + rows_at_a_time, rows)
        stored = blocks[start:stop] if order is None else blocks[order[start:stop]]
        out[start:stop].copy_(decode_rows(stored, type_name))  # rounds once


def _dequantize_out_fake(blocks, type_name, heads, out) -> None:
    """Do nothing: `_dequantize_out` returns nothing."""


def _gemv(
    x: Tensor,
    blocks: Tensor,
    shape: Sequence[int],
    type_name: str,
    heads: int,
    bias: Tensor | None,
) -> Tensor:
    """Return W x + bias (…, out) for x (…, in): from the codes, or else with a dense W."""
    x_fits = x.shape[-1:] == (shape[1],)
    bias_fits = bias is None or (bias.shape == (shape[0],) and bias.dtype == x.dtype)
    if not x_fits or not bias_fits:
        raise ValueError(
            f"gemv_gguf with a weight of {tuple(shape)}: expected x of (…, {shape[1]}) and a bias "
            f"of ({shape[0]},) in its dtype or None, got {tuple(x.shape)} and "
            f"{None if bias is None else (tuple(bias.shape), bias.dtype)}"
        )
    few = 0 < x.shape[:-1].numel() <= FEW
    if few and x.is_cpu and _c_allowed(blocks):
        check_matrix(blocks, torch.Size(shape), type_name, heads)
        multiply = call.multiplier(blocks, shape, type_name, heads, x.dtype)
        if multiply is not None:
            return multiply(x.contiguous(), None if bias is None else bias.contiguous())
    W = _dequantize(blocks, shape, type_name, heads, x.dtype)  # (out, in)
    return F.linear(x, W, bias)


def _gemv_fake(x, blocks, shape, type_name, heads, bias) -> Tensor:
    """Return the shape of `_gemv`."""
    return x.new_empty((*x.shape[:-1], shape[0]))


def _c_allowed(blocks: Tensor) -> bool:
    """Return True for bytes on a CPU, unless the environment names a path."""
    return blocks.is_cpu and ENVIRONMENT not in os.environ


_GEMV = (
    "(Tensor x, Tensor blocks, SymInt[] shape, str type_name, int heads, Tensor? bias) -> Tensor"
)
_DEQUANTIZE = (
    "(Tensor blocks, SymInt[] shape, str type_name, int heads, ScalarType dtype) -> Tensor"
)
_DEQUANTIZE_OUT = "(Tensor blocks, str type_name, int heads, Tensor(a!) out) -> ()"

register("gemv_gguf", _gemv, _gemv_fake, _GEMV)
register("dequantize_gguf", _dequantize, _dequantize_fake, _DEQUANTIZE)
register("dequantize_gguf_backward", _dequantize, _dequantize_fake, _DEQUANTIZE)
register("dequantize_gguf_out", _dequantize_out, _dequantize_out_fake, _DEQUANTIZE_OUT)
