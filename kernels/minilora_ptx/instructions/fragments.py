"""Fragments: how the values of a matrix are spread over the lanes of a warp (9.7.14 of the manual).

For 16-bit values, lane l holds in one 32-bit register two neighbours of row l / 4:

    ldmatrix    8 x 8 values; lane l holds row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1
    mma A       16 x 16: four such 8 x 8 parts, in the order top left, bottom left, top right,
                bottom right
    mma B       16 x 8, transposed: two parts, the upper and the lower half of k
    mma C, D    16 x 8 in fp32: two values of row l / 4, then two of row l / 4 + 8
"""

import numpy as np

from minilora_ptx.numbers import Array, from_bf16, halves

LANE = np.arange(32)
ROW = LANE // 4  # of the first value of a fragment
COLUMN = 2 * (LANE % 4)


def values_of(pairs: Array, kind: str) -> tuple[Array, Array]:
    """Return both values of packed registers in fp64.

    Args:
        pairs: uint32 of any shape.
        kind: "f16" or "bf16".
    """
    low, high = halves(pairs)
    if kind == "bf16":
        return from_bf16(low).astype(np.float64), from_bf16(high).astype(np.float64)
    return low.view(np.float16).astype(np.float64), high.view(np.float16).astype(np.float64)


def a_fragment(registers: list[Array], kind: str) -> Array:
    """Return the matrix A (warps, 16, 16) in fp64.

    Args:
        registers: Four registers of shape (warps, 32).
        kind: "f16" or "bf16".
    """
    A = np.zeros((len(registers[0]), 16, 16))
    for i, pairs in enumerate(registers):
        row = ROW + 8 * (i % 2)
        column = COLUMN + 8 * (i // 2)
        A[:, row, column], A[:, row, column + 1] = values_of(pairs, kind)
    return A
