"""The custom ops that torch.compile sees; each does what it says by the path that backend.py chooses.

The ops are opaque to the compiler and take plain tensors (a triton_op would be traced into, and could not carry
enable_fp_fusion=False). Dequantising has two names: were the forward and the backward of a layer to call one op with
equal arguments, AOTAutograd would merge the calls and keep the dense weight from forward to backward, which is the
memory that QLoRA saves. None of them has a derivative: the weight is frozen.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora_kernels import allocator
from minilora_kernels.backend import ENVIRONMENT, path_for
from minilora_kernels.c import nf4
from minilora_kernels.custom_op import register
from minilora_kernels.nf4 import reference, torch_cpu
from minilora_kernels.nf4.weight import NF4Weight, check_format

FEW = 8  # rows of x up to which multiplying from the codes is faster than from a dense W
FEW_ON_A_GPU = 64  # where nf4_matmul.py takes them: faster by the model, benchmarks/gpu_model/fusing.py
# scales: fp32 absmax (K,), the other two None; or uint8 codes (K,), nested_absmax fp32 (J,), offset fp32 (1,)
_PARTS = "Tensor packed, Tensor scales, Tensor? nested_absmax, Tensor? offset"


def quantize_nf4(tensor: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Tensor of any floating dtype and shape -> NF4Weight, in blocks of `blocksize` over the flattened tensor.

    Raises ValueError for another dtype or blocksize, and for NaN or infinity, naming the first index.
    Source: QLoRA (arXiv 2305.14314) §3; the exact rule is reference.py's.
    """
    check_format(tensor.dtype, blocksize)
    packed, absmax = torch.ops.minilora.quantize_nf4(tensor.detach(), blocksize)
    parts = torch.ops.minilora.double_quantize_nf4(absmax) if double_quant else (absmax, None, None)
    scales, nested_absmax, offset = parts
    return NF4Weight.from_parts(packed, scales, nested_absmax, offset, tensor.shape, blocksize, tensor.dtype)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """NF4Weight -> tensor of its shape, in `dtype` (default: the dtype that was quantised), rounded once from fp32.

    With `out` (contiguous, of the weight's shape and device) the values are written there, in out's dtype.
    Raises ValueError if `out` or `dtype` does not fit.
    """
    if out is None:
        return torch.ops.minilora.dequantize_nf4(*weight.parts(), weight.dtype if dtype is None else dtype)
    if out.shape != weight.shape or out.device != weight.device or not out.is_contiguous():
        raise ValueError(
            f"dequantize_nf4: expected out to be contiguous {tuple(weight.shape)} on {weight.device}, got "
            f"{tuple(out.shape)} on {out.device}, strides {out.stride()}; make it with torch.empty(weight.shape)"
        )
    if dtype not in (None, out.dtype):
        raise ValueError(f"dequantize_nf4: expected dtype to be that of out, {out.dtype}, got {dtype}; leave one away")
    packed, scales, nested_absmax, offset, _, blocksize = weight.parts()
    torch.ops.minilora.dequantize_nf4_out(packed, scales, nested_absmax, offset, blocksize, out)
    return out


def multiplier(weight: NF4Weight) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """A function W x + bias of few rows x (…, in), bias (out,) or None, all contiguous and of one dtype of
    `nf4.DTYPES`; it holds addresses of `weight`'s memory. None where nothing can be compiled, or none is allowed."""
    return _multiplier(*weight.parts()) if path_for(weight.device) == "cpu" else None


def _multiplier(packed, scales, nested_absmax, offset, shape, blocksize):
    parts = _contiguous(packed, scales, nested_absmax, offset)
    return None if ENVIRONMENT in os.environ else nf4.multiplier(*parts, shape=shape, blocksize=blocksize)


def prepare(device: torch.device) -> None:
    """Makes the tables that kernels on this device read, before a CUDA graph is captured, which could not keep them."""
    if device.type == "cuda" and path_for(device) == "triton":
        from minilora_kernels.triton.nf4_dequantize import tables

        tables(device)


def _quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """To packed codes and absmax."""
    check_format(x.dtype, blocksize)
    path = path_for(x.device)
    if path != "triton":
        return (torch_cpu if path == "cpu" else reference).quantize(x, blocksize)
    from minilora_kernels.triton import nf4_quantize

    packed, absmax = nf4_quantize.quantize(x, blocksize)
    if not torch.isfinite(absmax).all():
        reference.raise_not_finite(x)
    return packed, absmax


def _quantize_fake(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = x.numel()
    packed = x.new_empty(((n + 1) // 2,), dtype=torch.uint8)
    return packed, x.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


def _double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To 8-bit codes, second-level absmax and offset."""
    path = path_for(absmax.device)
    if path != "triton":
        return (torch_cpu if path == "cpu" else reference).double_quantize(absmax)
    from minilora_kernels.triton import nf4_quantize

    return nf4_quantize.double_quantize(absmax)


def _double_quantize_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (absmax.numel() + reference.NESTED_BLOCKSIZE - 1) // reference.NESTED_BLOCKSIZE
    return torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty((blocks,)), absmax.new_empty((1,))


def _dequantize_out(
    packed: Tensor, scales: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int, out: Tensor
) -> None:
    """Into a contiguous `out`, whose shape and dtype say what is wanted."""
    check_format(out.dtype, blocksize)
    if not out.is_contiguous():
        raise ValueError(f"dequantize_nf4_out: expected a contiguous out, got strides {out.stride()}; make it one")
    _check_parts(packed, scales, nested_absmax, offset, out.shape, blocksize)
    path = path_for(out.device)
    if path == "triton":
        from minilora_kernels.triton import nf4_dequantize

        packed, scales, nested_absmax, offset, _ = _for_a_kernel(packed, scales, nested_absmax, offset, out)
        nf4_dequantize.dequantize(packed, scales, nested_absmax, offset, blocksize, out)
        return
    if path == "cpu" and ENVIRONMENT not in os.environ:
        packed, scales, nested_absmax, offset = _contiguous(packed, scales, nested_absmax, offset)
        if nf4.dequantize(packed, scales, nested_absmax, offset, blocksize, out):
            return
    plain = torch_cpu if path == "cpu" else reference
    if nested_absmax is not None and offset is not None:
        scales = plain.double_dequantize(scales, nested_absmax, offset)
    plain.dequantize(packed, scales, blocksize, out)


def _check_parts(packed, scales, nested_absmax, offset, shape: Sequence[int], blocksize: int) -> None:
    """Raises ValueError unless the parts are a weight of this shape."""
    n = torch.Size(shape).numel()
    blocks = -(-n // blocksize)
    nested = nested_absmax is not None
    sizes = [(torch.uint8, (n + 1) // 2), (torch.uint8 if nested else torch.float32, blocks)]
    sizes += [(torch.float32, -(-blocks // reference.NESTED_BLOCKSIZE)), (torch.float32, 1)] if nested else [None, None]
    names = ("packed", "scales", "nested_absmax", "offset")
    for name, part, expected in zip(names, (packed, scales, nested_absmax, offset), sizes, strict=True):
        got = None if part is None else (part.dtype, part.numel())
        if got != expected:
            raise ValueError(
                f"NF4 weight of shape {tuple(shape)} in blocks of {blocksize}: expected {name} to be (dtype, size) "
                f"{expected}, got {got}; pass fp32 scales alone, or uint8 scales with nested_absmax and offset, as "
                "NF4Weight.parts() gives them"
            )


def _contiguous(*parts: Tensor | None) -> list[Any]:
    return [None if part is None else part.contiguous() for part in parts]


def _for_a_kernel(packed: Tensor, *others: Tensor | None) -> list[Any]:
    """All contiguous. Raises ValueError unless they lie on one device and aligned: a kernel would fault, or worse."""
    parts = _contiguous(packed, *others)
    found = [part for part in parts if part is not None]
    if len({part.device for part in found}) > 1:
        raise ValueError(f"NF4: expected all tensors on one device, got {[str(t.device) for t in found]}; move them")
    for part in found:
        need = 4 if part is found[0] else part.element_size()  # packed is read as 32-bit words
        if part.data_ptr() % need:
            raise ValueError(
                f"NF4: expected memory that begins at a multiple of {need} bytes, got a {part.dtype} tensor at "
                f"{part.data_ptr():#x}; clone it"
            )
    return parts


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """To a new tensor of `shape` and `dtype`."""
    out = allocator.empty(shape, dtype, packed.device)
    _dequantize_out(packed, scales, nested_absmax, offset, blocksize, out)
    return out


def _gemv(
    x: Tensor, packed: Tensor, scales: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    shape: Sequence[int], blocksize: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """x (…, in) -> W x + bias (…, out) in x's dtype: from the codes where a kernel does, else with a dense W."""
    check_format(x.dtype, blocksize)
    if x.shape[-1:] != (shape[1],) or (bias is not None and bias.shape != (shape[0],)):
        raise ValueError(
            f"gemv_nf4 with a weight of {tuple(shape)}: expected x of (…, {shape[1]}) and a bias of ({shape[0]},) or "
            f"None, got {tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    path, rows = path_for(x.device), x.shape[:-1].numel()
    if path == "triton" and 0 < rows <= FEW_ON_A_GPU:
        from minilora_kernels.triton import nf4_gemv, nf4_matmul

        one = rows == 1 and x.dtype != torch.float64 and nf4_gemv.fits(shape)
        if one or (rows > 1 and nf4_matmul.fits(x.dtype, x.device, shape, rows)):
            _check_parts(packed, scales, nested_absmax, offset, shape, blocksize)
            parts = _for_a_kernel(packed, scales, nested_absmax, offset, bias, x)
            packed, scales, nested_absmax, offset, bias, flat = parts
            multiply, flat = (nf4_gemv.gemv, flat.view(-1)) if one else (nf4_matmul.matmul, flat.view(rows, -1))
            y = multiply(flat, packed, scales, nested_absmax, offset, shape, blocksize, bias)
            return y.view(*x.shape[:-1], -1)
    if path == "cpu" and 0 < rows <= FEW and x.dtype in nf4.DTYPES and (bias is None or bias.dtype == x.dtype):
        _check_parts(packed, scales, nested_absmax, offset, shape, blocksize)
        if multiply := _multiplier(packed, scales, nested_absmax, offset, shape, blocksize):
            return multiply(*_contiguous(x, bias))
    W = _dequantize(packed, scales, nested_absmax, offset, shape, blocksize, x.dtype)  # (out, in)
    return F.linear(x, W, bias)


def _gemv_fake(x, packed, scales, nested_absmax, offset, shape, blocksize, bias) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _dequantize_fake(packed, scales, nested_absmax, offset, shape, blocksize, dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


_TO_NEW = f"({_PARTS}, SymInt[] shape, int blocksize, ScalarType dtype) -> Tensor"
_GEMV = f"(Tensor x, {_PARTS}, SymInt[] shape, int blocksize, Tensor? bias) -> Tensor"
register("quantize_nf4", _quantize, _quantize_fake, "(Tensor x, int blocksize) -> (Tensor, Tensor)")
register("double_quantize_nf4", _double_quantize, _double_quantize_fake, "(Tensor absmax) -> (Tensor, Tensor, Tensor)")
register("gemv_nf4", _gemv, _gemv_fake, _GEMV)
register("dequantize_nf4", _dequantize, _dequantize_fake, _TO_NEW)
register("dequantize_nf4_backward", _dequantize, _dequantize_fake, _TO_NEW)
register("dequantize_nf4_out", _dequantize_out, lambda *_: None, f"({_PARTS}, int blocksize, Tensor(a!) out) -> ()")
