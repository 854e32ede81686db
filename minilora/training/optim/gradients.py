"""The gradient of one call: micro-batches, and the number that they are divided by.

    L = (1/N) Σ_m Σ_{t in m} −log p(token_t)        g = ∂L/∂parameter

A call consists of micro-batches m. N is the number of supervised tokens of the whole call, over all
micro-batches and all processes (for DPO: the number of pairs, and so on for other objectives).

The objective returns the *sum* over the tokens of one micro-batch. `backward` multiplies it by two
factors:

    weight / N    The division by N. N is counted before the first forward pass, so every
                  micro-batch is divided by the same number. weight is 1; it is 0 for a micro-batch
                  that only keeps a process in step with the others (training/distributed.py).
    world size    DDP and FSDP2 average the gradients over the processes, and L is a sum over them.
                  The factor undoes the division of the average; it is 1 in a single process.

Every micro-batch is divided by the N of the call, not by its own number of tokens. The gradients of
the micro-batches therefore add up to g, and the split into micro-batches does not matter. Two
things limit this: the sums are rounded in another order, and dropout draws other numbers.

In fp16 a third factor, the loss scale, multiplies L during the backward pass and is taken off
before the update (training/precision.py).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minilora.losses.sft import SFT, Objective
from minilora.training.batch_sampler import seed_of
from minilora.training.process import Process


@dataclass
class Gradients:
    """The calls of `forward_backward` since the last update.

    Attributes:
        losses: Share of each micro-batch in the loss, one tensor (M,) a call.
        metrics: Further figures of the objective, of the last call.
        samples: The examples of each micro-batch of all calls.
    """

    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    samples: list[list[Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples, without padding."""
        return sum(len(example) for micro_batch in self.samples for example in micro_batch)


class CurrentObjective:
    """The objective of the present call: wrappers such as DDP hold one object for all calls.

    Attributes:
        objective: The objective that `loss` calls.
    """

    def __init__(self) -> None:
        self.objective: Objective = SFT()

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the present objective.

        Args:
            model: The model.
            batch: A batch of its `collate`.
        """
        return self.objective.loss(model, batch)


def backward(
    parallel: Process,
    objective: Objective,
    samples: list[list[Any]],
    autocast: AbstractContextManager,
    scaler: torch.amp.GradScaler,
    seed: tuple[Any, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add ∂L/∂parameter of one call to the gradients.

    Args:
        parallel: This process.
        objective: The objective.
        samples: The examples of each micro-batch, M in all.
        autocast: Context of the forward passes.
        scaler: The loss scaler.
        seed: Purpose of the dropout; the number of the micro-batch is added to it.

    Returns:
        The contribution of each micro-batch to L, (M,), and the means of the objective's other
        sums.
    """
    assigned = parallel.micro_batches(len(samples))  # [(number, weight)]
    batches = [objective.collate(samples[number]) for number, _ in assigned]
    count = _step_count(parallel, objective, assigned, batches)  # N
    losses = torch.zeros(len(samples), dtype=torch.float32, device=parallel.device)  # (M,)
    sums: dict[str, Tensor] = {}
    for index, (number, weight) in enumerate(assigned):
        torch.manual_seed(seed_of(*seed, number))
        is_last = index == len(assigned) - 1
        with parallel.gradient_sync(last=is_last):
            with autocast:
                loss_sum, other_sums = parallel.loss(batches[index])
            # The factor world_size undoes the average over processes (see the module docstring).
            factor = weight * parallel.world_size / count
            # L += loss_sum · weight / N
            scaler.scale(loss_sum * factor).backward()
        losses[number] += loss_sum.detach() * (weight / count)
        for name, value in other_sums.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * weight
    means = {name: parallel.sum(value) / count for name, value in sums.items()}
    return parallel.sum(losses), means


def _step_count(
    parallel: Process,
    objective: Objective,
    assigned: list[tuple[int, int]],
    batches: list[dict[str, Tensor]],
) -> float:
    """Return N of the whole call; end the run if Ctrl-C was pressed in any process."""
    count = 0
    for (_, weight), batch in zip(assigned, batches, strict=True):
        count += weight * objective.weight(batch)
    local = torch.tensor([count, parallel.interrupt_requested], dtype=torch.float64)  # (2,)
    total, interrupt_requested = parallel.sum(local).tolist()
    if interrupt_requested:
        raise KeyboardInterrupt
    return total
