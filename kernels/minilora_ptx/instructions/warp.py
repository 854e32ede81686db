"""Instructions by which the lanes of a warp exchange values: shfl, vote, redux, ldmatrix, mma.

Registers of all lanes have the shape (warps, 32) here: entry [w, l] belongs to lane l of warp w.

shfl.sync (PTX ISA manual, 9.7.9.6) gives lane l the value of another lane. Its operand c holds a
clamp (bits 0 to 4) and a segment mask (bits 8 to 12), and the lanes of a segment exchange values:

    first = l & segment                 last = first | (clamp & ~segment)
    idx    j = first | (b & ~segment)          up      j = l - b      (valid if j >= last)
    bfly   j = l ^ b                           down    j = l + b
    in the other modes j is valid if j <= last; where it is not, the lane keeps its own value

Matrix instructions (9.7.14) spread a matrix over the lanes of a warp, as fragments.py describes.
The manual does not state how tensor cores round sums. Here the products are exact, the sum is made
in fp64, and it is rounded once to fp32.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from minilora_ptx.instructions.fragments import COLUMN, LANE, ROW, a_fragment, values_of
from minilora_ptx.instructions.wgmma import make_wgmma
from minilora_ptx.numbers import Array, halves, joined, to_f32
from minilora_ptx.parse import Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from minilora_ptx.lanes import Lanes
    from minilora_ptx.machine import Machine

WarpFunction = Callable[["Machine", Instruction, Array], None]


def _need_all(machine: "Machine", instruction: Instruction, executing: Array) -> None:
    """Add a finding for each warp of which only a part executes the instruction."""
    active = machine.lanes.by_warp(executing)
    _report_inactive(machine, instruction, _missing(np.ones_like(active), active))


def _missing(named: Array, active: Array) -> Array:
    """Return the lanes (warps, 32) that are named and do not execute what others of the warp do."""
    return np.any(active, axis=1, keepdims=True) & named & ~active


def _report_inactive(machine: "Machine", instruction: Instruction, wrong: Array) -> None:
    """Add a finding if a lane of (warps, 32) is needed and does not execute the instruction."""
    warps = np.flatnonzero(np.any(wrong, axis=1))
    if len(warps):
        name = machine.lanes.name_of_warp(int(warps[0]))
        machine.findings.add("inactive lane", instruction, name, len(warps))


def _full(lanes: "Lanes", operand: Operand | None, kind: str) -> Array:
    """Return an operand in the shape (warps, 32)."""
    return lanes.by_warp(np.broadcast_to(lanes.read(operand, kind), lanes.count))


# ---- exchange of single values


def _make_shuffle(instruction: Instruction) -> WarpFunction | None:
    """Return the function of shfl.sync.{idx,bfly,up,down}.b32."""
    parts = instruction.opcode.split(".")
    if len(parts) != 4 or parts[1] != "sync" or parts[3] != "b32":
        return None
    mode = parts[2]

    def shuffle(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        destination, a, b, c, members = instruction.operands
        values = _full(lanes, a, "b32")
        control = _full(lanes, c, "u32").astype(np.int64)
        amount = _full(lanes, b, "u32").astype(np.int64) & 31
        clamp = control & 31
        segment = (control >> 8) & 31
        first = LANE & segment
        last = first | (clamp & ~segment & 31)
        source = {
            "idx": first | (amount & ~segment & 31),
            "bfly": LANE ^ amount,
            "up": LANE - amount,
            "down": LANE + amount,
        }[mode]
        valid = source >= last if mode == "up" else source <= last
        source = np.where(valid, source, LANE)
        result = np.take_along_axis(values, source, axis=1)
        active = lanes.by_warp(executing)
        named = _members(_full(lanes, members, "u32"))
        absent = active & ~np.take_along_axis(active, source, axis=1)
        _report_inactive(machine, instruction, absent | _missing(named, active))
        register, predicate = destination, None
        if isinstance(destination, Vector):
            register, predicate = destination.items
        assert isinstance(register, Register)
        lanes.write(register.name, result.reshape(-1), executing)
        if isinstance(predicate, Register):
            lanes.write(predicate.name, valid.reshape(-1), executing)

    return shuffle


def _members(mask: Array) -> Array:
    """Return True for each lane that a member mask of its warp names."""
    shifted = mask[:, :1] >> LANE.astype(np.uint32)
    return np.bitwise_and(shifted, 1).astype(bool)


def _make_vote(instruction: Instruction) -> WarpFunction | None:
    """Return the function of vote.sync.{all,any,ballot} (9.7.13.9)."""
    mode = instruction.opcode.removeprefix("vote.sync.")
    if mode not in ("all.pred", "any.pred", "ballot.b32"):
        return None

    def vote(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        destination, a, members = instruction.operands
        assert isinstance(destination, Register)
        active = lanes.by_warp(executing)
        said = _full(lanes, a, "pred")
        named = _members(_full(lanes, members, "u32"))
        _report_inactive(machine, instruction, _missing(named, active))
        if mode == "ballot.b32":
            bits = (said & active).astype(np.uint32) << LANE.astype(np.uint32)
            result = np.bitwise_or.reduce(bits, axis=1)
        elif mode == "all.pred":
            result = (said | ~active).all(1)
        else:
            result = (said & active).any(1)
        lanes.write(destination.name, np.repeat(result, 32), executing)

    return vote


REDUCTIONS = {
    "add.s32": np.add, "min.s32": np.minimum, "max.s32": np.maximum,
    "add.u32": np.add, "min.u32": np.minimum, "max.u32": np.maximum,
    "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor,
}  # fmt: skip


def _make_reduction(instruction: Instruction) -> WarpFunction | None:
    """Return the function of redux.sync (9.7.13.11)."""
    name = instruction.opcode.removeprefix("redux.sync.")
    if name not in REDUCTIONS:
        return None

    def reduce(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        destination, a, _ = instruction.operands
        assert isinstance(destination, Register)
        _need_all(machine, instruction, executing)
        values = _full(lanes, a, name.split(".")[1])
        total = REDUCTIONS[name].reduce(values, axis=1)
        lanes.write(destination.name, np.repeat(total.astype(values.dtype), 32), executing)

    return reduce


# ---- matrices of 8 x 8 values in shared memory


def _matrices(instruction: Instruction) -> tuple[int, bool] | None:
    """Return the number of matrices of an ldmatrix or stmatrix, and True if they are transposed."""
    parts = instruction.opcode.split(".")
    known = {"sync", "aligned", "m8n8", "shared", "b16", "trans"}
    counts = [part for part in parts[1:] if part in ("x1", "x2", "x4")]
    if len(counts) != 1 or not set(parts[1:]) - set(counts) <= known:
        return None
    return int(counts[0][1]), "trans" in parts


def _make_ldmatrix(instruction: Instruction) -> WarpFunction | None:
    """Return the function of ldmatrix: lane 8 j + i holds the address of row i of matrix j."""
    form = _matrices(instruction)
    if form is None:
        return None
    count, transposed = form

    def load(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        destination, address = instruction.operands
        assert isinstance(destination, Vector)
        _need_all(machine, instruction, executing)
        givers = executing & np.tile(LANE < 8 * count, lanes.count // 32)
        addresses = lanes.access.addresses(address, "shared", givers)
        words = lanes.access.load_words(instruction, "shared", addresses, (4, 4), givers)
        # rows of 8 values of 16 bits: (warps, matrices, rows, columns)
        rows = np.zeros((lanes.count // 32, count, 8, 8), np.uint16)
        warps = lanes.by_warp(executing).any(1)
        rows[warps] = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        for i, item in enumerate(destination.items):
            assert isinstance(item, Register)
            pair = joined(rows[:, i, ROW, COLUMN], rows[:, i, ROW, COLUMN + 1])
            lanes.write(item.name, pair.reshape(-1), executing)

    return load


def _make_stmatrix(instruction: Instruction) -> WarpFunction | None:
    """Return the function of stmatrix, the opposite of ldmatrix."""
    form = _matrices(instruction)
    if form is None:
        return None
    count, transposed = form

    def store(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        address, source = instruction.operands
        assert isinstance(source, Vector)
        _need_all(machine, instruction, executing)
        rows = np.zeros((lanes.count // 32, count, 8, 8), np.uint16)
        for i, item in enumerate(source.items):
            low, high = halves(_full(lanes, item, "b32"))
            rows[:, i, ROW, COLUMN] = low
            rows[:, i, ROW, COLUMN + 1] = high
        if transposed:
            rows = rows.swapaxes(2, 3)
        givers = executing & np.tile(LANE < 8 * count, lanes.count // 32)
        addresses = lanes.access.addresses(address, "shared", givers)
        words = np.ascontiguousarray(rows).reshape(-1, 8 * count, 8).view(np.uint32)
        words = words[lanes.by_warp(executing).any(1)].reshape(-1, 4)
        lanes.access.store_words(instruction, "shared", addresses, words, givers)

    return store


# ---- products of matrices


def _make_mma(instruction: Instruction) -> WarpFunction | None:
    """Return the function of mma.m16n8k16 (9.7.15.5.8): D = A B + C."""
    prefix = "mma.sync.aligned.m16n8k16.row.col.f32."
    kind = instruction.opcode.removeprefix(prefix).split(".")[0]
    if instruction.opcode != f"{prefix}{kind}.{kind}.f32" or kind not in ("f16", "bf16"):
        return None

    def multiply(machine: "Machine", instruction: Instruction, executing: Array) -> None:
        lanes = machine.lanes
        d, a, b, c = (x.items for x in instruction.operands if isinstance(x, Vector))
        _need_all(machine, instruction, executing)
        A = a_fragment([_full(lanes, item, "b32") for item in a], kind)  # (warps, 16, 16)
        B = np.zeros((len(A), 16, 8))
        C = np.zeros((len(A), 16, 8))
        for i, item in enumerate(b):
            k = COLUMN + 8 * i
            B[:, k, ROW], B[:, k + 1, ROW] = values_of(_full(lanes, item, "b32"), kind)
        for i, item in enumerate(c):
            C[:, ROW + 8 * (i // 2), COLUMN + i % 2] = _full(lanes, item, "f32")
        D = to_f32(A @ B + C)
        for i, item in enumerate(d):
            assert isinstance(item, Register)
            values = D[:, ROW + 8 * (i // 2), COLUMN + i % 2]
            lanes.write(item.name, values.reshape(-1), executing)

    return multiply


WARP_OPERATIONS: dict[str, Callable[[Instruction], WarpFunction | None]] = {
    "shfl.sync.": _make_shuffle,
    "vote.sync.": _make_vote,
    "redux.sync.": _make_reduction,
    "ldmatrix.": _make_ldmatrix,
    "stmatrix.": _make_stmatrix,
    "mma.sync.": _make_mma,
    "wgmma.mma_async.": make_wgmma,
}
