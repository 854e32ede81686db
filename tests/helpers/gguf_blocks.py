"""Random blocks of the quantised types of GGUF, with chosen scales."""

import numpy as np
import torch
from torch import Tensor

from minilora_kernels.gguf import FORMATS, GGUFWeight

# fp16 numbers at the edges: zeros, subnormal numbers, the largest and ordinary ones of both signs
EDGES = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, -5e-6, 1.0, -1.0, 0.01, -0.37, 65504.0, -65504.0]


def random_blocks(type_name: str, count: int, seed: int, scales: list[float] = EDGES) -> Tensor:
    """Return blocks with random codes, and scales drawn from a list, uint8 (count, nbytes)."""
    block_format = FORMATS[type_name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, block_format.nbytes), np.uint8)
    for offset in block_format.scale_offsets:
        drawn = rng.choice(np.array(scales, np.float16), (count, 1))
        blocks[:, offset : offset + 2] = drawn.view(np.uint8)
    return torch.from_numpy(blocks)


def random_weight(
    type_name: str, rows: int = 12, blocks_in_a_row: int = 1, heads: int = 0, seed: int = 0
) -> GGUFWeight:
    """Return a matrix of about the size of a layer's weights, fp32."""
    block_format = FORMATS[type_name]
    scales = [0.001, -0.002, 0.003]
    blocks = random_blocks(type_name, rows * blocks_in_a_row, seed, scales)
    shape = torch.Size((rows, blocks_in_a_row * block_format.values))
    return GGUFWeight(blocks.view(rows, -1), shape, torch.float32, type_name, heads)
