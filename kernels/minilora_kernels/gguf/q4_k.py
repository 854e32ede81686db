"""Q4_K and Q5_K: 8 groups of 32 codes; each group has a scale and a minimum of 6 bits.

    Q4_K   d   dmin   scales        q         144 bytes, 4.5 bits a value
           2   2      12            128
    Q5_K   d   dmin   scales   h    q         176 bytes, 5.5 bits a value
           2   2      12       32   128

    x = (d s_g) q - (dmin m_g)        g = 0 … 7

d and dmin are fp16, s_g and m_g numbers of 6 bits. Byte 32 p + j of q has the lower 4 bits of value
j of group 2p in its low half, and of group 2p + 1 in its high half. In Q5_K, bit g of byte j of h
is the fifth bit of value j of group g. The 12 bytes of scales hold, from the highest bit to the
lowest:

    bytes 0 …  3   s4 … s7, bits 5-4 | s0 … s3
    bytes 4 …  7   m4 … m7, bits 5-4 | m0 … m3
    bytes 8 … 11   m4 … m7, bits 3-0 | s4 … s7, bits 3-0

Source: llama.cpp, ggml/src/ggml-common.h, block_q4_K and block_q5_K.
"""

import torch
from torch import Tensor

from minilora_kernels.gguf.block_format import BlockFormat, nibbles, read_fp16


def decode_q4_k(blocks: Tensor) -> Tensor:
    """Return the values of Q4_K blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 144).

    Returns:
        Values, fp32 of shape (K, 256).
    """
    return _scaled(blocks, _low_bits(blocks[:, 16:]).float())


def decode_q5_k(blocks: Tensor) -> Tensor:
    """Return the values of Q5_K blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 176).

    Returns:
        Values, fp32 of shape (K, 256).
    """
    groups = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]  # (8, 1)
    fifth_bits = blocks[:, None, 16:48] >> groups & 1  # (K, 8, 32)
    q = _low_bits(blocks[:, 48:]) | fifth_bits << 4  # (K, 8, 32)
    return _scaled(blocks, q.float())


def _low_bits(packed: Tensor) -> Tensor:
    """Return the lower 4 bits of the codes, (K, 128) -> (K, 8, 32)."""
    return nibbles(packed.unflatten(1, (4, 32))).flatten(1, 2)


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """Return the values (K, 256) of codes q, fp32 (K, 8, 32)."""
    d = read_fp16(blocks, 0)  # (K, 1)
    dmin = read_fp16(blocks, 2)  # (K, 1)
    first, second, third = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)  # (K, 4) each
    scales_4_to_7 = third & 15 | first >> 2 & 48  # (K, 4)
    minima_4_to_7 = third >> 4 | second >> 2 & 48  # (K, 4)
    s = torch.cat([first & 63, scales_4_to_7], dim=1)  # (K, 8)
    m = torch.cat([second & 63, minima_4_to_7], dim=1)  # (K, 8)
    scale = d * s.float()  # (K, 8)
    minimum = dmin * m.float()  # (K, 8)
    return (scale[:, :, None] * q - minimum[:, :, None]).flatten(1)  # (K, 256)


Q4_K = BlockFormat("Q4_K", 256, 144, (0, 2), decode_q4_k)
Q5_K = BlockFormat("Q5_K", 256, 176, (0, 2), decode_q5_k)
