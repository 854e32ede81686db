"""Which optimiser moves the trained parameters, and how fast each of them.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B sees inputs that A has mixed, and A the model's own, so B takes a larger
step, and its bias with it: η_B = loraplus_lr_ratio · η_A. An embedding's A looks tokens up and mixes nothing: both its
factors take η_A. Vectors (biases, norms) are never pulled towards zero by weight decay, as in transformers. The loop
sets `lr` of each group before a step, as the schedule's rate times the group's `lr_ratio`.
"""

from typing import Any

import torch
from torch import nn

from minilora.lora.embedding_conv import EmbeddingAdapter
from minilora.lora.layer import LoRALayer
from minilora.training.config import TrainConfig
from minilora.training.optim.adamw_8bit import AdamW8bit


def new_optimizer(model: nn.Module, parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser over `parameters` of `model` (by name), in groups of equal rate and decay."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    adapters = [a for layer in layers for a in layer.adapters.values() if not isinstance(a, EmbeddingAdapter)]
    ups = {id(getattr(adapter, name, None)) for adapter in adapters for name in ("lora_B", "lora_bias")}
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in parameters.values():
        ratio = config.loraplus_lr_ratio if id(p) in ups else 1.0
        grouped.setdefault((ratio, config.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    groups = [{"params": some, "lr_ratio": r, "weight_decay": decay} for (r, decay), some in grouped.items()]
    given: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optim == "adamw_torch":
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())  # hundreds of small tensors
        return torch.optim.AdamW(groups, fused=fused, **given)
    paged = config.optim.startswith("paged")
    if paged and not any(p.is_cuda for p in parameters.values()):
        print(
            f'optim: {config.optim!r} keeps its moments in host memory, where they are anyway on a CPU: "adamw_8bit".'
        )
    return AdamW8bit(groups, paged=paged, **given)
