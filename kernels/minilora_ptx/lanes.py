"""The lanes: registers and positions of all threads that run at the same time.

Lane i is thread i % threads of CTA ctas[i // threads]. 32 neighbours are a warp (PTX ISA manual,
section 2.2.1). Arrays of lanes have one dimension; `by_warp` gives them the shape (warps, 32).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from minilora_ptx.memory import SharedMemory, Who
from minilora_ptx.numbers import KINDS, UNSIGNED, Array
from minilora_ptx.parse import Immediate, Kernel, Operand, PTXError, Register, Symbol

if TYPE_CHECKING:
    from minilora_ptx.access import MemoryAccess

WARP = 32
UNKNOWN = 0x7FEDBADC7FEDBADC  # bits of what was never written: a NaN in fp32


class Lanes:
    """State of the lanes.

    Args:
        kernel: The kernel.
        grid: Number of CTAs along x, y and z.
        ctas: Numbers of the CTAs that run.
        threads: Threads of a CTA.
        shared_bytes: Bytes of shared memory of a CTA.
        arguments: Values of the parameters.
    """

    access: "MemoryAccess"

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        ctas: Array,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[int | float],
    ):
        self.kernel = kernel
        self.ctas = ctas
        self.threads = threads
        self.count = len(ctas) * threads
        self.position = np.zeros(self.count, np.int64)
        self.waits_at = np.full(self.count, -1)  # number of the barrier instruction
        self.ended = np.zeros(self.count, bool)
        self.clock = np.zeros(self.count, np.int32)
        self.shared = SharedMemory(len(ctas), shared_bytes)
        self.registers: dict[str, Array] = {}
        self.cta_of_lane = np.repeat(np.arange(len(ctas)), threads)
        self.thread = np.tile(np.arange(threads, dtype=np.int32), len(ctas))
        number = np.repeat(ctas, threads)
        self.thread_in_grid = (number * threads + self.thread).astype(np.int32)
        self._special = self._special_registers(grid, number)
        self._parameters = {
            name: _parameter_bits(value, bits)
            for (name, bits), value in zip(kernel.parameters, arguments, strict=True)
        }
        self._immediates: dict[tuple[int, str], Array] = {}

    def _special_registers(self, grid: tuple[int, int, int], cta: Array) -> dict[str, Array]:
        """Return the special registers (chapter 10), uint32."""
        x, y, _ = grid
        values = {
            "%tid.x": self.thread,
            "%tid.y": self.thread * 0,
            "%tid.z": self.thread * 0,
            "%laneid": self.thread % WARP,
            "%warpid": self.thread // WARP,
            "%ctaid.x": cta % x,
            "%ctaid.y": cta // x % y,
            "%ctaid.z": cta // (x * y),
            "%ntid.x": np.full(self.count, self.threads),
            "%ntid.y": np.ones(self.count),
            "%ntid.z": np.ones(self.count),
        }
        for axis, size in zip("xyz", grid, strict=True):
            values[f"%nctaid.{axis}"] = np.full(self.count, size)
        return {name: value.astype(np.uint32) for name, value in values.items()}

    # ---- groups of lanes

    def set_active(self, active: Array) -> None:
        """Store the lanes that execute the next instructions.

        Args:
            active: True for each lane.
        """
        self.active = active
        self.all_active = bool(active.all())
        self.active_warps = int(self.by_warp(active).any(1).sum())

    def by_warp(self, values: Array) -> Array:
        """Return values of lanes in the shape (warps, 32).

        Args:
            values: One value a lane.
        """
        return values.reshape(-1, WARP)

    def by_cta(self, values: Array) -> Array:
        """Return values of lanes in the shape (CTAs, threads).

        Args:
            values: One value a lane.
        """
        return values.reshape(-1, self.threads)

    def name_of_warp(self, warp: int) -> str:
        """Return text that names a warp.

        Args:
            warp: Number of the warp among those that run.
        """
        return self.name_of_lane(warp * WARP).rpartition(",")[0]

    def name_of_lane(self, lane: int) -> str:
        """Return text that names a lane by CTA, warp and lane.

        Args:
            lane: Number of the lane among those that run.
        """
        thread = int(self.thread[lane])
        cta = int(self.ctas[lane // self.threads])
        return f"CTA {cta}, warp {thread // WARP}, lane {thread % WARP}"

    def who(self, executing: Array) -> Who:
        """Return the threads and clocks of some lanes.

        Args:
            executing: True for each of these lanes.
        """
        return Who(self.thread_in_grid[executing], self.clock[executing], self.threads)

    # ---- operands

    def parameter(self, name: str) -> int:
        """Return the bits of a parameter.

        Args:
            name: Name of the parameter.
        """
        if name not in self._parameters:
            raise PTXError(f"no parameter {name}: the kernel has {[*self._parameters]}")
        return self._parameters[name]

    def read(self, operand: Operand | None, kind: str) -> Array:
        """Return the values of an operand, one a lane, or one for all lanes.

        Args:
            operand: Register, constant or name of a variable in shared memory.
            kind: Kind as which the bits are read.
        """
        if isinstance(operand, Register):
            return self.read_register(operand.name, kind)
        if isinstance(operand, Immediate):
            key = (operand.bits, kind)
            if key not in self._immediates:
                self._immediates[key] = _constant(operand.bits, kind)
            return self._immediates[key]
        if isinstance(operand, Symbol) and operand.name in self.kernel.shared:
            return np.array(self.kernel.shared[operand.name], KINDS[kind])
        raise PTXError(f"expected a register, a constant or a shared variable, got {operand}")

    def read_register(self, name: str, kind: str) -> Array:
        """Return the values of a register.

        Args:
            name: Name of the register.
            kind: Kind as which the bits are read.
        """
        values = self.registers.get(name)
        if values is None:
            values = self._special.get(name)
        if values is None:
            self.kernel.bits(name)
            raise PTXError(f"the register {name} is read before it is written")
        return _seen_as(values, kind)

    def read_or_garbage(self, operand: Operand | None, kind: str) -> Array:
        """Return the values of an operand; a register that was never written holds garbage.

        For sm_120 the compiler packs such registers into pairs whose other half it uses.

        Args:
            operand: Operand.
            kind: Kind as which the bits are read.
        """
        if operand is None or (
            isinstance(operand, Register)
            and operand.name not in self.registers
            and operand.name not in self._special
        ):
            dtype = np.dtype(KINDS[kind])
            return np.full(self.count, UNKNOWN & (2 ** (dtype.itemsize * 8) - 1), dtype)
        return self.read(operand, kind)

    def write(self, name: str, values: Array, executing: Array) -> None:
        """Write a register in the lanes that execute the instruction.

        Args:
            name: Name of the register.
            values: One value a lane, or one for all. A narrower value is extended to the register,
                with its sign if its type has one.
            executing: True for each lane that writes.
        """
        bits = self.kernel.bits(name)
        if bits == 1:
            values = values.astype(bool)
        else:
            size = bits // 8
            if values.itemsize != size:
                signed = values.dtype.kind == "i"
                wide = values if signed else values.view(UNSIGNED[values.itemsize])
                values = wide.astype(UNSIGNED[size])
            values = values.view(UNSIGNED[size])
        if values.shape != (self.count,):
            values = np.full(self.count, values)
        if not (self.all_active and executing is self.active):
            before = self.registers.get(name)
            if before is None:
                unknown = UNKNOWN & ((1 << bits) - 1)
                before = np.full(self.count, unknown, values.dtype)
            values = np.where(executing, values, before)
        self.registers[name] = values


def _seen_as(values: Array, kind: str) -> Array:
    """Return the bits of a register as values of a kind; a narrower kind takes the low bits."""
    dtype = np.dtype(KINDS[kind])
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize == dtype.itemsize:
        return values.view(dtype)
    if values.dtype.itemsize < dtype.itemsize:
        return values.astype(UNSIGNED[dtype.itemsize]).view(dtype)
    return values.astype(UNSIGNED[dtype.itemsize]).view(dtype)


def _constant(bits: int, kind: str) -> Array:
    """Return an array of one value with these bits."""
    dtype = np.dtype(KINDS[kind])
    if kind == "pred":
        return np.array(bits != 0)
    mask = (1 << (dtype.itemsize * 8)) - 1
    return np.array(bits & mask, UNSIGNED[dtype.itemsize]).view(dtype)


def _parameter_bits(value: int | float, bits: int) -> int:
    """Return the bits of an argument."""
    if isinstance(value, float):
        kind = {16: np.float16, 32: np.float32, 64: np.float64}[bits]
        return int(kind(value).view(UNSIGNED[bits // 8]))
    return value & ((1 << bits) - 1)
