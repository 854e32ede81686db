"""NF4 for minilora: the specification, its fast forms, and the weight that holds the result. Never imports minilora.

kernels/README.md says in which order to read.
"""

from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook, nf4_thresholds
from minilora_kernels.nf4.functional import FEW, FEW_ON_A_GPU, dequantize_nf4, multiplier, prepare, quantize_nf4
from minilora_kernels.nf4.weight import NF4Weight

__all__ = ["FEW", "FEW_ON_A_GPU", "NF4Weight", "dequantize_nf4", "dynamic_map", "multiplier", "nf4_codebook"]
__all__ += ["nf4_thresholds", "prepare", "quantize_nf4"]
