"""The optimiser of a run and its parameter groups.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354) gives B a larger learning rate than A:

    η_B = loraplus_lr_ratio · η_A

The inputs of B are already mixed by A, while A sees the model's own activations. The bias of B has
the rate of B. The A of an embedding looks tokens up and mixes nothing, so both factors of an
embedding have the rate η_A.

Weight decay applies to matrices. Vectors (biases, norms) have none, as in transformers.

The loop sets `lr` of each group before a step, as the rate of the schedule times `lr_ratio`.
"""

from typing import Any

import torch
from torch import nn

from minilora.lora.embedding_conv import EmbeddingAdapter
from minilora.lora.layer import LoRALayer
from minilora.lora.variants.dora_embedding_conv import DoRAEmbeddingAdapter
from minilora.training.config import TrainConfig
from minilora.training.optim.adamw_8bit import AdamW8bit


def new_optimizer(
    model: nn.Module, parameters: dict[str, nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """Return the optimiser of a run, with one group for each pair of rate and weight decay.

    Args:
        model: The model; its LoRA layers show which parameters are a B.
        parameters: The trainable parameters of `model`, by name.
        config: `optim` names the optimiser; the other fields set its hyperparameters.

    Returns:
        AdamW, or AdamW with 8-bit moments. Each group has a field `lr_ratio`.
    """
    groups = _parameter_groups(model, parameters, config)
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adamw_torch":
        # One fused launch instead of hundreds of small ones, on the devices that offer it.
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
        return torch.optim.AdamW(groups, fused=fused, **options)
    paged = config.optim.startswith("paged")
    on_gpu = any(parameter.is_cuda for parameter in parameters.values())
    if paged and not on_gpu:
        print(
            f"optim: {config.optim!r} keeps its moments in host memory. Without a GPU they are in "
            'host memory anyway; "adamw_8bit" gives the same run.'
        )
    return AdamW8bit(groups, paged=paged, **options)


def _parameter_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """Group the parameters by learning-rate ratio and weight decay."""
    fast = _loraplus_parameters(model)
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters.values():
        ratio = config.loraplus_lr_ratio if id(parameter) in fast else 1.0
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        grouped.setdefault((ratio, decay), []).append(parameter)
    groups = []
    for (ratio, decay), members in grouped.items():
        groups.append({"params": members, "lr_ratio": ratio, "weight_decay": decay})
    return groups


def _loraplus_parameters(model: nn.Module) -> set[int]:
    """Return the ids of every B and its bias, embeddings excepted."""
    ids = set()
    for layer in model.modules():
        if not isinstance(layer, LoRALayer):
            continue
        for adapter in layer.adapters.values():
            if isinstance(adapter, (EmbeddingAdapter, DoRAEmbeddingAdapter)):
                continue
            ids.add(id(getattr(adapter, "lora_B", None)))
            ids.add(id(getattr(adapter, "lora_bias", None)))
    return ids
