"""wgmma.mma_async: the matrix product of a warpgroup, on sm_90 (PTX ISA manual, 9.7.15).

Four neighbouring warps multiply a 64 x 16 matrix A by a 16 x N matrix B. A is in four registers,
where warp w holds rows 16 w to 16 w + 15 as in mma, or in shared memory. B is in shared memory. A
64-bit *descriptor* states where a matrix is:

    bits 0-13   address / 16
    bits 16-29  leading offset / 16     bits 32-45  stride offset / 16
    bits 62-63  swizzle: 1 = rows of 128 bytes, 2 = 64 bytes, 3 = 32 bytes

Call n the row of A or the column of B. The values of one n along k are a row in memory, 8 rows are
a group, and groups are a stride offset apart. If the matrix is transposed, the values of one k
along n are a row, and a row that is full continues a leading offset further.

So that 8 lanes that read one column of 8 rows hit different banks, bits of the address are
exchanged: bits 4-6 of an address are XORed with bits 7-9 (128 bytes), 4-5 with 7-8 (64), or 4 with
7 (32).

The machine multiplies at once. It does not check that the program waits for the result.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from minilora_ptx.findings import Fault
from minilora_ptx.instructions.fragments import COLUMN, ROW, a_fragment
from minilora_ptx.numbers import Array, from_bf16, to_f32
from minilora_ptx.parse import Immediate, Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from minilora_ptx.machine import Machine

OPCODE = re.compile(r"^wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2$")
SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}
GROUP = 128  # threads of a warpgroup


def make_wgmma(instruction: Instruction) -> "Callable[[Machine, Instruction, Array], None] | None":
    """Return the function of a wgmma.mma_async, or None if the machine does not know its form.

    Args:
        instruction: The instruction.
    """
    match = OPCODE.match(instruction.opcode)
    if not match:
        return None
    width, kind = int(match[1]), match[2]
    signs, transposed = _constants(instruction)
    if signs != [1, 1]:
        return None  # a negative factor

    def multiply(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        d, a, b, scale = instruction.operands[:4]
        assert isinstance(d, Vector)
        groups = executing.reshape(-1, GROUP)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault(f"a part of a warpgroup executes {instruction.where()}")
        if isinstance(a, Vector):
            registers = [lanes.by_warp(lanes.read(item, "b32")) for item in a.items]
            A = a_fragment(registers, kind)  # (warps, 16, 16)
        else:
            A = _matrix(machine, instruction, a, (64, kind, transposed[-2]), executing)
            A = A.reshape(-1, 16, 16)
        B = _matrix(machine, instruction, b, (width, kind, transposed[-1]), executing)
        B = np.repeat(B.swapaxes(1, 2), 4, axis=0)  # (warps, 16, N)
        keep = np.broadcast_to(lanes.read(scale, "pred"), lanes.count)
        D = A @ B
        for i, item in enumerate(d.items):
            assert isinstance(item, Register)
            row = ROW + 8 * (i // 2 % 2)
            column = COLUMN + i % 2 + 8 * (i // 4)
            before = np.zeros(lanes.count)
            if keep[executing].any():
                before = np.where(keep, lanes.read(item, "f32"), np.float32(0))
            total = D[:, row, column].reshape(-1) + before.astype(np.float64)
            lanes.write(item.name, to_f32(total), executing)

    return multiply


def _constants(instruction: Instruction) -> tuple[list[int], list[int]]:
    """Return the factors of A and B, and which of the matrices in shared memory is transposed."""
    values = [x.bits for x in instruction.operands[4:] if isinstance(x, Immediate)]
    return values[:2], values[2:]


def _matrix(
    machine: "Machine",
    instruction: Instruction,
    operand: Operand,
    form: tuple[int, str, int],
    executing: Array,
) -> Array:
    """Return the matrix (warpgroups, n, 16) in fp64 that a descriptor states.

    It is zero for a group that does not execute the instruction.
    """
    width, kind, transposed = form
    lanes = machine.lanes
    active = np.flatnonzero(executing[::GROUP])  # groups
    descriptor = np.broadcast_to(lanes.read(operand, "b64"), lanes.count)[::GROUP][active]
    mode = int(descriptor[0] >> np.uint64(62))
    if mode not in SWIZZLE_BYTES:
        raise Fault(f"a matrix without swizzle is not known: {instruction.where()}")
    row_bytes = SWIZZLE_BYTES[mode]
    start, leading, stride = (
        (((descriptor >> np.uint64(bit)) & np.uint64(0x3FFF)) * 16).astype(np.int64)[:, None, None]
        for bit in (0, 16, 32)
    )
    n = np.arange(width)[None, :, None]
    k = np.arange(16)[None, None, :]
    if transposed:
        row, column = k, n % (row_bytes // 2)
        start = start + n // (row_bytes // 2) * leading
    else:
        row, column = n, k
    address = start + row // 8 * stride + row % 8 * row_bytes + 2 * column
    mask = row_bytes // 16 - 1
    address = address ^ (((address >> 7) & mask) << 4)
    if address.max() + 2 > lanes.shared.size:
        raise Fault(f"out of bounds: a matrix ends past the shared memory. {instruction.where()}")
    ctas = active * GROUP // lanes.threads
    place = address + ctas[:, None, None] * lanes.shared.size
    if machine.races and (lanes.shared.shadow.writer[place] < 0).any():
        machine.findings.add("uninitialised read", instruction, "a matrix in shared memory")
    bits = lanes.shared.views[2][place // 2]
    values = from_bf16(bits) if kind == "bf16" else bits.view(np.float16)
    matrix = np.zeros((lanes.count // GROUP, width, 16))
    matrix[active] = values
    return matrix
