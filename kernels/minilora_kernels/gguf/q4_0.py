"""Q4_0 and Q4_1: 32 codes of 4 bits with one scale, or with a scale and a minimum.

    Q4_0   d   q0|q16  q1|q17  …  q15|q31     18 bytes, 4.5 bits a value
           2   16 bytes: low half | high half
    Q4_1   d   m   q0|q16  …  q15|q31         20 bytes, 5 bits a value
           2   2   16 bytes

    Q4_0   x = d (q - 8)
    Q4_1   x = d q + m

d and m are fp16. The low 4 bits of byte j are the code of value j, the high ones that of value
j + 16.

Source: llama.cpp, ggml/src/ggml-common.h, block_q4_0 and block_q4_1.
"""

from torch import Tensor

from minilora_kernels.gguf.block_format import BlockFormat, nibbles, read_fp16


def decode_q4_0(blocks: Tensor) -> Tensor:
    """Return the values of Q4_0 blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 18).

    Returns:
        Values, fp32 of shape (K, 32).
    """
    d = read_fp16(blocks, 0)  # (K, 1)
    q = nibbles(blocks[:, 2:]).flatten(1).float() - 8  # (K, 32)
    return d * q


def decode_q4_1(blocks: Tensor) -> Tensor:
    """Return the values of Q4_1 blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 20).

    Returns:
        Values, fp32 of shape (K, 32).
    """
    d = read_fp16(blocks, 0)  # (K, 1)
    m = read_fp16(blocks, 2)  # (K, 1)
    q = nibbles(blocks[:, 4:]).flatten(1).float()  # (K, 32)
    return d * q + m


Q4_0 = BlockFormat("Q4_0", 32, 18, (0,), decode_q4_0)
Q4_1 = BlockFormat("Q4_1", 32, 20, (0, 2), decode_q4_1)
