"""More tokens in the vocabulary of a decoder."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minilora.common import unwrap_model
from minilora.lora.layer import LoRALayer
from minilora.lora.trained_parts.trained_tokens import TrainedTokens
from minilora.models.decoder import CausalLM
from minilora.quant.quantized_linear import QuantizedEmbedding


@torch.no_grad()
def resize_embeddings(model: nn.Module, size: int) -> None:
    """Give the embedding and the output layer of a decoder rows for new tokens.

    Each new row is the mean of the old ones, so that the new tokens begin as probable as the others
    on average. Call it before `inject`. An adapter's file then stores both layers, as PEFT's files
    do; with `LoRAConfig(trainable_token_indices=…)` the new rows train.

    Args:
        model: A model of `load_model`, whose weights and config are changed.
        size: The new number of tokens, `len(tokenizer)` after the tokens were added.

    Raises:
        ValueError: The model is not a decoder, the vocabulary would shrink, or one of the two layers
            has an adapter.
    """
    model = unwrap_model(model)
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"resize_embeddings changes models of load_model, got {type(model).__name__}. For a "
            "transformers model call model.resize_token_embeddings(size)."
        )
    before = model.config.vocab_size
    if type(size) is not int or size < before:
        raise ValueError(
            f"size: expected a whole number, at least the model's {before} tokens, got {size!r}."
        )
    layers: list[Any] = [model.model.embed_tokens, model.lm_head]
    for layer in layers:
        if isinstance(layer, (LoRALayer, TrainedTokens)):
            raise ValueError(
                "resize_embeddings: the embedding or the output layer has an adapter of the old "
                "size. Resize the model first, then inject or load the adapter."
            )
    if size == before:
        return
    if isinstance(model.model.embed_tokens, QuantizedEmbedding):
        raise ValueError(
            "resize_embeddings: the embedding has the bytes of a GGUF file, which cannot grow. Load "
            'the model dense (no quantize) or with quantize="nf4".'
        )
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for layer in layers:
        weight = layer.weight  # (before, D)
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)  # (1, D)
        grown = torch.cat([weight, mean.expand(size - before, -1)])  # (size, D)
        layer.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.num_embeddings = size
    model.lm_head.out_features = size
    model.config = replace(model.config, vocab_size=size)
    if model.vocabulary_before_resize is None:
        model.vocabulary_before_resize = before
