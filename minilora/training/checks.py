"""Errors that are raised before training starts or in a step, before anything has changed.

A run that would be meaningless is refused with a remedy: a model that does not read text from left
to right, a token without an embedding, packed documents that attend to each other, a parameter
without a gradient, a loss that is not finite.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import named_modules, named_parameters
from minilora.common.wrappers import is_compiled, replicating_wrapper
from minilora.data.report import numbers
from minilora.lora.layer import LoRALayer
from minilora.models.padded_batch import inference
from minilora.training.config import TrainConfig


def check_causal(model: Any) -> None:
    """Refuse a model that does not read token ids from left to right.

    Args:
        model: Any model; encoder-decoders such as T5 and image encoders are refused.

    Raises:
        ValueError: If the model is not a causal language model.
    """
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    main_input = getattr(model, "main_input_name", "input_ids")
    if is_encoder_decoder or main_input != "input_ids":
        raise ValueError(
            f"train trains causal language models, and {type(model).__name__} is not one. An "
            "adapter can still be injected into it and saved: train it with your own loop over "
            "the parameters that require grad."
        )


def check_wrappers(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Return the model that the steps run: compiled if it was, without the caller's DDP around it.

    Args:
        model: The model that was passed to `train`.
        config: The run.

    Raises:
        ValueError: If another wrapper spreads the model over devices, or if a compiled model is to
            be sharded.
    """
    kind = type(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # `Process.wrap` adds DDP around the loss
    wrapper = replicating_wrapper(model)
    if wrapper is not None:
        raise ValueError(
            f"train: got {kind.__name__} with a {wrapper}. `train` divides the work of a step itself: "
            "give it the model without this wrapper, and start it with torchrun; "
            "TrainConfig(fsdp=True) shards the model."
        )
    if config.fsdp and any(is_compiled(module) for module in model.modules()):
        raise ValueError(
            "fsdp: a compiled model cannot be sharded here, since shards replace its layers. Give "
            "the model without torch.compile, or leave fsdp False."
        )
    return model


def check_vocabulary(model: Any, tokenizer: Any, sets: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse data with a token that has no row in the model's embedding.

    Args:
        model: The model; its input embedding has shape (V, D).
        tokenizer: The tokenizer of the data. If it has at most V tokens, nothing is read.
        sets: For each name of a dataset, its objective and its examples.

    Raises:
        ValueError: If an example contains a token id of V or more.
    """
    vocabulary = _embedding_rows(model)
    if vocabulary is None or len(tokenizer) <= vocabulary:
        return
    for name, (objective, examples) in sets.items():
        for example in examples:
            largest = int(objective.collate([example])["input_ids"].max())
            if largest >= vocabulary:
                row = getattr(example, "row", "?")
                raise ValueError(
                    f"{name}, row {row}: {tokenizer.decode([largest])!r} has id {largest}, but the "
                    f"model's embedding has {vocabulary} rows. Use the model's own tokenizer, or "
                    "rows without the tokens that were added to it."
                )


def _embedding_rows(model: Any) -> int | None:
    """Return V of the input embedding (V, D), or None if the model does not name one."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding: Any = None if get_embedding is None else get_embedding()
    if embedding is None:
        return None
    return getattr(embedding, "base_layer", embedding).weight.shape[0]


def unfreeze(model: nn.Module) -> None:
    """Make every parameter trainable, for `method="full"`.

    The weights are in fp32, and autocast rounds them for each product (bf16=True). 16-bit weights
    next to fp32 masters would take the same 16 bytes a parameter (weight 4 + gradient 4 + AdamW 8,
    or 2 + 4 + 2 + 8). But 16-bit gradients round at every micro-batch, so the result would depend
    on how a batch is split.

    Args:
        model: A model without adapters whose parameters are all in fp32.

    Raises:
        ValueError: If the model has adapters or a parameter in another dtype. Nothing is changed.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError(
            'method="full" trains the model\'s own weights, and it has adapters: ml.merge or '
            "ml.eject first."
        )
    for name, parameter in named_parameters(model):
        if parameter.dtype != torch.float32:
            raise ValueError(
                f'method="full" trains every parameter in fp32, and {name} is {parameter.dtype}: '
                'load the model with dtype="float32" and without quantize; bf16=True then computes '
                "in 16 bits."
            )
    model.requires_grad_(True)


def check_packing(model: Any) -> None:
    """Refuse packing for a model whose packed documents attend to each other.

    minilora's decoder receives document_ids and is always accepted. A transformers model is probed
    through position_ids: behind a longer document, a short document must have the logits that it
    has alone. The difference may be rounding only, compared with the difference where the short
    document does attend to the longer one.

    Args:
        model: The model to be trained.

    Raises:
        ValueError: If a packed document changes the logits of another.
    """
    if hasattr(model, "hidden"):
        return
    alone, attending, packed = _probe_packing(model)
    difference = (packed - alone).abs().max()
    reference = (attending - alone).abs().max()
    dtype = next(model.parameters()).dtype
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    if not difference < reference * tolerance:
        raise ValueError(
            f"packing: {type(model).__name__} lets packed documents see each other (logits move by "
            f"{difference:.2g}; without any separation they move by {reference:.2g}). Leave "
            "packing False, or use a model of minilora.load_model."
        )


def _probe_packing(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (8, V) of a document: alone, attending to the one before it, and packed."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 25, device=device)[None]  # (1, 24): documents of 16 and 8 tokens

    def last_logits(tokens: Tensor, positions: list[int]) -> Tensor:
        position_ids = torch.tensor([positions], device=device)  # (1, T)
        logits = model(tokens, position_ids=position_ids, use_cache=False).logits  # (1, T, V)
        return logits[0, -8:].float()  # (8, V)

    try:
        with inference(model):
            alone = last_logits(ids[:, 16:], [*range(8)])
            attending = last_logits(ids, [*range(24)])
            packed = last_logits(ids, [*range(16), *range(8)])
    except TypeError:  # the model takes no position_ids; equal tensors are refused by the caller
        zero = torch.zeros(1)
        return zero, zero, zero
    return alone, attending, packed


def check_finite(
    step: int, losses: Tensor, norm: Tensor, scale: float, samples: list[list[Any]]
) -> None:
    """Refuse a step whose loss or gradient is not finite, before the step changes anything.

    Above loss scale 1 a gradient that is not finite is an overflow of fp16's loss scaler, which
    skips the step and lowers its scale.

    Args:
        step: Number of the step, for the message.
        losses: Share of each micro-batch in the loss, fp32 (M,).
        norm: Norm of the gradient.
        scale: Loss scale of the step.
        samples: The examples of each micro-batch.

    Raises:
        ValueError: If a loss is not finite, or the norm is not at a loss scale of at most 1.
    """
    for loss, micro_batch in zip(losses, samples, strict=True):
        if not torch.isfinite(loss):
            rows = numbers(_row_numbers(micro_batch))
            raise ValueError(
                f"step {step}: the loss of {rows} is {loss.item()}. Look at these rows, lower "
                "learning_rate, or train in bf16 or fp32. At step 1 the weights or an adapter "
                "already contain NaN."
            )
    if not torch.isfinite(norm) and scale <= 1:
        raise ValueError(
            f"step {step}: the gradient is {norm.item()} and the loss is finite. Train in fp32 to "
            "find the cause."
        )


def _row_numbers(examples: list[Any]) -> list[int]:
    """Return the dataset rows of some examples, packed or not, in order."""
    packed = []
    for example in examples:
        packed += [row for row, _ in getattr(example, "documents", ())]
    if packed:
        return sorted(packed)
    return sorted(getattr(example, "row", index) for index, example in enumerate(examples))


def check_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a run in which a trained part receives no gradient, after the first backward pass.

    B starts at zero, so the first gradient of A is zero and that of B is not. An adapter is without
    a gradient if the gradients of all its parameters are zero.

    Args:
        model: The model after a backward pass.
        parameters: The trainable parameters, by name.

    Raises:
        ValueError: If a parameter has no gradient, or all gradients of an adapter are zero.
    """
    dead = [name for name, parameter in parameters.items() if parameter.grad is None]
    dead += _adapters_with_zero_gradient(model)
    if not dead:
        return
    names = ", ".join(dead[:3])
    if len(dead) > 3:
        names += ", ..."
    raise ValueError(
        f"step 1: {len(dead)} of the trained parts got no gradient: {names}. The forward pass does "
        "not use them or cuts them off (detach, no_grad): target other modules."
    )


def _adapters_with_zero_gradient(model: nn.Module) -> list[str]:
    """Return the module paths of adapters whose gradients are all zero."""
    paths = []
    for path, layer in named_modules(model):
        if not isinstance(layer, LoRALayer):
            continue
        for name, adapter in layer.adapters.items():
            gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
            not_zero = [gradient for gradient in gradients if gradient.any()]
            if gradients and not not_zero:
                paths.append(f"{path}.adapters.{name}")
    return paths
