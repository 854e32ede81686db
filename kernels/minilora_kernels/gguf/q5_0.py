"""Q5_0 and Q5_1: 32 codes of 5 bits with one scale, or with a scale and a minimum.

    Q5_0   d   h          q0|q16  …  q15|q31     22 bytes, 5.5 bits a value
           2   4          16 bytes: low half | high half
    Q5_1   d   m   h      q0|q16  …  q15|q31     24 bytes, 6 bits a value
           2   2   4      16 bytes

    Q5_0   x = d (q - 16)
    Q5_1   x = d q + m

d and m are fp16. The lower 4 bits of a code are stored as in Q4_0. Bit j of the 32-bit number h is
the fifth bit of value j.

Source: llama.cpp, ggml/src/ggml-common.h, block_q5_0 and block_q5_1.
"""

import torch
from torch import Tensor

from minilora_kernels.gguf.block_format import BlockFormat, nibbles, read_fp16


def decode_q5_0(blocks: Tensor) -> Tensor:
    """Return the values of Q5_0 blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 22).

    Returns:
        Values, fp32 of shape (K, 32).
    """
    d = read_fp16(blocks, 0)  # (K, 1)
    return d * (_codes(blocks[:, 2:]) - 16)  # (K, 32)


def decode_q5_1(blocks: Tensor) -> Tensor:
    """Return the values of Q5_1 blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 24).

    Returns:
        Values, fp32 of shape (K, 32).
    """
    d = read_fp16(blocks, 0)  # (K, 1)
    m = read_fp16(blocks, 2)  # (K, 1)
    return d * _codes(blocks[:, 4:]) + m  # (K, 32)


def _codes(stored: Tensor) -> Tensor:
    """Return the codes 0 … 31 of h and the packed bytes (K, 20), fp32 (K, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=stored.device)  # (8,)
    fifth_bits = stored[:, :4, None] >> shifts & 1  # (K, 4, 8)
    low = nibbles(stored[:, 4:]).flatten(1)  # (K, 32)
    return (low | fifth_bits.flatten(1) << 4).float()  # (K, 32)


Q5_0 = BlockFormat("Q5_0", 32, 22, (0,), decode_q5_0)
Q5_1 = BlockFormat("Q5_1", 32, 24, (0, 2), decode_q5_1)
