"""One training step of each side, for peers.py, scale_8b.py and bench_train.py.

    own_step    the step of training/loop.py: the SFT objective, one division, clipping, AdamW
    peer_step   transformers' usual step: model(input_ids, labels=...).loss, equal clipping, AdamW

Both return a function without arguments. It runs the next step and returns its seconds, its loss
and the loss of the first step.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

RATE = 1e-4  # AdamW's learning rate
Batches = list[list[list[int]]]  # batches of rows of token ids, all rows of one length
Step = Callable[[], dict[str, float]]


def own_step(
    model: nn.Module, batches: Batches, autocast: AbstractContextManager | None = None
) -> Step:
    """Return a step over the batches in turn, for a model of `load_model`.

    The step trains the parameters that require gradients.
    """
    import minilora as ml
    from minilora.data.loss_mask import Example
    from minilora.training.checkpoint import trainable_parameters
    from minilora.training.optim.param_groups import new_optimizer

    objective = ml.SFT()
    parameters = trainable_parameters(model)
    optimizer = new_optimizer(model, parameters, ml.TrainConfig(learning_rate=RATE))
    examples = [[Example(ids, ids) for ids in batch] for batch in batches]

    def forward_backward(number: int) -> float:
        batch = objective.collate(examples[number % len(examples)])
        with autocast or nullcontext():
            loss, _ = objective.loss(model, batch)
        loss = loss / objective.weight(batch)
        loss.backward()
        return loss.item()

    return _step(forward_backward, list(parameters.values()), optimizer)


def peer_step(model: Any, batches: Batches, autocast: AbstractContextManager | None = None) -> Step:
    """Return such a step for a model of transformers or peft."""
    model.config.use_cache = False
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    tensors = [torch.tensor(batch) for batch in batches]

    def forward_backward(number: int) -> float:
        ids = tensors[number % len(tensors)]
        with autocast or nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    return _step(forward_backward, parameters, optimizer)


def four_bit(dtype: torch.dtype) -> Any:
    """Return bitsandbytes' settings for NF4 with double quantisation that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def trained_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the trainable parameters to `dtype` and return the model.

    PEFT creates adapters in fp32 and computes them in fp32, which is slower with a bf16 base.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def _step(
    forward_backward: Callable[[int], float],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Step:
    for group in optimizer.param_groups:
        group["lr"] = RATE
    losses: list[float] = []

    def step() -> dict[str, float]:
        begun = time.perf_counter()
        optimizer.zero_grad()
        losses.append(forward_backward(len(losses)))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {"seconds": time.perf_counter() - begun, "loss": losses[-1], "first_loss": losses[0]}

    return step
