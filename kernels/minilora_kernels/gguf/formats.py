"""All quantised types of GGUF files that can be kept, by name."""

from minilora_kernels.gguf.block_format import BlockFormat
from minilora_kernels.gguf.q4_0 import Q4_0, Q4_1
from minilora_kernels.gguf.q4_k import Q4_K, Q5_K
from minilora_kernels.gguf.q5_0 import Q5_0, Q5_1
from minilora_kernels.gguf.q6_k import Q6_K
from minilora_kernels.gguf.q8_0 import Q8_0

FORMATS: dict[str, BlockFormat] = {
    block_format.name: block_format
    for block_format in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)
}
