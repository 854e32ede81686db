"""One run in several processes, on torch's DDP (copies of the model) or FSDP2 (one sharded model).

    g = Σ_m ∂(loss sum of m / N of the step)/∂parameter       over all micro-batches m of the step

A step is cut into micro-batches as in one process, and rank r runs numbers r, r + world size,
r + 2 · world size, ... so the step is the same for any number of ranks. Every rank makes the same
number of passes, because each pass ends in a collective. A rank that is left without a micro-batch
repeats the first one with weight 0. DDP and FSDP2 average gradients over the ranks, so the loop
multiplies losses by the world size.

DDP    Every rank has a copy of the model. Gradients are summed over the ranks after the last
       micro-batch of a step.
FSDP2  Every rank has 1/(world size) of each tensor. The tensors of a layer, 4-bit codes and scales
       included, are gathered while the layer runs and are then freed. The original model stays in
       host memory and receives the trained values for each checkpoint and at the end, so files and
       later code do not depend on the shards.

The loop uses `training/process.py`, which has the answers of a single process. This file has the
answers of one process of several.
"""

import copy
import hashlib
import inspect
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.common import order_by_length, unwrap_model
from minilora.lora.registry import lora_configs
from minilora.training.optim.adamw_8bit import AdamW8bit
from minilora.training.process import Loss, Measure, Process, full, in_process_group


class Parallel(Process):
    """One process of a process group.

    Attributes:
        shards: Pairs of a trainable parameter of the original model and its shards (FSDP2 only).
    """

    def __init__(self, device: torch.device, fsdp: bool = False):
        """Read rank and world size from the process group.

        Args:
            device: Device of the trainable parameters.
            fsdp: Shard the model instead of copying it. Shards are on the current GPU if there is
                one.
        """
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.fsdp = fsdp
        self.is_main = self.rank == 0
        self.device = device
        if self.fsdp and torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.shards: list[tuple[nn.Parameter, Any]] = []

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, on the device of the values.

        Args:
            values: The values of this rank, of any shape.
        """
        summed = values.to(self.device)
        dist.all_reduce(summed)
        return summed.to(values.device)

    @contextmanager
    def main_first(self, wanted: bool) -> Iterator[None]:
        """Let rank 0 finish the block before the others start it.

        Args:
            wanted: False runs the block in all processes at once.
        """
        if wanted and not self.is_main:
            dist.barrier()
        yield
        if wanted and self.is_main:
            dist.barrier()

    def check_agreement(self, **values: object) -> None:
        """Raise ValueError if the ranks were started with different values.

        Args:
            **values: Values by name; a hash of their `repr` is compared.

        Raises:
            ValueError: With the names that differ, on every rank.
        """
        hashes = [_hash(value) for value in values.values()]
        table = torch.zeros(self.world_size, len(hashes), dtype=torch.long)  # (ranks, values)
        table[self.rank] = torch.tensor(hashes)
        equal = (self.sum(table) == table[self.rank]).all(0).tolist()
        different = [name for name, same in zip(values, equal, strict=True) if not same]
        if different:
            raise ValueError(
                f"the {self.world_size} processes were given different {', '.join(different)}. "
                "Give all of them the same model, dataset and config: each trains on its own share "
                "of every step."
            )

    def micro_batches(self, count: int) -> list[tuple[int, int]]:
        """Return the micro-batches of a step that this rank runs, equally many on every rank.

        Args:
            count: Number of micro-batches in the step.

        Returns:
            Pairs of a micro-batch's number and its weight. A rank that would be left without one
            repeats number 0 with weight 0.
        """
        per_rank = -(-count // self.world_size)
        assigned = []
        for number in range(self.rank, per_rank * self.world_size, self.world_size):
            assigned.append((number, 1) if number < count else (0, 0))
        return assigned

    def mean(
        self, measure: Measure, items: Sequence[Any], equal_passes: bool = True
    ) -> dict[str, float]:
        """Return figures that are means over all items, each rank measuring its share.

        Every rank takes the same number of items, of all lengths. All ranks measure the items that
        are left over, and the main one counts them. All items are treated as left over if they need
        different numbers of passes and each pass needs all ranks (FSDP2).

        Args:
            measure: Function of some items that returns the mean of each figure and the number that
                the means are over.
            items: The items of all ranks.
            equal_passes: True if every item needs the same number of forward passes.
        """
        self.gather_root()
        divided = 0  # number of items that are divided among the ranks
        if equal_passes or not self.fsdp:
            divided = len(items) - len(items) % self.world_size
        order = order_by_length(items, longest_first=False)
        own_share = order[self.rank : divided : self.world_size]
        left_over = order[divided:]
        sums: dict[str, float] = {}
        count = 0
        for indices, weight in ((own_share, 1), (left_over, int(self.is_main))):
            if not indices:
                continue
            figures, size = measure([items[i] for i in indices])
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value * size * weight
            count += size * weight
        local = torch.tensor([count, *sums.values()], dtype=torch.float64)  # (1 + figures,)
        total, *values = self.sum(local).tolist()
        return {name: value / total for name, value in zip(sums, values, strict=True)}

    def wrap(self, model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> None:
        """Prepare DDP or FSDP2, and print the bytes that each process sends.

        Args:
            model: The model that was passed to `train`, with its wrappers.
            objective: The objective of the run.
            optimizer: The optimiser over the model's trainable parameters.

        Raises:
            ValueError: If the optimiser has 8-bit moments and the model is sharded.
        """
        if self.fsdp:
            self.loss: Any = self._sharded_loss(model, objective, optimizer)
            self._set_model(self.loss.model)
            self.gather_root()
            kind = "FSDP2, the model sharded"
        else:
            self._set_model(unwrap_model(model))
            self.loss = _ddp(Loss(model, objective))
            kind = "DDP, a copy of the model in each"
        sent = traffic(model, self.world_size, self.fsdp)
        period = "micro-batch" if self.fsdp else "step"
        print(
            f"parallel: {self.world_size} processes, {kind}; each of them sends {sent:,} bytes a "
            f"{period}"
        )

    def gather_root(self) -> None:
        """Gather the tensors that FSDP2 keeps outside the layers, so that `model` runs alone.

        The call also registers the layers with their root module.
        """
        if self.fsdp:
            self.loss(None)

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        """Return the context in which a micro-batch runs.

        DDP sums gradients over the ranks in the last micro-batch only. FSDP2 sums them in each and
        stores no full gradient.

        Args:
            last: True for the last micro-batch of the step.
        """
        if last or self.fsdp:
            return nullcontext()
        return self.loss.no_sync()

    def _sharded_loss(
        self, model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer
    ) -> Loss:
        """Return the objective over a sharded copy of the model; move the model to the CPU."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if isinstance(optimizer, AdamW8bit):
            raise ValueError(
                'fsdp: blocks of 8-bit moments do not fit into shards. Set optim="adamw_torch".'
            )
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        loss = _copy_on_same_storage(Loss(model, objective))
        lora_configs(loss.model).parts.in_shards = True
        for layer in _layers(loss):
            fully_shard(layer, mesh=mesh)
        fully_shard(loss, mesh=mesh)
        shards = dict(loss.model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.shards.append((parameter, shards[name]))
        self.original = model
        self.original_device = next(model.parameters()).device
        model.cpu()
        self._shard_states(optimizer, mesh)
        return loss

    def _shard_states(self, optimizer: torch.optim.Optimizer, mesh: Any) -> None:
        """Let the optimiser work on the shards, with the moments sharded alike."""
        from torch.distributed.tensor import distribute_tensor

        states = {}
        for parameter, shard in self.shards:
            state = {}
            for key, value in optimizer.state[parameter].items():
                state[key] = value.to(self.device)
                if value.shape == shard.shape:  # a moment, not the step number
                    state[key] = distribute_tensor(state[key], mesh, shard.placements)
            states[shard] = state
        _replace_parameters(optimizer, dict(self.shards), states)

    @contextmanager
    def full_tensors(
        self, optimizer: torch.optim.Optimizer, permanently: bool = False
    ) -> Iterator[None]:
        """Give the original model and the optimizer full tensors inside the block.

        Args:
            optimizer: The optimiser of the run.
            permanently: Do not return to shards after the block.
        """
        shard_states = {shard: optimizer.state[shard] for _, shard in self.shards}
        full_states = {}
        with torch.no_grad():
            for parameter, shard in self.shards:
                parameter.copy_(full(shard))
                state = {}
                for key, value in shard_states[shard].items():
                    state[key] = full(value).to(parameter.device)
                full_states[parameter] = state
        to_parameters = {shard: parameter for parameter, shard in self.shards}
        _replace_parameters(optimizer, to_parameters, full_states)
        yield
        if not permanently:
            _replace_parameters(optimizer, dict(self.shards), shard_states)
        elif self.shards:
            self.original.to(self.original_device)
        dist.barrier()  # files that one rank writes in the block exist for all after it

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Record Ctrl-C in `interrupt_requested` inside the block.

        A step ends the run on all ranks if it was requested on any of them.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request_interrupt(number: int, frame: Any) -> None:
            self.interrupt_requested = True

        previous = signal.signal(signal.SIGINT, request_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _hash(value: object) -> int:
    """Return 48 bits of the SHA-256 of a value's `repr`."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6])


def _ddp(loss: Loss) -> nn.Module:
    """Wrap a loss in DDP, without a broadcast of buffers in each forward pass."""
    engine: Any = nn.parallel.DistributedDataParallel
    option = "broadcast_buffers"
    if (
        "forward_sync_buffers" in inspect.signature(engine).parameters
    ):  # its name from torch 2.13 on
        option = "forward_sync_buffers"
    return engine(loss, **{option: False})


def _copy_on_same_storage(loss: Loss) -> Loss:
    """Return a copy of the modules with new parameters on the same memory."""
    memo: dict[int, Any] = {id(loss.objective): loss.objective}
    for parameter in loss.model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return copy.deepcopy(loss, memo)


def traffic(model: nn.Module, world_size: int, fsdp: bool = False) -> int:
    """Return the bytes that each rank sends, with ring collectives.

    A gather or a scatter sends (world_size − 1)/world_size of a tensor. DDP scatters and gathers
    the gradients once a step. FSDP2 gathers the stored model for the forward pass and its layers
    again for the backward pass, and scatters the gradients, for each micro-batch.

    Args:
        model: The model.
        world_size: Number of ranks.
        fsdp: True for FSDP2, False for DDP.

    Returns:
        Bytes a step (DDP) or a micro-batch (FSDP2).
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if fsdp:
        stored = sum(p.nbytes for p in model.parameters())
        layers = sum(p.nbytes for p in nn.ModuleList(_layers(model)).parameters())
        moved = stored + layers + trained
    else:
        moved = 2 * trained
    return moved * (world_size - 1) // world_size


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the largest ModuleList of the model: the layers that FSDP2 gathers one at a time."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    return list(max(lists, key=_parameter_count))


def _parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def _replace_parameters(
    optimizer: torch.optim.Optimizer, replacements: dict[Any, Any], states: dict[Any, Any]
) -> None:
    """Let the optimiser work on other parameters, with the given states."""
    for group in optimizer.param_groups:
        group["params"] = [replacements.get(p, p) for p in group["params"]]
    for old, new in replacements.items():
        optimizer.state.pop(old, None)
        optimizer.state[new] = states[new]


def process_on(device: torch.device, fsdp: bool = False) -> Process:
    """Return this process of the run.

    Args:
        device: Device of the trainable parameters.
        fsdp: Shard the model over the processes; no effect in a single process.
    """
    if in_process_group() and dist.get_world_size() > 1:
        return Parallel(device, fsdp)
    return Process(device)
