"""The KV cache: keys and values of the tokens seen so far, so that each new token costs one token's work.

Layout: per layer one key and one value buffer (B, kv_heads, capacity, head_dim), of which the first `length` positions
are filled; capacity doubles, so that n tokens cost O(n) copying. Simplified: under a sliding window old keys are
masked, not dropped. For inference only: buffers are written in place, which autograd cannot follow.
"""

import torch
from torch import Tensor


class KVCache:
    """Starts empty; a forward pass with `cache=` appends its tokens. `document_ids` (B, length): those of the keys."""

    def __init__(self) -> None:
        self.length = 0
        self.document_ids: Tensor | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.frequencies: dict[str, Tensor] = {}  # of RoPE, by the kind of layer, on the device

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's key and value (B, kv_heads, T, d) and returns all (B, kv_heads, length + T, d)."""
        if torch.is_grad_enabled() and key.requires_grad:
            raise ValueError("a KVCache cannot be trained through: call the model under torch.no_grad().")
        end = self.length + key.shape[2]
        for buffers, new in ((self.keys, key), (self.values, value)):
            if layer == len(buffers):
                buffers.append(new.new_empty(*new.shape[:2], 0, new.shape[3]))
            if buffers[layer].shape[0] != new.shape[0]:
                raise ValueError(f"the cache holds {buffers[layer].shape[0]} rows, the new tokens {new.shape[0]}.")
            if buffers[layer].shape[2] < end:
                grown = new.new_empty(*new.shape[:2], max(end, 2 * self.length), new.shape[3])
                grown[:, :, : self.length] = buffers[layer][:, :, : self.length]
                buffers[layer] = grown
            buffers[layer][:, :, self.length : end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def extend_documents(self, document_ids: Tensor | None, rows: int, count: int) -> Tensor | None:
        """Ids (rows, length + count) of all keys; None if all are one document, which then has the id 0."""
        old = self.document_ids
        if old is None:
            if document_ids is None or self.length == 0:
                return document_ids
            old = document_ids.new_zeros(rows, self.length)
        if document_ids is None:  # goes on with each row's last document
            document_ids = old[:, -1:].expand(rows, count)
        return torch.cat((old, document_ids), dim=1)  # (B, length + count)

    def advance(self, count: int, document_ids: Tensor | None) -> None:
        """Called once per forward pass, when all layers have appended `count` tokens."""
        self.length += count
        self.document_ids = document_ids

    def truncate(self, length: int) -> None:
        """Forgets all tokens after the first `length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}.")
        self.length = length
        if self.document_ids is not None:
            self.document_ids = self.document_ids[:, :length]

    def select(self, rows: Tensor) -> "KVCache":
        """A new cache of the given rows (long tensor); repeats are allowed, so one prompt serves many continuations."""
        chosen = KVCache()
        chosen.length, chosen.frequencies = self.length, self.frequencies
        chosen.keys = [key[rows, :, : self.length] for key in self.keys]
        chosen.values = [value[rows, :, : self.length] for value in self.values]
        chosen.document_ids = None if self.document_ids is None else self.document_ids[rows]
        return chosen
