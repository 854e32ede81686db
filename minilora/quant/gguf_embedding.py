"""GGUFEmbedding: the embedding of a model in the bytes of a GGUF file.

    y = dequantise(rows of the ids)

Only the rows that are looked up are decoded. An output layer that shares the embedding's weight is
a GGUFLinear with the same parameter `blocks`.
"""

import torch
from torch import Tensor, nn

from minilora.quant.quantized_linear import QuantizedEmbedding
from minilora_kernels.gguf import GGUFWeight


class GGUFEmbedding(QuantizedEmbedding):
    """An embedding whose frozen weight has a quantised type of GGUF.

    Args:
        weight: The weight, (V, D), with its rows in the model's order.

    Attributes:
        blocks: uint8 (V, bytes of a row), as in the file.
        num_embeddings: Number of rows V.
        embedding_dim: Size of a row D.
        dtype: Dtype of the output.
        type_name: Name of the type, such as "Q8_0".
        padding_idx: None, as in an nn.Embedding without padding.
    """

    blocks: nn.Parameter

    def __init__(self, weight: GGUFWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = weight.dtype
        self.type_name = weight.type_name
        self.blocks = nn.Parameter(weight.blocks, requires_grad=False)

    @property
    def weight(self) -> GGUFWeight:
        """The weight (V, D), a view of the stored bytes; not a Tensor."""
        shape = torch.Size((self.num_embeddings, self.embedding_dim))
        return GGUFWeight(self.blocks, shape, self.dtype, self.type_name)

    @property
    def bits(self) -> float:
        """Stored bits a value, the scales included."""
        return self.weight.bits

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids.

        Args:
            ids: Token ids, int64 of shape (…).

        Returns:
            Embeddings, (…, D).
        """
        return self.weight.rows(ids).to(self.dtype)  # (…, D)

    def _apply(self, fn, recurse=True):
        """Cast the output where the parameters of another module would be cast."""
        probe = torch.empty(0, dtype=self.dtype, device=self.blocks.device)
        self.dtype = fn(probe).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Write the two entries of a GGUFWeight."""
        for key, value in self.weight.state_dict(f"{prefix}weight").items():
            destination[key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        """Read the two entries of a GGUFWeight of the same shape and type."""
        try:
            weight = GGUFWeight.from_state_dict(state_dict, f"{prefix}weight")
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        expected = self.weight.parts()[1:]
        if weight.parts()[1:] != expected:
            error_msgs.append(f"{prefix}weight: expected {expected}, got {weight.parts()[1:]}.")
            return
        if local_metadata.get("assign_to_params_buffers", False) or self.blocks.is_meta:
            self.blocks = nn.Parameter(weight.blocks, requires_grad=False)
        else:
            self.blocks.data.copy_(weight.blocks)  # bytes that are shared stay shared

    def extra_repr(self) -> str:
        """Return sizes and type for `repr(module)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.type_name}"
