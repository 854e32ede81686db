"""Which code runs: the reference, the fast CPU path, later Triton; and the custom ops that torch.compile sees.

    device     path        why
    cpu        cpu         cpu.py, bit-equal to the reference
    other      reference   plain torch runs anywhere; announced once, because it is slow
    meta       none        shapes only

MINILORA_NF4=reference forces the specification everywhere, MINILORA_NF4=cpu insists on cpu.py; anything else raises.

The ops are opaque to the compiler and take plain tensors. Dequantising has two names: were the forward and the
backward of a layer to call one op with equal arguments, AOTAutograd would merge the calls and keep the dense weight
from forward to backward, which is the memory that QLoRA saves. None of them has a derivative: the weight is frozen.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, reference
from .weight import NF4Weight, check_format

ENVIRONMENT = "MINILORA_NF4"
# scales: fp32 absmax (K,), the other two None; or uint8 codes (K,), nested_absmax fp32 (J,), offset fp32 (1,)
_PARTS = "Tensor packed, Tensor scales, Tensor? nested_absmax, Tensor? offset"


def quantize_nf4(tensor: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Tensor of any floating dtype and shape -> NF4Weight, in blocks of `blocksize` over the flattened tensor.

    Raises ValueError for another dtype or blocksize, and for NaN or infinity, naming the first index.
    Source: QLoRA (arXiv 2305.14314) §3; the exact rule is reference.py's.
    """
    check_format(tensor.dtype, blocksize)
    packed, absmax = torch.ops.minilora.quantize_nf4(tensor.detach(), blocksize)
    scales, nested_absmax, offset = reference.double_quantize(absmax) if double_quant else (absmax, None, None)
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


def path_for(device: torch.device) -> str:
    """The path that runs on `device`: "cpu" or "reference". Raises ValueError if MINILORA_NF4 cannot be obeyed."""
    wanted = os.environ.get(ENVIRONMENT, "auto")
    if wanted not in ("auto", "reference", "cpu"):
        raise ValueError(f"{ENVIRONMENT}: expected auto, reference or cpu, got {wanted!r}; unset it or choose one")
    if wanted == "cpu" and device.type != "cpu":
        raise ValueError(f"{ENVIRONMENT}=cpu: expected a CPU tensor, got one on {device}; move it, or unset it")
    if wanted == "auto" and device.type != "cpu":
        _announce(device.type)
    return "cpu" if wanted != "reference" and device.type == "cpu" else "reference"


@lru_cache
def _announce(kind: str) -> None:
    warnings.warn(f"minilora: no NF4 kernel for {kind!r} yet; the plain torch reference runs, slowly", stacklevel=5)


def _path(device: torch.device) -> ModuleType:
    return cpu if path_for(device) == "cpu" else reference


def _quantize(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """n values -> packed uint8 (ceil(n/2),), absmax fp32 (K,)."""
    check_format(x.dtype, blocksize)
    return _path(x.device).quantize(x, blocksize)


def _quantize_fake(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = x.numel()
    packed = x.new_empty(((n + 1) // 2,), dtype=torch.uint8)
    return packed, x.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


def _dequantize_out(
    packed: Tensor, scales: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int, out: Tensor
) -> None:
    """Into a contiguous `out`, whose shape and dtype say what is wanted."""
    check_format(out.dtype, blocksize)
    n, path = out.numel(), _path(out.device)
    got, expected = (packed.dtype, packed.numel(), scales.numel()), (torch.uint8, (n + 1) // 2, -(-n // blocksize))
    if got != expected:
        raise ValueError(
            f"dequantize_nf4 to {tuple(out.shape)} in blocks of {blocksize}: expected (dtype, bytes, scales) "
            f"{expected}, got {got}; pass the shape and blocksize that were quantised"
        )
    if scales.dtype == torch.uint8 and nested_absmax is not None and offset is not None:
        absmax_K = path.double_dequantize(scales, nested_absmax, offset)
    elif scales.dtype == torch.float32 and nested_absmax is None and offset is None:
        absmax_K = scales
    else:
        raise ValueError(
            "dequantize_nf4: expected fp32 scales alone, or uint8 scales with nested_absmax and offset, got "
            f"{scales.dtype} scales; view the bytes of fp32 scales with .view(torch.float32)"
        )
    path.dequantize(packed, absmax_K, blocksize, out)


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
    out = cpu.empty(shape, dtype) if packed.is_cpu else packed.new_empty(shape, dtype=dtype)
    _dequantize_out(packed, scales, nested_absmax, offset, blocksize, out)
    return out


def _dequantize_fake(packed, scales, nested_absmax, offset, shape, blocksize, dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _out_fake(packed, scales, nested_absmax, offset, blocksize, out) -> None:
    return None


def _register(name: str, function: Callable, fake: Callable, schema: str, mutates_args: tuple[str, ...] = ()) -> None:
    """Schemas are written out, not inferred: which annotations inference accepts changes between torch releases."""
    op = torch.library.custom_op(f"minilora::{name}", function, mutates_args=mutates_args, schema=schema)
    op.register_fake(fake)


_TO_NEW = f"({_PARTS}, SymInt[] shape, int blocksize, ScalarType dtype) -> Tensor"
_register("quantize_nf4", _quantize, _quantize_fake, "(Tensor x, int blocksize) -> (Tensor, Tensor)")
_register("dequantize_nf4", _dequantize, _dequantize_fake, _TO_NEW)
_register("dequantize_nf4_backward", _dequantize, _dequantize_fake, _TO_NEW)
_register(
    "dequantize_nf4_out", _dequantize_out, _out_fake, f"({_PARTS}, int blocksize, Tensor(a!) out) -> ()", ("out",)
)
