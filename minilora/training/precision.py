"""Autocast and loss scaling: the precision in which a run computes.

By default a run computes in the dtype of the model. `bf16=True` or `fp16=True` computes an fp32
model in 16 bits: autocast rounds the inputs of each product. In fp16 the loss is multiplied by a
scale before backward, so that small gradients do not round to zero, and the gradients are divided
by it before the step.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from minilora.training.config import TrainConfig


def precision_of(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> tuple[AbstractContextManager, torch.amp.GradScaler]:
    """Return the autocast context and the loss scaler of a run.

    Args:
        model: The model; the dtypes of its frozen parameters count.
        config: `bf16` and `fp16`: True, False, or None to follow the model's dtype.
        device: Device of the run.

    Returns:
        A context for the forward pass, and a scaler that is enabled in fp16 only.

    Raises:
        ValueError: If `bf16` or `fp16` contradicts the dtype of the weights.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    dtypes = {p.dtype for p in frozen if p.is_floating_point()}
    requests = {"bf16": (torch.bfloat16, config.bf16), "fp16": (torch.float16, config.fp16)}
    autocast_dtype = None
    for name, (dtype, requested) in requests.items():
        _check_request(name, dtype, requested, dtypes)
        if requested and dtypes != {dtype}:
            autocast_dtype = dtype
    scaler_enabled = bool(config.fp16) or torch.float16 in dtypes
    scaler = torch.amp.GradScaler(device.type, enabled=scaler_enabled)
    if autocast_dtype is None:
        return nullcontext(), scaler
    return torch.autocast(device.type, autocast_dtype), scaler


def _check_request(
    name: str, dtype: torch.dtype, requested: bool | None, dtypes: set[torch.dtype]
) -> None:
    """Refuse a value of `bf16` or `fp16` that contradicts the dtypes of the weights."""
    if requested is False and dtype in dtypes:
        raise ValueError(
            f'{name}=False, but the weights of the model are {dtype}: load it with dtype="float32".'
        )
    others = dtypes - {dtype, torch.float32}
    if requested and others:
        raise ValueError(
            f"{name}=True, but the weights of the model are {others.pop()}: leave {name} None."
        )
