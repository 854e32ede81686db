"""One run in several processes, on torch's own engine: copies of the model (DDP), or one that is sharded (FSDP2).

    g = sum over all micro-batches m of the step of  d(loss sum of m / count of the step)/dparameter

A step is cut into micro-batches as in one process, and rank r takes numbers r, r + world, r + 2 world, ... so the step
is the same for any number of ranks. All ranks make as many passes, for each ends in a collective: a rank that is left
without a micro-batch repeats the first with weight 0. The engines average over ranks, so losses are scaled by world.

DDP    every rank holds the model; gradients are summed over ranks after the last micro-batch.
FSDP2  every rank holds 1/world of each tensor. A layer's tensors, 4-bit codes and scales as the bytes they are, come
       together while it runs and are dropped again. The model that was given waits where it fits, in host memory, and
       gets the trained values back for each checkpoint and at the end: files and what comes after know no shards.

The loop knows training/process.py, the answers of one process; these are the answers of one among several.
"""

import copy
import hashlib
import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.lora.registry import lora_configs
from minilora.training.optim.adamw_8bit import AdamW8bit
from minilora.training.process import Loss, Process, full, grouped


class Parallel(Process):
    """One of the processes of a process group, as `Process` has it."""

    def __init__(self, device: torch.device, fsdp: bool = False):
        self.rank, self.world, self.fsdp = dist.get_rank(), dist.get_world_size(), fsdp
        self.is_main = self.rank == 0
        on_gpu = self.fsdp and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else device
        self.shards: list[tuple[nn.Parameter, Any]] = []  # (trained parameter of the given model, its shards)

    def sum(self, values: Tensor) -> Tensor:
        summed = values.to(self.device)
        dist.all_reduce(summed)
        return summed.to(values.device)

    @contextmanager
    def main_first(self, wanted: bool) -> Iterator[None]:
        if wanted and not self.is_main:
            dist.barrier()
        yield
        if wanted and self.is_main:
            dist.barrier()

    def agree(self, **what: object) -> None:
        codes = [int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6]) for value in what.values()]
        table = torch.tensor([codes if rank == self.rank else [0] * len(codes) for rank in range(self.world)])
        same = (self.sum(table) == table[self.rank]).all(0).tolist()
        if different := [name for name, equal in zip(what, same, strict=True) if not equal]:
            raise ValueError(
                f"the {self.world} processes were given different {', '.join(different)}. Give all of them the same "
                "model, dataset and config: each trains on its own share of every step."
            )

    def share(self, count: int) -> list[tuple[int, int]]:
        """Equally many on every rank."""
        numbers = range(self.rank, -(-count // self.world) * self.world, self.world)
        return [(number, 1) if number < count else (0, 0) for number in numbers]

    def mean(self, measure: Callable[[Sequence[Any]], tuple[dict[str, float], int]], items: Sequence[Any],
             in_step: bool = True) -> dict[str, float]:  # fmt: skip
        """Items are shared out.

        Every rank takes as many, of all lengths; what is left over, all of them measure and one counts. The same with
        all items where the number of passes depends on the item (not in_step) and each pass needs all ranks (FSDP2).
        """
        self.ready()
        even = len(items) - len(items) % self.world if in_step or not self.fsdp else 0
        order = sorted(range(len(items)), key=lambda i: len(items[i]))
        found, count = {}, 0
        for part, weight in ((order[self.rank : even : self.world], 1), (order[even:], int(self.is_main))):
            figures, n = measure([items[i] for i in part]) if part else ({}, 0)
            found = {name: found.get(name, 0.0) + value * n * weight for name, value in figures.items()} or found
            count += n * weight
        total, *sums = self.sum(torch.tensor([count, *found.values()], dtype=torch.float64)).tolist()
        return {name: value / total for name, value in zip(found, sums, strict=True)}

    def wrap(self, model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> None:
        self.loss: Any = self._sharded(model, objective, optimizer) if self.fsdp else Loss(model, objective)
        self._runs(self.loss.model)
        self.ready()
        if not self.fsdp:
            engine: Any = nn.parallel.DistributedDataParallel
            new = "forward_sync_buffers" in inspect.signature(engine).parameters  # its name from torch 2.13 on
            self.loss = engine(self.loss, **{"forward_sync_buffers" if new else "broadcast_buffers": False})
        kind = "FSDP2, the model in shards" if self.fsdp else "DDP, the model in each"
        sent = f"{traffic(model, self.world, self.fsdp):,} bytes {'a micro-batch' if self.fsdp else 'a step'}"
        print(f"parallel: {self.world} processes, {kind}; each of them sends {sent}")

    def ready(self) -> None:
        """Gather what FSDP2 keeps outside the layers, so that `model` runs without `loss`; tells layers their root."""
        if self.fsdp:
            self.loss(None)

    def gradients(self, last: bool) -> AbstractContextManager:
        """DDP sums over ranks in the last one; FSDP2 in each, keeping no whole gradient."""
        return nullcontext() if last or self.fsdp else self.loss.no_sync()

    def _sharded(self, model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> Loss:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        if isinstance(optimizer, AdamW8bit):
            raise ValueError('fsdp: blocks of 8-bit moments do not fit into shards. Set optim="adamw_torch".')
        mesh, memo = init_device_mesh(self.device.type, (self.world,)), {id(objective): objective}
        for p in model.parameters():  # parameters of the copy's own, on the same bytes until they are sharded
            memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
        loss = copy.deepcopy(Loss(model, objective), memo)
        lora_configs(loss.model).parts.in_shards = True
        for layer in _layers(loss):
            fully_shard(layer, mesh=mesh)
        fully_shard(loss, mesh=mesh)
        shards = dict(loss.model.named_parameters())
        self.shards = [(p, shards[name]) for name, p in model.named_parameters() if p.requires_grad]
        self.given, self.home = model, next(model.parameters()).device
        model.cpu()

        def sharded(value: Tensor, like: Any) -> Tensor:
            value = value.to(self.device)
            return distribute_tensor(value, mesh, like.placements) if value.shape == like.shape else value

        states = {p: {k: sharded(v, p) for k, v in optimizer.state[whole].items()} for whole, p in self.shards}
        _refer(optimizer, dict(self.shards), states)
        return loss

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer, for_good: bool = False) -> Iterator[None]:
        states = {p: optimizer.state[p] for _, p in self.shards}
        wholes = {}
        with torch.no_grad():
            for whole, p in self.shards:
                whole.copy_(full(p))
                wholes[whole] = {key: full(value).to(whole.device) for key, value in states[p].items()}
        _refer(optimizer, {p: whole for whole, p in self.shards}, wholes)
        yield
        if not for_good:
            _refer(optimizer, dict(self.shards), states)
        elif self.shards:
            self.given.to(self.home)
        dist.barrier()  # what one rank writes inside is there for all

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C is only noted, in `pressed`: a step ends all ranks if it was pressed on any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "pressed", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def traffic(model: nn.Module, world: int, fsdp: bool = False) -> int:
    """Bytes that each rank sends, by ring collectives: a gather or a scatter sends (world - 1)/world of a tensor.

    DDP, a step: gradients are scattered and gathered. FSDP2, a micro-batch: the stored model is gathered for forward,
    its layers again for backward, and gradients are scattered.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    stored, layers = (sum(p.nbytes for p in part.parameters()) for part in (model, nn.ModuleList(_layers(model))))
    return (stored + layers + trained if fsdp else 2 * trained) * (world - 1) // world


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model's longest part: what FSDP2 gathers one at a time."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=()))


def _refer(optimizer: torch.optim.Optimizer, places: dict[Any, Any], states: dict[Any, Any]) -> None:
    """Let the optimizer work on other parameters, with their states."""
    for group in optimizer.param_groups:
        group["params"] = [places.get(p, p) for p in group["params"]]
    for p, other in places.items():
        optimizer.state.pop(p, None)
        optimizer.state[other] = states[other]


def process_on(device: torch.device, fsdp: bool = False) -> "Process":
    """This process of the run, whose trained parameters are on `device`; fsdp: several hold the model in shards."""
    several = grouped() and dist.get_world_size() > 1
    return Parallel(device, fsdp) if several else Process(device)
