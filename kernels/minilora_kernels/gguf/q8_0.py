"""Q8_0: 32 codes of 8 bits with one scale.

    Q8_0   d   q0  q1  …  q31     34 bytes, 8.5 bits a value
           2   32 bytes, signed

    x = d q

d is fp16.

Source: llama.cpp, ggml/src/ggml-common.h, block_q8_0.
"""

import torch
from torch import Tensor

from minilora_kernels.gguf.block_format import BlockFormat, read_fp16


def decode_q8_0(blocks: Tensor) -> Tensor:
    """Return the values of Q8_0 blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 34).

    Returns:
        Values, fp32 of shape (K, 32).
    """
    d = read_fp16(blocks, 0)  # (K, 1)
    q = blocks[:, 2:].view(torch.int8).float()  # (K, 32)
    return q * d


Q8_0 = BlockFormat("Q8_0", 32, 34, (0,), decode_q8_0)
