"""The embedding and the output layer of a model, and copies of them after the vocabulary has grown.

    model.resize_token_embeddings(n)      transformers; ml.resize_embeddings(model, n) for a decoder

gives both layers more rows. Copies that train with an adapter (`modules_to_save`), and their
originals, may then have another number of rows than the layer that is in place.
"""

from typing import Any

import torch
from torch import nn

from minilora.common import named_modules
from minilora.lora.embedding_conv import unwrapped
from minilora.quant.quantized_linear import QuantizedEmbedding


def vocabulary_layers(model: Any) -> dict[str, nn.Module]:
    """Return the embedding and the output layer by path, without adapters; {} without them.

    Args:
        model: Any model.
    """
    paths = {id(module): path for path, module in named_modules(model) if path}
    layers: dict[str, nn.Module] = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, method, None)
        if get is None:
            continue
        try:
            layer = get()
        except NotImplementedError:  # transformers: a model without tokens
            continue
        if layer is not None and id(layer) in paths:
            base = unwrapped(layer)
            layers[paths[id(layer)]] = getattr(base, "base_layer", base)  # of trained tokens
    return layers


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of rows of the embedding; None for a model without one.

    Args:
        model: Any model.
    """
    for layer in vocabulary_layers(model).values():
        if isinstance(layer, nn.Embedding | QuantizedEmbedding):
            return layer.weight.shape[0]
    return None


@torch.no_grad()
def resize_rows(module: nn.Module, like: nn.Module, memo: dict[int, nn.Parameter]) -> None:
    """Give a module the number of rows of another one. New rows have the values of the other one.

    Args:
        module: An embedding or a linear layer, which is changed in place.
        like: The layer with the wanted number of rows.
        memo: New parameters by the id of the old ones, so that shared weights stay shared.
    """
    for leaf, old in list(module.named_parameters(recurse=False)):
        new = like._parameters.get(leaf)
        if new is None or new.shape == old.shape or new.shape[1:] != old.shape[1:]:
            continue
        if id(old) not in memo:
            rows = min(len(old), len(new))
            values = new.detach().to(old.device, old.dtype, copy=True)  # (rows of `like`, …)
            values[:rows] = old[:rows]
            memo[id(old)] = nn.Parameter(values, requires_grad=old.requires_grad)
        module.register_parameter(leaf, memo[id(old)])
    for attribute in ("num_embeddings", "out_features"):
        if hasattr(module, attribute) and hasattr(like, attribute):
            setattr(module, attribute, getattr(like, attribute))
