"""Public functions of NF4, and the custom ops behind them, which torch.compile sees.

backend.py chooses the implementation that an op runs: the reference, torch tables, C, or Triton.

The ops are opaque to the compiler and take tensors, not an NF4Weight. (The compiler would trace
into a `triton_op`, which could not pass on enable_fp_fusion=False either.) Dequantising has two
names: if the forward and the backward pass of a layer called one op with equal arguments,
AOTAutograd would merge the two calls and keep the dense weight from forward to backward. That is
the memory that QLoRA saves. The ops have no derivative, because the weight is frozen.
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.backend import ENVIRONMENT, path_for
from minilora_kernels.c import nf4
from minilora_kernels.custom_op import register
from minilora_kernels.nf4 import reference, torch_cpu
from minilora_kernels.nf4.operands import Parts, check_parts, contiguous, for_a_kernel
from minilora_kernels.nf4.weight import NF4Weight, check_format

FEW = 8  # rows of x up to which a product from the codes is faster than one with a dense W
FEW_ON_A_GPU = 64  # the same for nf4_matmul.py; by the model in benchmarks/gpu_model/fusing.py


# ---- public functions


def quantize_nf4(tensor: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a tensor to NF4, in blocks over the flattened tensor.

    Args:
        tensor: Tensor of any shape, in bf16, fp16, fp32 or fp64.
        blocksize: Number of values that share one scale, a power of two from 32 to 4096.
        double_quant: Also store the scales in 8 bits.

    Returns:
        The weight, on the device of `tensor`.

    Raises:
        ValueError: If the dtype or `blocksize` is not supported, or if a value is NaN or infinite;
            the error names the first index.

    Source: QLoRA (arXiv:2305.14314) §3; reference.py has the exact rule.
    """
    check_format(tensor.dtype, blocksize)
    packed, absmax = torch.ops.minilora.quantize_nf4(tensor.detach(), blocksize)
    if double_quant:
        scales, nested_absmax, offset = torch.ops.minilora.double_quantize_nf4(absmax)
    else:
        scales, nested_absmax, offset = absmax, None, None
    return NF4Weight.from_parts(
        packed, scales, nested_absmax, offset, tensor.shape, blocksize, tensor.dtype
    )


def dequantize_nf4(
    weight: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Return a weight as a dense tensor, computed in fp32 and rounded once.

    Args:
        weight: Weight to dequantise.
        dtype: Dtype of the result. None stands for the dtype that was quantised, or that of `out`.
        out: Tensor that receives the result, contiguous, with the shape and device of the weight.
            None stands for a new tensor.

    Returns:
        The dense tensor with the shape of the weight; `out` if it is given.

    Raises:
        ValueError: If `out` or `dtype` does not fit.
    """
    if out is None:
        if dtype is None:
            dtype = weight.dtype
        return torch.ops.minilora.dequantize_nf4(*weight.parts(), dtype)
    if out.shape != weight.shape or out.device != weight.device or not out.is_contiguous():
        raise ValueError(
            f"dequantize_nf4: expected out to be contiguous {tuple(weight.shape)} on "
            f"{weight.device}, got {tuple(out.shape)} on {out.device}, strides {out.stride()}; "
            "make it with torch.empty(weight.shape)"
        )
    if dtype not in (None, out.dtype):
        raise ValueError(
            f"dequantize_nf4: expected dtype to be that of out, {out.dtype}, got {dtype}; omit one"
        )
    packed, scales, nested_absmax, offset, _, blocksize = weight.parts()
    torch.ops.minilora.dequantize_nf4_out(packed, scales, nested_absmax, offset, blocksize, out)
    return out


def multiplier(weight: NF4Weight) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Return a function that multiplies few rows by a weight without a dense W.

    The look-ups that every call would repeat are done once. The function holds addresses of the
    memory of the weight: it is valid until that memory moves.

    Args:
        weight: Weight of shape (out, in).

    Returns:
        A function of x (…, in) and bias (out,) or None, which returns W x + bias (…, out). Its
        arguments must be contiguous and of one dtype of `nf4.DTYPES`. None if no compiled
        code fits the weight, or if the environment forbids it.
    """
    if path_for(weight.device) != "cpu":
        return None
    return _c_multiplier(*weight.parts())


def prepare(device: torch.device) -> None:
    """Create the tables that the kernels on a device read.

    A CUDA graph that is captured cannot create them, so they must exist before.

    Args:
        device: Device on which the kernels will run.
    """
    if device.type == "cuda" and path_for(device) == "triton":
        from minilora_kernels.triton.nf4_dequantize import tables

        tables(device)


# ---- quantise


def _quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return packed codes and absmax."""
    check_format(x.dtype, blocksize)
    path = path_for(x.device)
    if path == "reference":
        return reference.quantize(x, blocksize)
    if path == "cpu":
        return torch_cpu.quantize(x, blocksize)
    from minilora_kernels.triton import nf4_quantize

    packed, absmax = nf4_quantize.quantize(x, blocksize)
    if not torch.isfinite(absmax).all():
        reference.raise_not_finite(x)
    return packed, absmax


def _quantize_fake(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return the shapes of `_quantize`."""
    n = x.numel()
    K = (n + blocksize - 1) // blocksize
    packed = x.new_empty(((n + 1) // 2,), dtype=torch.uint8)
    absmax = x.new_empty((K,), dtype=torch.float32)
    return packed, absmax


def _double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 8-bit codes, second-level absmax and offset."""
    path = path_for(absmax.device)
    if path == "reference":
        return reference.double_quantize(absmax)
    if path == "cpu":
        return torch_cpu.double_quantize(absmax)
    from minilora_kernels.triton import nf4_quantize

    return nf4_quantize.double_quantize(absmax)


def _double_quantize_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shapes of `_double_quantize`."""
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    K = absmax.numel()
    J = (K + reference.NESTED_BLOCKSIZE - 1) // reference.NESTED_BLOCKSIZE
    return codes, absmax.new_empty((J,)), absmax.new_empty((1,))


# ---- dequantise


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return a new dense tensor of `shape` and `dtype`."""
    out = allocator.empty(shape, dtype, packed.device)
    _dequantize_out(packed, scales, nested_absmax, offset, blocksize, out)
    return out


def _dequantize_fake(packed, scales, nested_absmax, offset, shape, blocksize, dtype) -> Tensor:
    """Return the shape of `_dequantize`."""
    return packed.new_empty(shape, dtype=dtype)


def _dequantize_out(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """Write the dense tensor to a contiguous `out`, in its shape and dtype."""
    check_format(out.dtype, blocksize)
    if not out.is_contiguous():
        raise ValueError(
            "dequantize_nf4_out: expected a contiguous out, got one with strides "
            f"{out.stride()}; call out.contiguous() first"
        )
    check_parts((packed, scales, nested_absmax, offset), out.shape, blocksize)
    path = path_for(out.device)
    if path == "triton":
        from minilora_kernels.triton import nf4_dequantize

        packed, scales, nested_absmax, offset, _ = for_a_kernel(
            packed, scales, nested_absmax, offset, out
        )
        nf4_dequantize.dequantize(packed, scales, nested_absmax, offset, blocksize, out)
        return
    if path == "cpu" and _c_allowed():
        packed, scales, nested_absmax, offset = contiguous(packed, scales, nested_absmax, offset)
        if nf4.dequantize(packed, scales, nested_absmax, offset, blocksize, out):
            return
    implementation = torch_cpu if path == "cpu" else reference
    if nested_absmax is not None and offset is not None:
        scales = implementation.double_dequantize(scales, nested_absmax, offset)  # (K,)
    implementation.dequantize(packed, scales, blocksize, out)


def _dequantize_out_fake(packed, scales, nested_absmax, offset, blocksize, out) -> None:
    """Do nothing: `_dequantize_out` returns nothing."""


# ---- multiply


def _gemv(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    bias: Tensor | None,
) -> Tensor:
    """Return W x + bias (…, out) for x (…, in): from the codes, or else with a dense W."""
    check_format(x.dtype, blocksize)
    x_fits = x.shape[-1:] == (shape[1],)
    bias_fits = bias is None or bias.shape == (shape[0],)
    if not x_fits or not bias_fits:
        raise ValueError(
            f"gemv_nf4 with a weight of {tuple(shape)}: expected x of (…, {shape[1]}) and a bias "
            f"of ({shape[0]},) or None, got {tuple(x.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    parts = (packed, scales, nested_absmax, offset)
    path = path_for(x.device)
    y = None
    if path == "triton":
        y = _gemv_in_triton(x, parts, shape, blocksize, bias)
    elif path == "cpu":
        y = _gemv_in_c(x, parts, shape, blocksize, bias)
    if y is not None:
        return y
    W = _dequantize(*parts, shape, blocksize, x.dtype)  # (out, in)
    return F.linear(x, W, bias)


def _gemv_fake(x, packed, scales, nested_absmax, offset, shape, blocksize, bias) -> Tensor:
    """Return the shape of `_gemv`."""
    return x.new_empty((*x.shape[:-1], shape[0]))


def _gemv_in_triton(
    x: Tensor, parts: Parts, shape: Sequence[int], blocksize: int, bias: Tensor | None
) -> Tensor | None:
    """Return W x + bias by a Triton kernel, or None where no kernel fits."""
    rows = x.shape[:-1].numel()
    if not 0 < rows <= FEW_ON_A_GPU:
        return None
    from minilora_kernels.triton import nf4_gemv, nf4_matmul

    if rows == 1:
        fits = x.dtype != torch.float64 and nf4_gemv.fits(shape)
    else:
        fits = nf4_matmul.fits(x.dtype, x.device, shape, rows)
    if not fits:
        return None
    check_parts(parts, shape, blocksize)
    packed, scales, nested_absmax, offset, bias, x_dense = for_a_kernel(*parts, bias, x)
    weight = (packed, scales, nested_absmax, offset, shape, blocksize)
    if rows == 1:
        y = nf4_gemv.gemv(x_dense.view(-1), *weight, bias)  # (out,)
    else:
        y = nf4_matmul.matmul(x_dense.view(rows, -1), *weight, bias)  # (rows, out)
    return y.view(*x.shape[:-1], -1)


def _gemv_in_c(
    x: Tensor, parts: Parts, shape: Sequence[int], blocksize: int, bias: Tensor | None
) -> Tensor | None:
    """Return W x + bias by compiled C, or None where it does not fit."""
    rows = x.shape[:-1].numel()
    if not 0 < rows <= FEW or x.dtype not in nf4.DTYPES:
        return None
    if bias is not None and bias.dtype != x.dtype:
        return None
    check_parts(parts, shape, blocksize)
    multiply = _c_multiplier(*parts, shape, blocksize)
    if multiply is None:
        return None
    return multiply(*contiguous(x, bias))


def _c_multiplier(packed, scales, nested_absmax, offset, shape, blocksize):
    """Return a compiled function of x and bias, or None."""
    if not _c_allowed():
        return None
    parts = contiguous(packed, scales, nested_absmax, offset)
    return nf4.multiplier(*parts, shape=shape, blocksize=blocksize)


def _c_allowed() -> bool:
    """Return False if the environment names a path: "cpu" stands for torch without C."""
    return ENVIRONMENT not in os.environ


# ---- registration

_WEIGHT = "Tensor packed, Tensor scales, Tensor? nested_absmax, Tensor? offset"
_DEQUANTIZE = f"({_WEIGHT}, SymInt[] shape, int blocksize, ScalarType dtype) -> Tensor"
_DEQUANTIZE_OUT = f"({_WEIGHT}, int blocksize, Tensor(a!) out) -> ()"
_GEMV = f"(Tensor x, {_WEIGHT}, SymInt[] shape, int blocksize, Tensor? bias) -> Tensor"

register("quantize_nf4", _quantize, _quantize_fake, "(Tensor x, int blocksize) -> (Tensor, Tensor)")
register(
    "double_quantize_nf4",
    _double_quantize,
    _double_quantize_fake,
    "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
)
register("gemv_nf4", _gemv, _gemv_fake, _GEMV)
register("dequantize_nf4", _dequantize, _dequantize_fake, _DEQUANTIZE)
register("dequantize_nf4_backward", _dequantize, _dequantize_fake, _DEQUANTIZE)
register("dequantize_nf4_out", _dequantize_out, _dequantize_out_fake, _DEQUANTIZE_OUT)
