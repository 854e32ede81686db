"""A running batch: contexts that rows join and leave.

Rows are right-aligned, as in models/padded_batch.py, and read one token a step, so each row's
tokens are the last `lengths[b]` columns without a gap. Rows of several caches become one cache by
aligning their right ends:

    . . A B C      and     F G H      ->     . . A B C        columns without a token are dropped,
    . D E F G              . K L             . D E F G        so the cache is as wide as its longest
                                             . . F G H        row
                                             . . . K L
"""

import copy
from collections.abc import Sequence

import torch

from minilora.models.kv_cache import KVCache
from minilora.models.padded_batch import PAD, Context


def joined(parts: Sequence[tuple[Context, Sequence[int]]]) -> Context | None:
    """Return one context of the chosen rows of several contexts.

    Args:
        parts: contexts, with the numbers of their rows; the contexts must not be used afterwards.

    Returns:
        The rows in their order as one context, or None without rows.
    """
    chosen = [(context, torch.tensor(rows)) for context, rows in parts if rows]
    if not chosen:
        return None
    first, _ = chosen[0]
    batch = copy.copy(first)
    batch.lengths = torch.cat([context.lengths[rows] for context, rows in chosen])  # (B,)
    width = int(batch.lengths.max())
    column = torch.arange(width) - (width - batch.lengths[:, None])  # (B, K): 0 at the first token
    batch.real = column >= 0  # (B, K)
    batch.positions = column.clamp_min(0)  # (B, K)
    batch.cache = KVCache()
    batch.cache.length = width
    batch.cache.frequencies = first.cache.frequencies
    if not batch.real.all():
        batch.cache.document_ids = torch.where(batch.real, 0, PAD).to(batch.device)
    for layer in range(len(first.cache.keys)):
        keys = [(context.cache.keys[layer], context.cache.length, rows) for context, rows in chosen]
        values = [
            (context.cache.values[layer], context.cache.length, rows) for context, rows in chosen
        ]
        batch.cache.keys.append(_right_aligned(keys, width))
        batch.cache.values.append(_right_aligned(values, width))
    return batch


def _right_aligned(
    buffers: Sequence[tuple[torch.Tensor, int, torch.Tensor]], width: int
) -> torch.Tensor:
    """Return chosen rows of buffers (b, kv_heads, capacity, d), each of its own length, as one.

    The result is (B, kv_heads, width, d), with zeros on the left.
    """
    first = buffers[0][0]
    count = sum(len(rows) for _, _, rows in buffers)
    joined_rows = first.new_zeros(count, first.shape[1], width, first.shape[3])
    start = 0
    for buffer, length, rows in buffers:
        taken = min(width, length)
        end = start + len(rows)
        joined_rows[start:end, :, width - taken :] = buffer[rows, :, length - taken : length]
        start = end
    return joined_rows
