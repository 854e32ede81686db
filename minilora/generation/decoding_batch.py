"""A running batch: contexts that rows join and leave.

Rows stand right-aligned, as in models/padded_batch.py, and read one token a step, so each row's tokens are the last
`lengths[b]` columns without a gap. Rows of several caches therefore become one cache by lining up their right ends:

    . . A B C      and     F G H      ->     . . A B C        columns in which no row has a token are left away,
    . D E F G              . K L             . D E F G        so the cache is as wide as its longest row
                                             . . F G H
                                             . . . K L
"""

import copy
from collections.abc import Sequence

import torch

from minilora.models.kv_cache import KVCache
from minilora.models.padded_batch import PAD, Context


def joined(parts: Sequence[tuple[Context, Sequence[int]]]) -> Context | None:
    """One context of the given rows of several, in their order; None of no rows. The given ones are used up."""
    chosen = [(context, torch.tensor(rows)) for context, rows in parts if rows]
    if not chosen:
        return None
    whole = copy.copy(chosen[0][0])
    whole.lengths = torch.cat([context.lengths[rows] for context, rows in chosen])  # (B,)
    width = int(whole.lengths.max())
    column = torch.arange(width) - (width - whole.lengths[:, None])  # (B, K) 0 at a row's first token
    whole.real, whole.positions = column >= 0, column.clamp_min(0)
    whole.cache = KVCache()
    whole.cache.length, whole.cache.frequencies = width, chosen[0][0].cache.frequencies
    if not whole.real.all():
        whole.cache.document_ids = torch.where(whole.real, 0, PAD).to(whole.device)
    for buffers in ("keys", "values"):
        for layer in range(len(chosen[0][0].cache.keys)):
            old = [(getattr(context.cache, buffers)[layer], context.cache.length, rows) for context, rows in chosen]
            getattr(whole.cache, buffers).append(_lined_up(old, width))
    return whole


def _lined_up(old: Sequence[tuple[torch.Tensor, int, torch.Tensor]], width: int) -> torch.Tensor:
    """Rows of buffers (b, kv_heads, capacity, d), filled up to a length -> (B, kv_heads, width, d), zeros in front."""
    heads, size = old[0][0].shape[1], old[0][0].shape[3]
    new = old[0][0].new_zeros(sum(len(rows) for *_, rows in old), heads, width, size)
    start = 0
    for buffer, length, rows in old:
        taken = min(width, length)
        new[start : start + len(rows), :, width - taken :] = buffer[rows, :, length - taken : length]
        start += len(rows)
    return new
