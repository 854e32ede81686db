"""Which optimiser moves the trained parameters."""

import torch
from torch import nn

from minilora.train.config import TrainConfig


def new_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over `parameters`, in their order. The loop sets its learning rate before every step."""
    return torch.optim.AdamW(
        parameters.values(),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in parameters.values()),  # hundreds of small tensors
    )
