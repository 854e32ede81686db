"""NF4 and fused operations: specifications, CPU and GPU kernels, and the quantised weight.

This package never imports minilora. kernels/README.md gives the order in which to read it.

nf4/            the NF4 format: levels, specification, weight, custom operators
gguf/           the quantised types of GGUF files: blocks of bytes -> values
ops/            operations of a model: reference, fast form, backward pass
triton/         kernels for GPUs
c/              kernels for CPUs
quantized_weight.py  a weight in few bits: what NF4 and the types of GGUF share
backend.py      the implementation that runs on a device
allocator.py    buffers that are reused
custom_op.py    registration of custom operators
"""

from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.functional import (
    FEW,
    FEW_ON_A_GPU,
    dequantize_nf4,
    multiplier,
    prepare,
    quantize_nf4,
)
from minilora_kernels.nf4.weight import NF4Weight

__all__ = [
    "FEW",
    "FEW_ON_A_GPU",
    "NF4Weight",
    "dequantize_nf4",
    "dynamic_map",
    "multiplier",
    "nf4_codebook",
    "nf4_thresholds",
    "prepare",
    "quantize_nf4",
]
