"""The KV cache: keys and values of earlier tokens, so that a new token costs one token's work.

Layout: for each layer one key and one value buffer (B, kv_heads, capacity, head_dim), of which the
first `length` positions are filled. Capacity doubles, so that n tokens cost O(n) copying.

Simplified: under a sliding window old keys are masked, not dropped. The cache is for inference
only: buffers are written in place, which autograd cannot follow.
"""

import torch
from torch import Tensor


class KVCache:
    """An empty cache; a forward pass with `cache=` appends its tokens.

    Attributes:
        length: number of tokens.
        document_ids: documents of the keys, (B, length), or None.
        keys: a buffer for each layer.
        values: a buffer for each layer.
        frequencies: ω of RoPE for each kind of layer, on the device.
    """

    def __init__(self) -> None:
        self.length = 0
        self.document_ids: Tensor | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.frequencies: dict[str, Tensor] = {}

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values; return all of them.

        Args:
            layer: number of the layer.
            key: new keys, (B, kv_heads, T, d).
            value: new values, (B, kv_heads, T, d).

        Returns:
            All keys and all values, (B, kv_heads, length + T, d) each.

        Raises:
            ValueError: gradients are required, or the number of rows differs.
        """
        if torch.is_grad_enabled() and key.requires_grad:
            raise ValueError(
                "a KVCache cannot be trained through: call the model under torch.no_grad()."
            )
        return self._append(self.keys, layer, key), self._append(self.values, layer, value)

    def _append(self, buffers: list[Tensor], layer: int, new: Tensor) -> Tensor:
        """Append to one buffer, which grows if it is full; return its filled part."""
        rows, heads, count, channels = new.shape
        end = self.length + count
        if layer == len(buffers):
            buffers.append(new.new_empty(rows, heads, 0, channels))
        if buffers[layer].shape[0] != rows:
            raise ValueError(
                f"the cache holds {buffers[layer].shape[0]} rows, the new tokens {rows}."
            )
        if buffers[layer].shape[2] < end:
            capacity = max(end, 2 * self.length)
            grown = new.new_empty(rows, heads, capacity, channels)
            grown[:, :, : self.length] = buffers[layer][:, :, : self.length]
            buffers[layer] = grown
        buffers[layer][:, :, self.length : end] = new
        return buffers[layer][:, :, :end]

    def extend_documents(self, document_ids: Tensor | None, rows: int, count: int) -> Tensor | None:
        """Return the documents of all keys, (rows, length + count).

        Args:
            document_ids: documents of the new tokens, (rows, count); None continues each row's last
                document.
            rows: number of rows.
            count: number of new tokens.

        Returns:
            The documents; None if all tokens are one document, which has the id 0.
        """
        earlier = self.document_ids
        if earlier is None:
            if document_ids is None or self.length == 0:
                return document_ids
            earlier = document_ids.new_zeros(rows, self.length)
        if document_ids is None:
            document_ids = earlier[:, -1:].expand(rows, count)
        return torch.cat((earlier, document_ids), dim=1)  # (B, length + count)

    def advance(self, count: int, document_ids: Tensor | None) -> None:
        """Count new tokens, once a forward pass, after all layers have appended them.

        Args:
            count: number of new tokens.
            document_ids: documents of all keys.
        """
        self.length += count
        self.document_ids = document_ids

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`.

        Args:
            length: number of tokens to keep.

        Raises:
            ValueError: the cache has fewer tokens.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}.")
        self.length = length
        if self.document_ids is not None:
            self.document_ids = self.document_ids[:, :length]

    def select(self, rows: Tensor) -> "KVCache":
        """Return a new cache of some rows; a row may occur several times.

        Args:
            rows: row numbers, a tensor of int64.
        """
        chosen = KVCache()
        chosen.length = self.length
        chosen.frequencies = self.frequencies
        chosen.keys = [key[rows, :, : self.length] for key in self.keys]
        chosen.values = [value[rows, :, : self.length] for value in self.values]
        if self.document_ids is not None:
            chosen.document_ids = self.document_ids[rows]
        return chosen
