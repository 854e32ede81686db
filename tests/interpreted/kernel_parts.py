"""What the tests of the kernels share: both kernels of each kind, and weights by the reference."""

import torch

from minilora_kernels import nf4_dequantize, nf4_gemv, nf4_quantize, reference

QUANTIZE = [nf4_quantize.quantize, nf4_quantize.quantize_textbook]
DEQUANTIZE = [nf4_dequantize.dequantize, nf4_dequantize.dequantize_textbook]
GEMV = [nf4_gemv.gemv, nf4_gemv.gemv_textbook]


def normal(*shape, dtype=torch.float32, scale=0.02):
    return (torch.randn(shape) * scale).to(dtype)


def parts_of(x, blocksize, nested):
    """(packed, scales, nested_absmax, offset) by the reference."""
    packed, absmax = reference.quantize(x, blocksize)
    return (packed, *reference.double_quantize(absmax)) if nested else (packed, absmax, None, None)


def dense(parts, blocksize, shape, dtype=torch.float32):
    packed, scales, nested, offset = parts
    absmax = scales if nested is None else reference.double_dequantize(scales, nested, offset)
    reference.dequantize(packed, absmax, blocksize, out := torch.empty(shape, dtype=dtype))
    return out
