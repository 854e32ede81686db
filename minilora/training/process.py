"""The process of a run: there is one. In a process group training/distributed.py gives the same answers for many."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Process:
    """The only one, number `rank` of `world`."""

    rank, world, is_main, fsdp, pressed = 0, 1, True, False, False

    def __init__(self, device: torch.device):
        self.device = device

    def sum(self, values: Tensor) -> Tensor:
        """Added up over the processes."""
        return values

    def main_first(self, wanted: bool) -> AbstractContextManager[None]:
        """Where it is wanted, rank 0 is through before the others begin: they find the files that it wrote."""
        return nullcontext()

    def agree(self, **what: object) -> None:
        """ValueError that names what the processes were given differently."""

    def share(self, count: int) -> list[tuple[int, int]]:
        """(number, weight 1 or 0) of the micro-batches that this process runs, of `count`."""
        return [(number, 1) for number in range(count)]

    def mean(self, measure: Callable[[Sequence[Any]], tuple[dict[str, float], int]], items: Sequence[Any],
             in_step: bool = True) -> dict[str, float]:  # fmt: skip
        """What `measure` gives for all items, each figure a mean over the number beside it.

        in_step: whether the number of passes of the model is the same for every item.
        """
        return measure(items)[0]

    def wrap(self, model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> None:
        """From here on `loss(batch)` runs `model`, its trained `parameters` are those the optimizer steps."""
        self.loss: Any = Loss(model, objective)
        self._runs(model)

    def _runs(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch, `last` of its step."""
        return nullcontext()

    def whole(self, optimizer: torch.optim.Optimizer, for_good: bool = False) -> AbstractContextManager[None]:
        """Inside, the given model and the optimizer hold whole tensors. All processes enter together."""
        return nullcontext()

    def interruptible(self) -> AbstractContextManager[None]:
        """Inside, Ctrl-C ends all processes after the same step."""
        return nullcontext()


class Loss(nn.Module):
    """The objective as a module: what DDP and FSDP2 wrap, as our decoder is called through `hidden`, not `forward`."""

    def __init__(self, model: nn.Module, objective: Any):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Any:
        return None if batch is None else self.objective.loss(self.model, batch)


def full(tensor: Any) -> Tensor:
    """All of a sharded tensor, for which every process has to ask; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def main_speaks() -> Iterator[None]:
    """Inside, what is printed is seen from rank 0 only. Also a decorator."""
    with redirect_stdout(sys.stdout if not grouped() or dist.get_rank() == 0 else None):
        yield


def grouped() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()
