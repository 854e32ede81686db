"""NF4 and fused operations: specifications, CPU and GPU kernels, and the quantised weight.

This package never imports minilora. kernels/README.md gives the order in which to read it.
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
