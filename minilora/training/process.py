"""The process of a run, where there is only one.

The loop asks a `Process` for its share of the work and for sums over all processes. This file has
the answers of a single process. In a process group of torch.distributed,
`training/distributed.py` gives the same answers for one process of several.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.common import named_parameters, unwrap_model

Measure = Callable[[Sequence[Any]], tuple[dict[str, float], int]]


class Process:
    """The only process of a run.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        is_main: True in the process that writes and prints.
        fsdp: True if the processes share one sharded model.
        interrupt_requested: True after a Ctrl-C that is to end the run with its current step.
        device: Device of the trainable parameters.
        loss: Module that computes the objective of a batch (from `wrap` on).
        model: The model that is run (from `wrap` on).
        parameters: Its trainable parameters, by name (from `wrap` on).
    """

    rank = 0
    world_size = 1
    is_main = True
    fsdp = False
    interrupt_requested = False

    def __init__(self, device: torch.device):
        """Store the device of the trainable parameters.

        Args:
            device: The device.
        """
        self.device = device

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes.

        Args:
            values: The values of this process, of any shape.
        """
        return values

    def main_first(self, wanted: bool) -> AbstractContextManager[None]:
        """Let the main process finish the block before the others start it.

        The others then find the files that it wrote.

        Args:
            wanted: False runs the block in all processes at once.
        """
        return nullcontext()

    def check_agreement(self, **values: object) -> None:
        """Raise ValueError if the processes were started with different values.

        Args:
            **values: Values by name; their `repr` is compared.
        """

    def micro_batches(self, count: int) -> list[tuple[int, int]]:
        """Return the micro-batches of a step that this process runs.

        Args:
            count: Number of micro-batches in the step.

        Returns:
            Pairs of a micro-batch's number and its weight, 1 or 0.
        """
        return [(number, 1) for number in range(count)]

    def mean(
        self, measure: Measure, items: Sequence[Any], equal_passes: bool = True
    ) -> dict[str, float]:
        """Return figures that are means over all items.

        Args:
            measure: Function of some items that returns the mean of each figure and the number that
                the means are over.
            items: The items of all processes.
            equal_passes: True if every item needs the same number of forward passes.
        """
        figures, _ = measure(items)
        return figures

    def wrap(self, model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> None:
        """Prepare `loss`, `model` and `parameters` for the steps.

        Args:
            model: The model that was passed to `train`, with its wrappers.
            objective: The objective of the run.
            optimizer: The optimiser over the model's trainable parameters.
        """
        self.loss: Any = Loss(model, objective)
        self._set_model(unwrap_model(model))

    def _set_model(self, model: nn.Module) -> None:
        """Store the model that is run, and its trainable parameters."""
        self.model = model
        self.parameters = {name: p for name, p in named_parameters(model) if p.requires_grad}

    def gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return the context in which a micro-batch runs.

        Args:
            last: True for the last micro-batch of the step.
        """
        return nullcontext()

    def full_tensors(
        self, optimizer: torch.optim.Optimizer, permanently: bool = False
    ) -> AbstractContextManager[None]:
        """Give the original model and the optimizer full tensors inside the block.

        All processes enter the block together.

        Args:
            optimizer: The optimiser of the run.
            permanently: Do not return to shards after the block.
        """
        return nullcontext()

    def interruptible(self) -> AbstractContextManager[None]:
        """Return the context in which Ctrl-C ends all processes after the same step."""
        return nullcontext()


class Loss(nn.Module):
    """The objective of a model as a module.

    DDP and FSDP2 wrap a module and its `forward`; minilora's decoder is called through `hidden`.
    """

    def __init__(self, model: nn.Module, objective: Any):
        """Store model and objective.

        Args:
            model: The model.
            objective: The objective (`minilora.losses.sft.Objective`).
        """
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any) -> Any:
        """Return the objective's loss and further sums; None for no batch.

        Args:
            batch: A batch of the objective, or None.
        """
        if batch is None:
            return None
        return self.objective.loss(self.model, batch)


def full(tensor: Any) -> Tensor:
    """Return the full tensor of a sharded one.

    Args:
        tensor: A sharded tensor, for which every process must call this function, or a plain one,
            which is returned unchanged.
    """
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


@contextmanager
def main_speaks() -> Iterator[None]:
    """Suppress prints outside the main process, inside the block or the decorated function."""
    with redirect_stdout(sys.stdout if is_main_process() else None):
        yield


def is_main_process() -> bool:
    """Return True in the process that writes and prints: the only one, or rank 0 of a group."""
    return not in_process_group() or dist.get_rank() == 0


def in_process_group() -> bool:
    """Return True if this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()
