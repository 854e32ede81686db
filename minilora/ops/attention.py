r"""Causal grouped-query attention: the plain form, and the fused form that runs (Attention Is All You Need, eq. 1).

    O = softmax(Q Kᵀ / √d + M) V,    M = 0 where a query may look, -∞ elsewhere

G = heads / kv_heads consecutive query heads share one key and value head (GQA, arXiv 2305.13245). Queries are the last
T of the S positions that have keys (S > T with a cache). A query looks at keys that are not after it, of its own
document, and fewer than `window` positions back.

Shapes: q (B, heads, T, d), k and v (B, kv_heads, S, d), mask bool (B or 1, 1, T, S), output (B, heads, T, d).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The definition. It keeps all (B, heads, T, S) weights; `mask=None` is plain causal, `scale=None` is 1/√d."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, heads, S, d)
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, heads, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))  # 16 bit: in fp32
    return weights.to(q.dtype) @ v  # (B, heads, T, d)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The same through PyTorch's fused kernels, which never store the weights; `mask=None` is plain causal."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and 1 < queries < keys:  # SDPA's is_causal would align the queries with the first keys
        mask = causal_mask(queries, keys, device=q.device)
    is_causal = mask is None and queries > 1  # one query sees every key
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def causal_mask(
    queries: int,
    keys: int,
    *,
    window: int | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Who may look at whom: bool (B or 1, 1, queries, keys). `document_ids` (B, keys), of the keys."""
    key = torch.arange(keys, device=device)  # (S,)
    query = key[keys - queries :, None]  # (T, 1)
    mask = key <= query  # (T, S)
    if window is not None:
        mask = mask & (key > query - window)
    if document_ids is None:
        return mask[None, None]
    same = document_ids[:, None, keys - queries :, None] == document_ids[:, None, None, :]  # (B, 1, T, S)
    return mask & same
