r"""Causal grouped-query attention: reference implementation, and the fast form that runs.

    O = softmax(Q Kᵀ / √d + M) V             Attention Is All You Need (arXiv:1706.03762), eq. 1
    M = 0 where a query may see a key, -∞ elsewhere

G = heads / kv_heads consecutive query heads share one key and value head (GQA, arXiv:2305.13245).
The queries are the last T of the S positions that have keys; with a cache, S > T. A query sees a
key that is not after it, that belongs to the same document, and that is fewer than `window`
positions before it.

Packed documents are kept apart in one of two ways. A mask M can forbid each query to see the keys
of other documents. Or `Documents` names the runs of tokens, and attention is called once for each
document, with the queries and keys of that document only. The second way needs no mask, and a row
of n equal documents costs an n-th of its T x T scores.

Backward keeps Q, K and V and computes the weights again. PyTorch's own backward is slow on a CPU.
There `_Causal` works on blocks of queries, each with the keys up to the end of the block. In fp32
compiled C works on smaller blocks of one head, which stay in the cache (c/attention_backward.c);
in bf16 the products of PyTorch are faster, where the processor multiplies bf16.

Shapes: q (B, heads, T, d), k and v (B, kv_heads, S, d), mask bool (B or 1, 1, T, S), output
(B, heads, T, d).
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

BLOCK = 128  # queries at a time in backward, so that the weights of a block stay in the cache


@dataclass(frozen=True)
class Documents:
    """Packed rows, in place of a mask.

    Attributes:
        runs: The B · T tokens, row after row, as runs of (number of tokens, True for a document or
            False for padding).
        masks: For each length of a document that is longer than the window, its mask
            (1, 1, length, length).
    """

    runs: list[tuple[int, bool]]
    masks: dict[int, Tensor]


# ---- masks and documents


def causal_mask(
    queries: int,
    keys: int,
    *,
    window: int | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the mask of keys that each query may see.

    Args:
        queries: Number of queries T, the last of the positions.
        keys: Number of keys S.
        window: Number of positions that a query sees, itself included. None stands for all.
        document_ids: Document of each key, int of shape (B, S). None stands for one document.
        device: Device of the mask.

    Returns:
        True where a query sees a key, bool of shape (B or 1, 1, T, S).
    """
    key = torch.arange(keys, device=device)  # (S,)
    query = key[keys - queries :, None]  # (T, 1)
    mask = key <= query  # (T, S)
    if window is not None:
        mask = mask & (key > query - window)
    if document_ids is None:
        return mask[None, None]
    key_document = document_ids[:, None, None, :]  # (B, 1, 1, S)
    query_document = document_ids[:, None, keys - queries :, None]  # (B, 1, T, 1)
    return mask & (query_document == key_document)


def document_runs(document_ids: Tensor) -> list[tuple[int, bool]] | None:
    """Return the runs of tokens that `Documents` takes.

    Args:
        document_ids: Document of each token, int of shape (B, T), -1 for padding.

    Returns:
        Runs of (number of tokens, True for a document). None if a document has two runs, with
        another one between them.
    """
    runs = []
    for row in document_ids.tolist():
        seen = set()
        for document, tokens in groupby(row):
            if document in seen:
                return None
            is_document = document >= 0
            if is_document:
                seen.add(document)
            size = len(list(tokens))
            runs.append((size, is_document))
    return runs


def window_masks(
    runs: list[tuple[int, bool]], window: int | None, device: torch.device
) -> dict[int, Tensor]:
    """Return the masks that `Documents` takes: one for each length that exceeds the window.

    Args:
        runs: The runs of `document_runs`.
        window: Number of keys that a query sees; None means all, and no mask.
        device: Device of the masks.
    """
    if window is None:
        return {}
    lengths = {size for size, real in runs if real and size > window}
    return {size: causal_mask(size, size, window=window, device=device) for size in lengths}


# ---- reference implementation


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return attention by its definition: the reference implementation.

    Autograd keeps all weights (B, heads, T, S) for backward.

    Args:
        q: Queries of shape (B, heads, T, d).
        k: Keys of shape (B, kv_heads, S, d).
        v: Values with the shape of k.
        mask: True where a query sees a key, bool of shape (B or 1, 1, T, S). None stands for the
            causal mask.
        scale: Factor on the scores. None stands for 1/√d.

    Returns:
        Output of shape (B, heads, T, d).
    """
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)  # (B, heads, S, d)
    v = v.repeat_interleave(groups, dim=1)  # (B, heads, S, d)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], device=q.device)
    scores = q @ k.transpose(-1, -2) * _scale(q, scale)  # (B, heads, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    # 16-bit scores are normalised in fp32
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return weights.to(q.dtype) @ v  # (B, heads, T, d)


# ---- fast form


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return attention by PyTorch's fused kernels, which never store the weights.

    Args:
        q: Queries of shape (B, heads, T, d).
        k: Keys of shape (B, kv_heads, S, d).
        v: Values with the shape of k.
        mask: True where a query sees a key, bool of shape (B or 1, 1, T, S); or the documents of
            packed rows. None stands for the causal mask.
        scale: Factor on the scores. None stands for 1/√d.

    Returns:
        Output of shape (B, heads, T, d).
    """
    if isinstance(mask, Documents):
        return _by_document(q, k, v, mask, scale)
    if plain_now():
        return plain_attention(q, k, v, mask, scale)
    queries = q.shape[2]
    keys = k.shape[2]
    if mask is None and 1 < queries < keys:
        # is_causal of PyTorch would align the queries with the first keys
        mask = causal_mask(queries, keys, device=q.device)
    if mask is None and queries == keys and _takes_own_backward(q):
        return _causal(q, k, v, scale)
    grouped = q.shape[1] != k.shape[1]
    if grouped and queries == 1:
        return _one_query(q, k, v, mask, scale)
    is_causal = mask is None and queries > 1  # one query sees every key
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _by_document(q: Tensor, k: Tensor, v: Tensor, packed: Documents, scale: float | None) -> Tensor:
    """Return attention, one call for each document; padding costs nothing and gets zeros.

    A call receives the queries and keys of one document, so that no query meets another document.
    """
    B = q.shape[0]
    sizes = [size for size, _ in packed.runs]
    # a tensor (1, heads, tokens, d) for each run; the backward of a split is one cat
    q_runs = _one_row(q).split(sizes, dim=2)
    k_runs = _one_row(k).split(sizes, dim=2)
    v_runs = _one_row(v).split(sizes, dim=2)
    outputs = []
    for i, (size, is_document) in enumerate(packed.runs):
        if is_document:
            mask = packed.masks.get(size)
            output = attention(q_runs[i], k_runs[i], v_runs[i], mask, scale)
        else:
            output = torch.zeros_like(q_runs[i])
        outputs.append(output)
    output = torch.cat(outputs, dim=2)[0]  # (heads, B·T, d)
    return output.unflatten(1, (B, -1)).transpose(0, 1)  # (B, heads, T, d)


def _one_row(x: Tensor) -> Tensor:
    """Return (B, heads, T, d) as (1, heads, B · T, d): row after row."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return attention for one query of each head, with grouped heads.

    The G query heads of a key head become G queries of one head. So the kernel need not support
    groups, and reads each key once instead of G times.
    """
    B, kv_heads = k.shape[:2]
    grouped_q = q.reshape(B, kv_heads, -1, q.shape[3])  # (B, kv_heads, G, d)
    y = F.scaled_dot_product_attention(grouped_q, k, v, mask, scale=scale)  # (B, kv_heads, G, d)
    return y.reshape(q.shape)


def _scale(q: Tensor, scale: float | None) -> float:
    """Return the factor on the scores, 1/√d by default."""
    if scale is None:
        return q.shape[-1] ** -0.5
    return scale


# ---- own backward, on a CPU


def _takes_own_backward(q: Tensor) -> bool:
    """Return True if `_Causal` should run: on a CPU, when a gradient may be needed."""
    return q.is_cpu and fast() and torch.is_grad_enabled()


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Return causal attention of T queries on the same T keys, with its own backward."""
    if torch.is_autocast_enabled("cpu"):  # autocast has no effect inside an autograd.Function
        dtype = torch.get_autocast_dtype("cpu")
        q = q.to(dtype)
        k = k.to(dtype)
        v = v.to(dtype)
    return _Causal.apply(q, k, v, _scale(q, scale))  # pyright: ignore[reportReturnType] untyped


class _Causal(torch.autograd.Function):
    """Causal attention of T queries on the same T keys.

    Keeps q, k and v. Backward computes the weights P again, BLOCK queries at a time:

        dV = Pᵀ dO,      dP = dO Vᵀ,      dS = P · (dP - rowsum(P · dP))
        dQ = s · dS K,   dK = s · dSᵀ Q
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] decorated
        q, k, v = ctx.saved_tensors
        gradients = bindings.attention_backward(q, k, v, grads[0], ctx.scale)
        if gradients is None:
            gradients = _causal_backward(q, k, v, grads[0], ctx.scale)
        return *gradients, None


def _causal_backward(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv.

    There is one matrix for each row and key head: N = B · kv_heads of them. The queries of its G
    query heads are next to each other: R = T · G rows.
    """
    T = q.shape[2]
    G = q.shape[1] // k.shape[1]
    k_NTd = k.flatten(0, 1)  # (N, T, d)
    v_NTd = v.flatten(0, 1)  # (N, T, d)
    q_NRd = _by_key_head(q * scale, G)  # (N, R, d)
    dy_NRd = _by_key_head(dy, G)  # (N, R, d)
    dq_NRd = allocator.empty_like(q_NRd)  # (N, R, d)
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    dk_NTd = torch.zeros_like(k_NTd, dtype=sum_dtype)  # (N, T, d)
    dv_NTd = torch.zeros_like(v_NTd, dtype=sum_dtype)  # (N, T, d)
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        rows = slice(start * G, stop * G)
        queries = q_NRd[:, rows]  # (N, R', d)
        keys = k_NTd[:, :stop]  # (N, stop, d)
        dy_block = dy_NRd[:, rows]  # (N, R', d)
        shape = (*queries.shape[:2], stop)
        S = allocator.empty(shape, q.dtype, q.device)  # (N, R', stop)
        dP = allocator.empty(shape, q.dtype, q.device)  # (N, R', stop)
        torch.bmm(queries, keys.transpose(1, 2), out=S)
        torch.bmm(dy_block, v_NTd[:, :stop].transpose(1, 2), out=dP)
        P, dS = _weights(S, dP, start, G)
        dv_NTd[:, :stop] += P.transpose(1, 2) @ dy_block
        dq_NRd[:, rows] = dS @ keys
        dk_NTd[:, :stop] += dS.transpose(1, 2) @ queries
    dq = dq_NRd.view(*k.shape[:3], G, -1).transpose(2, 3)  # (B, kv_heads, G, T, d)
    dq = dq.reshape(q.shape).mul_(scale)
    dk = dk_NTd.to(k.dtype).view(k.shape)
    dv = dv_NTd.to(v.dtype).view(v.shape)
    return dq, dk, dv


def _weights(S: Tensor, dP: Tensor, start: int, G: int) -> tuple[Tensor, Tensor]:
    """Return P and dS of the queries from `start` on, (N, R', stop); S and dP are overwritten."""
    if bindings.attention_weights(S, dP, start, G):
        return S, dP
    size = S.shape[2] - start
    later = ~causal_mask(size, size, device=S.device)[0, 0]  # (size, size)
    later = later.repeat_interleave(G, 0)  # (R', size)
    S[:, :, start:].masked_fill_(later, float("-inf"))
    P = S.softmax(-1)
    # dS = P · (dP - rowsum(P · dP))
    dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
    return P, dS


def _by_key_head(x: Tensor, G: int) -> Tensor:
    """Return (B, kv_heads · G, T, d) as (B · kv_heads, T · G, d)."""
    B, heads, T, d = x.shape
    grouped = x.unflatten(1, (heads // G, G)).transpose(2, 3)  # (B, kv_heads, T, G, d)
    return grouped.reshape(B * heads // G, T * G, d)
