"""Q6_K: 16 groups of 16 codes of 6 bits; each group has a scale of 8 bits.

    Q6_K   l     h    s    d     210 bytes, 6.5625 bits a value
           128   64   16   2

    x = (d s_g) (q - 32)        g = 0 … 15

d is fp16, s_g are signed bytes. The codes are stored in two halves of 128 values. In a half, with
j = 0 … 31 and t = 0 … 3, value 32 t + j has its

    lower 4 bits   in l[32 (t mod 2) + j]: the low half of the byte for t = 0 and 1, else the high
    upper 2 bits   in h[j], bits 2t and 2t + 1

Source: llama.cpp, ggml/src/ggml-common.h, block_q6_K.
"""

import torch
from torch import Tensor

from minilora_kernels.gguf.block_format import BlockFormat, nibbles, read_fp16


def decode_q6_k(blocks: Tensor) -> Tensor:
    """Return the values of Q6_K blocks.

    Args:
        blocks: Blocks, uint8 of shape (K, 210).

    Returns:
        Values, fp32 of shape (K, 256).
    """
    low = nibbles(blocks[:, :128].unflatten(1, (2, 64)))  # (K, 2, 2, 64)
    low = low.reshape(-1, 2, 4, 32)  # (K, half, t, j)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]  # (4, 1)
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3  # (K, half, t, j)
    q = (low | high << 4).float() - 32  # (K, 2, 4, 32)
    s = blocks[:, 192:208].view(torch.int8).float()  # (K, 16)
    scale = read_fp16(blocks, 208) * s  # (K, 16)
    return (scale[:, :, None] * q.reshape(-1, 16, 16)).flatten(1)  # (K, 256)


Q6_K = BlockFormat("Q6_K", 256, 210, (208,), decode_q6_k)
