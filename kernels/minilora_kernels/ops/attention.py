r"""Causal grouped-query attention: the plain form, and the fused form that runs (Attention Is All You Need, eq. 1).

    O = softmax(Q Kᵀ / √d + M) V,    M = 0 where a query may look, -∞ elsewhere

G = heads / kv_heads consecutive query heads share one key and value head (GQA, arXiv 2305.13245). Queries are the last
T of the S positions that have keys (S > T with a cache). A query looks at keys that are not after it, of its own
document, and fewer than `window` positions back. Documents packed into one row are attended to one by one: a row of n
equal ones costs an n-th of its T x T scores, and no mask (`Documents`). PyTorch's backward on a CPU is slow; ours goes
over blocks of queries, each against the keys up to its end.

Shapes: q (B, heads, T, d), k and v (B, kv_heads, S, d), mask bool (B or 1, 1, T, S), output (B, heads, T, d).
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora_kernels import allocator
from minilora_kernels.c import bindings
from minilora_kernels.ops.mode import fast, plain_now

BLOCK = 128  # queries at a time in backward; the weights of one block lie in the cache


@dataclass(frozen=True)
class Documents:
    """Packed rows in place of a mask: the B·T tokens as runs of (tokens, whether a document: padding is none)."""

    runs: list[tuple[int, bool]]
    masks: dict[int, Tensor]  # of the documents longer than the window, by their length


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The definition. It keeps all (B, heads, T, S) weights; `mask=None` is plain causal, `scale=None` is 1/√d."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, heads, S, d)
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, heads, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))  # 16 bit: in fp32
    return weights.to(q.dtype) @ v  # (B, heads, T, d)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None = None, scale: float | None = None
) -> Tensor:
    """The same through PyTorch's fused kernels, which never store the weights; `mask=None` is plain causal."""
    if isinstance(mask, Documents):
        return _by_document(q, k, v, mask, scale)
    if plain_now():
        return plain_attention(q, k, v, mask, scale)
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and 1 < queries < keys:  # SDPA's is_causal would align the queries with the first keys
        mask = causal_mask(queries, keys, device=q.device)
    if mask is None and queries == keys and q.is_cpu and fast() and torch.is_grad_enabled():
        if torch.is_autocast_enabled("cpu"):  # which reaches into no function of ours
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        return _Causal.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)  # pyright: ignore[reportReturnType] untyped
    is_causal = mask is None and queries > 1  # one query sees every key
    grouped = q.shape[1] != k.shape[1]
    if grouped and queries == 1:  # as G queries of one head: no kernel needs to know of groups, or reads a key G times
        y = F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, q.shape[3]), k, v, mask, scale=scale)
        return y.reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


class _Causal(torch.autograd.Function):
    """T queries on the same T keys. Keeps q, k and v, and computes the weights P again, BLOCK queries at a time:

    dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P · (dP - rowsum(P · dP)),   dQ = s · dS K,   dK = s · dSᵀ Q
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        q, k, v = ctx.saved_tensors
        T, G, sums = q.shape[2], q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        # one matrix per row and key head: its G query heads side by side, (N, T·G, d) with N = B · kv_heads
        k_NTd, v_NTd = (x.flatten(0, 1) for x in (k, v))  # (N, T, d)
        q_NRd, g_NRd = (_by_key_head(x, G) for x in (q * ctx.scale, grads[0]))
        dq_NRd, (dk, dv) = allocator.empty_like(q_NRd), (torch.zeros_like(x, dtype=sums) for x in (k_NTd, v_NTd))
        for start in range(0, T, BLOCK):
            stop = min(start + BLOCK, T)
            rows, keys, values = slice(start * G, stop * G), k_NTd[:, :stop], v_NTd[:, :stop]
            queries, g = q_NRd[:, rows], g_NRd[:, rows]
            S, dP = (allocator.empty((*queries.shape[:2], stop), q.dtype, q.device) for _ in range(2))  # (N, R, stop)
            torch.bmm(queries, keys.transpose(1, 2), out=S)
            torch.bmm(g, values.transpose(1, 2), out=dP)
            P, dS = _weights(S, dP, start, G)
            dv[:, :stop] += P.transpose(1, 2) @ g
            dq_NRd[:, rows] = dS @ keys
            dk[:, :stop] += dS.transpose(1, 2) @ queries
        dq = dq_NRd.view(*k.shape[:3], G, -1).transpose(2, 3).reshape(q.shape).mul_(ctx.scale)
        return dq, dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape), None


def _weights(S: Tensor, dP: Tensor, start: int, G: int) -> tuple[Tensor, Tensor]:
    """P and dS, both (N, R, stop), of the queries from `start` on; S and dP are written over."""
    if bindings.attention_weights(S, dP, start, G):
        return S, dP
    size = S.shape[2] - start
    S[:, :, start:].masked_fill_(_later(size, G, S.device), float("-inf"))
    P = S.softmax(-1)
    return P, torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)  # P · (dP - rowsum(P · dP))


def _by_key_head(x: Tensor, G: int) -> Tensor:
    """(B, kv_heads · G, T, d) -> (B · kv_heads, T · G, d)."""
    B, heads, T, d = x.shape
    return x.unflatten(1, (heads // G, G)).transpose(2, 3).reshape(B * heads // G, T * G, d)


def _later(size: int, G: int, device: torch.device) -> Tensor:
    """Keys after a query: bool (size · G, size)."""
    return ~causal_mask(size, size, device=device)[0, 0].repeat_interleave(G, 0)


def _by_document(q: Tensor, k: Tensor, v: Tensor, packed: Documents, scale: float | None) -> Tensor:
    """One call a document, T queries on T keys; padding costs nothing and gets zeros."""
    rows, sizes = q.shape[0], [size for size, _ in packed.runs]
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # (1, heads, B·T, d)
    pieces = zip(packed.runs, *(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)  # split: its backward is a cat
    found = [
        attention(qi, ki, vi, packed.masks.get(size), scale) if real else torch.zeros_like(qi)
        for (size, real), qi, ki, vi in pieces
    ]
    return torch.cat(found, dim=2)[0].unflatten(1, (rows, -1)).transpose(0, 1)  # (B, heads, T, d)


def document_runs(document_ids: Tensor) -> list[tuple[int, bool]] | None:
    """The runs of `Documents` in ids (B, T), -1 at padding; None if an id comes back after another one."""
    runs = []
    for row in document_ids.tolist():
        found = [(id, len(list(same))) for id, same in groupby(row)]
        documents = [id for id, _ in found if id >= 0]
        if len(set(documents)) < len(documents):
            return None
        runs += [(size, id >= 0) for id, size in found]
    return runs


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
