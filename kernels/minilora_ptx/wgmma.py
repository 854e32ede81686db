"""wgmma.mma_async: the matrix product of a warpgroup, on sm_90 (PTX ISA manual, 9.7.16).

Four neighbouring warps multiply a 64 x 16 matrix A by a 16 x N matrix B. Warp w holds rows 16 w to
16 w + 15 of A in four registers, as mma does. B is in shared memory, which a 64-bit *descriptor*
states (9.7.16.5.1.2.2):

    bits 0-13   address / 16            bits 32-45   stride / 16: bytes from 8 columns n to the next
    bits 62-63  swizzle: 1 = 128 bytes, 2 = 64 bytes, 3 = 32 bytes

Each column n is a row of `swizzle` bytes along k. So that 8 lanes that read one k of 8 columns hit
different banks, bits of the address are exchanged: bits 4-6 of an address are XORed with bits 7-9
(128 bytes), 4-5 with 7-8 (64), or 4 with 7 (32).

The machine multiplies at once. It does not check that the program waits for the result.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from minilora_ptx.findings import Fault
from minilora_ptx.fragments import COLUMN, ROW, a_fragment
from minilora_ptx.numbers import Array, from_bf16, to_f32
from minilora_ptx.parse import Immediate, Instruction, Register, Vector

if TYPE_CHECKING:
    from minilora_ptx.machine import Machine

OPCODE = re.compile(r"^wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2$")
SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}


def make_wgmma(instruction: Instruction) -> "Callable[[Machine, Instruction, Array], None] | None":
    """Return the function of a wgmma.mma_async, or None if the machine does not know its form.

    Args:
        instruction: The instruction.
    """
    match = OPCODE.match(instruction.opcode)
    if not match or len(instruction.operands) != 7:
        return None
    width, kind = int(match[1]), match[2]
    constants = instruction.operands[4:]
    if constants != (Immediate(1), Immediate(1), Immediate(0)):
        return None  # negated or transposed operands

    def multiply(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        d, a, descriptor, scale = instruction.operands[:4]
        assert isinstance(d, Vector) and isinstance(a, Vector)
        if not lanes.by_warp(executing).all():
            raise Fault(f"a part of a warpgroup executes {instruction.where()}")
        registers = [lanes.by_warp(lanes.read(item, "b32")) for item in a.items]
        A = a_fragment(registers, kind)  # (warps, 16, 16)
        groups = len(A) // 4
        told = np.broadcast_to(lanes.read(descriptor, "b64"), lanes.count).reshape(groups, 128)
        B = _matrix_b(machine, instruction, told[:, 0], (width, kind))  # (groups, 16, N)
        keep = np.broadcast_to(lanes.read(scale, "pred"), lanes.count)
        D = (A.reshape(groups, 4, 16, 16) @ B[:, None]).reshape(-1, 16, width)
        for i, item in enumerate(d.items):
            assert isinstance(item, Register)
            row = ROW + 8 * (i // 2 % 2)
            column = COLUMN + i % 2 + 8 * (i // 4)
            before = np.where(keep, lanes.read(item, "f32"), np.float32(0)).astype(np.float64)
            total = D[:, row, column].reshape(-1) + before
            lanes.write(item.name, to_f32(total), executing)

    return multiply


def _matrix_b(
    machine: "Machine", instruction: Instruction, descriptor: Array, form: tuple[int, str]
) -> Array:
    """Return the matrix B (warpgroups, 16, N) in fp64 that a descriptor of each group states."""
    width, kind = form
    lanes = machine.lanes
    mode = int(descriptor[0] >> np.uint64(62))
    if mode not in SWIZZLE_BYTES:
        raise Fault(f"a matrix without swizzle is not known: {instruction.where()}")
    row_bytes = SWIZZLE_BYTES[mode]
    start = ((descriptor & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)  # (groups,)
    stride = (((descriptor >> np.uint64(32)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    n = np.arange(width)[None, :, None]
    k = np.arange(16)[None, None, :]
    address = start[:, None, None] + n // 8 * stride[:, None, None] + n % 8 * row_bytes + 2 * k
    mask = row_bytes // 16 - 1
    address = address ^ (((address >> 7) & mask) << 4)
    if address.max() + 2 > lanes.shared.size:
        raise Fault(f"out of bounds: B reaches past the shared memory. {instruction.where()}")
    ctas = np.arange(len(descriptor)) * 128 // lanes.threads
    place = address + ctas[:, None, None] * lanes.shared.size
    if (lanes.shared.shadow.writer[place] < 0).any() and machine.races:
        machine.findings.add("uninitialised read", instruction, "matrix B")
    bits = lanes.shared.views[2][place // 2]
    values = from_bf16(bits) if kind == "bf16" else bits.view(np.float16)
    return values.astype(np.float64).swapaxes(1, 2)
