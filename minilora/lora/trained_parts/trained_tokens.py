"""Rows of single tokens that train: PEFT's `trainable_token_indices`.

    E'[id] = rows[i] if id is the i-th trained token, else E[id]            an embedding
    h'[id] = rows[i] · x if id is the i-th trained token, else h[id]        the output layer

E is frozen. The rows start as those of E and replace them: they are values, not corrections, so the
rows of new tokens do not depend on how the base was resized. A file stores the rows only:

    base_model.model.<layer>.token_adapter.trainable_tokens_delta           fp32 (tokens, D)

An output layer that shares the embedding's weight shares the rows too.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import ends_with, get_submodule, named_modules, set_submodule, unknown_name
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import AdapterBase, LoRALayer
from minilora.lora.trained_parts.vocabulary import vocabulary_layers

KEY = "token_adapter.trainable_tokens_delta"


class TokenRows(AdapterBase):
    """The trained rows, fp32 (tokens, D), which never become 16-bit.

    Args:
        rows: The initial values, (tokens, D).
    """

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.detach().to(torch.float32, copy=True))

    def extra_repr(self) -> str:
        """Return the number of trained tokens for `repr(module)`."""
        return f"tokens={len(self.rows)}"


class TrainedTokens(nn.Module):
    """A frozen embedding or output layer in which the rows of some tokens train.

    Args:
        base: The nn.Embedding or nn.Linear.
        indices: Ids of the tokens.
        token_rows: The rows of another layer with the same weight; None starts with those of base.

    Attributes:
        base_layer: The frozen layer.
        token_rows: The trained rows.
        indices: Ids of the tokens, in the order of the rows.
    """

    indices: Tensor

    def __init__(
        self, base: nn.Module, indices: Sequence[int], token_rows: TokenRows | None = None
    ):
        super().__init__()
        weight = base.get_parameter("weight")  # (V, D)
        self.base_layer = base
        ids = torch.tensor(list(indices), dtype=torch.long, device=weight.device)  # (tokens,)
        self.register_buffer("indices", ids, persistent=False)
        self.token_rows = token_rows or TokenRows(weight[ids])
        self.training = base.training

    @property
    def weight(self) -> Tensor:
        """The weight with the trained rows, (V, D), through which gradients reach the rows."""
        weight = self.base_layer.get_parameter("weight")
        return weight.index_copy(0, self.indices, self.token_rows.rows.to(weight.dtype))

    @property
    def bias(self) -> Any:
        """The bias of the base, or None."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings of token ids, or the logits of hidden states.

        Args:
            x: Token ids (…) for an embedding; hidden states (…, D) for an output layer.

        Returns:
            Embeddings (…, D), or logits (…, V).
        """
        base = self.base_layer
        y = base(x)
        if not isinstance(base, nn.Embedding):
            bias = None if self.bias is None else self.bias[self.indices]  # (tokens,)
            logits = F.linear(x, self.token_rows.rows.to(x.dtype), bias)  # (…, tokens)
            return y.index_copy(-1, self.indices, logits.to(y.dtype))  # (…, V)
        ids, order = self.indices.sort()  # (tokens,)
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)  # (…)
        is_trained = ids[place] == x  # (…)
        rows = F.embedding(order[place], self.token_rows.rows)  # (…, D)
        if base.padding_idx is not None:  # it gets no gradient, as in the base
            rows = torch.where((x == base.padding_idx)[..., None], rows.detach(), rows)
        rows = rows * getattr(base, "embed_scale", 1.0)  # Gemma and BART scale E[ids]
        return torch.where(is_trained[..., None], rows.to(y.dtype), y)  # (…, D)

    def requires_grad_(self, requires_grad: bool = True) -> "TrainedTokens":
        """Make the rows trainable or not; the base stays frozen.

        Args:
            requires_grad: True makes the rows trainable.

        Returns:
            The module itself.
        """
        self.base_layer.requires_grad_(False)
        self.token_rows.requires_grad_(requires_grad)
        return self

    def merged(self, plain: nn.Module, memo: dict[int, nn.Parameter]) -> nn.Module:
        """Give a copy of the base the weight with the trained rows.

        Args:
            plain: The copy, which is changed.
            memo: Merged weights by the id of the trained rows, so that shared weights stay shared.

        Returns:
            The copy.
        """
        if id(self.token_rows) not in memo:
            weight = self.weight.detach()  # (V, D)
            memo[id(self.token_rows)] = nn.Parameter(weight, requires_grad=False)
        plain.register_parameter("weight", memo[id(self.token_rows)])
        return plain


@contextmanager
def merged_tokens(model: nn.Module) -> Iterator[None]:
    """Replace layers with trained tokens by plain ones with the same weight in a `with` block.

    Args:
        model: The model.
    """
    layers: dict[str, TrainedTokens] = {}
    for path, module in named_modules(model):
        if isinstance(module, TrainedTokens):
            layers[path] = module
    memo: dict[int, nn.Parameter] = {}
    try:
        for path, layer in layers.items():
            weight = layer.base_layer.get_parameter("weight")
            plain = copy.deepcopy(layer.base_layer, {id(weight): weight})  # without its weight
            set_submodule(model, path, layer.merged(plain, memo))
        yield
    finally:
        for path, layer in layers.items():
            set_submodule(model, path, layer)


def trained_tokens(
    model: nn.Module,
    wanted: Sequence[int] | Mapping[str, Sequence[int]] | None,
    originals: Mapping[str, Any],
    tied: Mapping[str, list[str]],
) -> dict[str, TrainedTokens]:
    """Return new layers whose rows of some tokens train, by path. The model is not changed.

    Args:
        model: The model.
        wanted: Ids of the tokens in the embedding, or {end of a layer's name: ids}; None is none.
        originals: Modules by path that take the place of the model's own.
        tied: Paths of the layers that share their weight, with the paths of the others.

    Raises:
        ValueError: A layer does not exist or has another adapter, or an id is not one of its rows.
    """
    layers: dict[str, TrainedTokens] = {}
    for entry, indices in _by_layer(model, wanted).items():
        paths = [path for path, _ in named_modules(model) if path and ends_with(path, entry)]
        if not paths:
            names = [path for path, _ in named_modules(model) if path]
            raise unknown_name("trainable_token_indices", entry, names)
        for path in paths:
            base = originals.get(path, get_submodule(model, path))
            _check_layer(path, base, indices)
            layers[path] = TrainedTokens(base, indices)
    return layers | _sharing_layers(model, layers, originals, tied)


def _by_layer(
    model: nn.Module, wanted: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, Sequence[int]]:
    """Return the ids of trained tokens by name of a layer."""
    if not wanted:
        return {}
    if isinstance(wanted, Mapping):
        return dict(wanted)
    for path, layer in vocabulary_layers(model).items():
        if isinstance(layer, nn.Embedding):
            return {path: wanted}
    return {"embed_tokens": wanted}  # as in PEFT


def _sharing_layers(
    model: nn.Module,
    layers: dict[str, TrainedTokens],
    originals: Mapping[str, Any],
    tied: Mapping[str, list[str]],
) -> dict[str, TrainedTokens]:
    """Return layers that share the trained rows, for layers that share a weight."""
    added: dict[str, TrainedTokens] = {}
    for path, layer in layers.items():
        for other in tied.get(path, []):
            if other in layers:
                continue
            base = originals.get(other, get_submodule(model, other))
            indices = layer.indices.tolist()
            _check_layer(other, base, indices)
            added[other] = TrainedTokens(base, indices, layer.token_rows)
    return added


def _check_layer(path: str, base: nn.Module, indices: Sequence[int]) -> None:
    """Raise ValueError unless a layer has rows of tokens, and all of these ids."""
    option = "trainable_token_indices"
    if isinstance(base, LoRALayer):
        raise ValueError(f"{option}: {path!r} has an adapter: leave it out of one of the two.")
    if not isinstance(unwrapped(base), (nn.Embedding, nn.Linear)):
        raise ValueError(
            f"{option}: {path!r} is {type(base).__name__}, expected an Embedding or a Linear layer "
            "that is not quantised."
        )
    rows = len(base.get_parameter("weight"))
    wrong = [index for index in indices if not 0 <= index < rows]
    if wrong:
        raise ValueError(
            f"{option}: {path!r} has the tokens 0 to {rows - 1}, got {wrong[0]}. Resize the "
            "vocabulary before the adapter is added, or correct the ids."
        )
