"""A quantised type of GGUF: the layout of its blocks, and the function that decodes them.

Each row of a matrix is a sequence of blocks. A block has 32 or 256 values, one or two scales in
fp16, and the codes of the values. Every type is decoded in fp32 with the order of operations of the
`gguf` package, so that the values are equal bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """A quantised type.

    Attributes:
        name: Name of the type in llama.cpp, such as "Q4_0".
        values: Number of values in a block.
        nbytes: Number of bytes in a block.
        scale_offsets: Positions of the fp16 scales in a block, in bytes.
        decode: Function from blocks, uint8 (K, nbytes), to their values, fp32 (K, values).
    """

    name: str
    values: int
    nbytes: int
    scale_offsets: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        """Stored bits a value, the scales included."""
        return 8 * self.nbytes / self.values


def read_fp16(blocks: Tensor, offset: int) -> Tensor:
    """Return the fp16 number at a position of each block, in fp32.

    Args:
        blocks: Blocks, uint8 of shape (K, nbytes).
        offset: Position of the number in a block, in bytes.

    Returns:
        The numbers, fp32 of shape (K, 1).
    """
    two_bytes = blocks[:, offset : offset + 2].contiguous()  # (K, 2)
    return two_bytes.view(torch.float16).float()  # (K, 1)


def nibbles(packed: Tensor) -> Tensor:
    """Return the low and the high 4 bits of each byte.

    Args:
        packed: Bytes, uint8 of shape (…, n).

    Returns:
        All low halves, then all high halves, uint8 of shape (…, 2, n).
    """
    return torch.stack([packed & 15, packed >> 4], dim=-2)
