"""Counts of a run: instructions of a warp, and what each request asks of the memory.

A *request* is one memory instruction of one warp.

    global      32-byte sectors and 128-byte lines that the request touches. Memory moves sectors;
                the load and store unit handles one line at a time.
    shared      passes over the 32 banks, each 4 bytes wide. Lanes that use different words of one
                bank need one pass each. A request of 8 bytes a lane is handled by half warps, one
                of 16 bytes by quarters.
    cycles      of the load and store unit of an SM, which handles one line, one pass, or 128 bytes
                of registers in a cycle: the largest of these for each request. A shuffle takes one.

The rules for sectors and banks come from NVIDIA's CUDA C++ Programming Guide and Best Practices
Guide; PTX does not state them.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minilora_ptx.numbers import Array
from minilora_ptx.parse import Instruction, Kernel

if TYPE_CHECKING:
    from minilora_ptx.lanes import Lanes

SECTOR = 32
LINE = 128
BANKS = 32


@dataclass
class Requests:
    """Sums over the requests of one instruction."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    lines: int = 0
    passes: int = 0
    cycles: int = 0


class Counts:
    """Counts by instruction.

    Args:
        kernel: The kernel.
        detailed: Count sectors, lines and passes too, which takes time.
    """

    def __init__(self, kernel: Kernel, detailed: bool):
        self.kernel = kernel
        self.detailed = detailed
        self.issued: Counter[int] = Counter()  # instruction -> warps that executed it
        self.requests: dict[int, Requests] = {}

    def issue(self, instruction: Instruction, warps: int) -> None:
        """Count an instruction.

        Args:
            instruction: The instruction.
            warps: Number of warps with a lane at it.
        """
        self.issued[instruction.number] += warps

    def access(
        self,
        lanes: "Lanes",
        instruction: Instruction,
        space: str,
        addresses: Array,
        size: int,
        executing: Array,
    ) -> None:
        """Count a memory access.

        Args:
            lanes: The lanes.
            instruction: The instruction.
            space: "global" or "shared".
            addresses: Address of each lane that executes it; in global memory as if each
                allocation began at a multiple of 256.
            size: Bytes of each lane.
            executing: True for each of these lanes.
        """
        if not self.detailed or not len(addresses):
            return
        total = self.requests.setdefault(instruction.number, Requests())
        lane = np.flatnonzero(executing)
        warp = lane // 32
        total.requests += len(np.unique(warp))
        total.bytes += len(addresses) * size
        if space == "global":
            total.sectors += len(_different(warp, addresses // SECTOR))
            lines = np.bincount(_different(warp, addresses // LINE))  # of each warp
            total.lines += int(lines.sum())
            total.cycles += int(np.maximum(lines, -(-np.bincount(warp) * size // LINE)).sum())
        else:
            passes = _passes(lane, addresses.astype(np.int64), size)
            total.passes += passes
            total.cycles += passes

    def opcodes(self) -> Counter[str]:
        """Return the warps that executed each opcode."""
        total: Counter[str] = Counter()
        for number, warps in self.issued.items():
            total[self.kernel.instructions[number].opcode] += warps
        return total

    def cycles(self) -> int:
        """Return the cycles of the load and store unit."""
        shuffles = sum(n for name, n in self.opcodes().items() if name.startswith("shfl."))
        return shuffles + sum(requests.cycles for requests in self.requests.values())

    def total(self, space: str) -> Requests:
        """Return the sums over all instructions of a space.

        Args:
            space: "global" or "shared".
        """
        total = Requests()
        for number, requests in self.requests.items():
            if f".{space}" in self.kernel.instructions[number].opcode:
                for name, value in vars(requests).items():
                    setattr(total, name, getattr(total, name) + value)
        return total


def _different(group: Array, number: Array) -> Array:
    """Return the group of each different pair of a group and a number."""
    pairs = np.unique(np.stack([group.astype(np.int64), number.astype(np.int64)]), axis=1)
    return pairs[0]


def _passes(lane: Array, addresses: Array, size: int) -> int:
    """Return the passes over the banks that shared accesses need."""
    lanes_at_once = 32 // max(1, size // 4)
    group = lane // lanes_at_once
    words = addresses[:, None] // 4 + np.arange(max(1, size // 4))
    groups = np.repeat(group, words.shape[1])
    pairs = np.unique(np.stack([groups, words.reshape(-1)]), axis=1)  # (2, different words)
    banks, uses = np.unique(pairs[0] * BANKS + pairs[1] % BANKS, return_counts=True)
    most = np.zeros(int(groups.max()) + 1, np.int64)
    np.maximum.at(most, banks // BANKS, uses)
    return int(most.sum())
