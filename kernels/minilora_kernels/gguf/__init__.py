"""The quantised types of GGUF files: their blocks, a weight in memory, custom operators.

block_format.py  a type: size of a block, its scales, and the function that decodes it
q4_0.py          Q4_0 and Q4_1
q5_0.py          Q5_0 and Q5_1
q8_0.py          Q8_0
q4_k.py          Q4_K and Q5_K
q6_k.py          Q6_K
formats.py       all types by name
weight.py        GGUFWeight: a matrix in the bytes of a file
functional.py    custom operators
"""

from minilora_kernels.gguf import functional  # registers the operators
from minilora_kernels.gguf.formats import FORMATS
from minilora_kernels.gguf.weight import GGUFWeight

__all__ = ["FORMATS", "GGUFWeight", "functional"]
