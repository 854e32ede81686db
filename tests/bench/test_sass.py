"""Tests of sass.py, which counts the instructions of machine code and computes the occupancy.

It follows the path of one thread, reads the widths of memory accesses and computes how many warps
fit on an SM. Inputs: programs written by hand, random programs of which every path is listed, and
kernels compiled for GPUs that this machine does not have.
"""

import re
from functools import cache

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_model.imaginary import imaginary_gpu
from benchmarks.gpu_model.sass import bits, count, cubins, functions, occupancy, parse, tally, trace

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


def targets(*fast: str) -> list:
    """Return TARGETS for parametrize. All except `fast` are marked slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in TARGETS]


def listing(*lines: str) -> str:
    """Return lines in the disassembler's format: 16 bytes per instruction, then its encoding."""
    encoding = "/* 0x00000a0000017a02 */"
    return "\n".join(
        f"        /*{16 * n:04x}*/    {line} ;    {encoding}" for n, line in enumerate(lines)
    )


# ---- programs written by hand

LOOP = (
    "MOV R1, c[0x0][0x28]",  # 00
    "@P0 EXIT",  # 10: not taken
    "LDG.E.128 R4, [R2.64]",  # 20: start of the loop
    "FFMA R8, R4, R5, R8",  # 30
    "@!P1 BRA 0x20",  # 40
    "STG.E.U8 [R2.64], R8",  # 50
    "EXIT",  # 60
    "BRA 0x70",  # padding from here
    "NOP",
    "NOP",
)
BRANCH = (
    "@P0 BRA 0x40",  # 00
    "LDG.E.128 R4, [R2.64]",  # 10: the short side
    "STG.E.128 [R2.64], R4",  # 20
    "EXIT",  # 30
    "LDG.E R4, [R2.64]",  # 40: the long side
    "LDG.E R5, [R2.64+0x4]",
    "IADD3 R4, R4, R5, RZ",
    "BRA 0x20",  # 70: a jump back, but not a loop
)
NESTED = (
    "S2R R0, SR_TID.X",  # 00
    "LDS R4, [R0]",  # 10: start of the outer loop
    "IADD3 R5, R5, R4, RZ",  # 20: start of the inner loop
    "@P0 BRA 0x20",  # 30
    "BRA.U !UP1, 0x10",  # 40: the condition is an operand
    "EXIT",  # 50
)
ASIDE = (
    "BRA.DIV ~URZ, 0x40",  # 00: taken if the threads of a warp diverge
    "CALL.REL.NOINC 0x60",  # 10: call of a subroutine
    "CALL.ABS.NOINC 0x0",  # 20: another call, whose address the linker will fill in
    "EXIT",  # 30
    "BRA 0x10",  # 40
    "NOP",  # 50
    *["MOV R4, R5"] * 9,  # 60
    "RET.REL.NODEC R2 0x0",
)
LEFT_BY_CALL = (
    "LDS R4, [R0]",  # 00: start of the loop
    "@P0 CALL.REL.NOINC 0x30",  # 10: leaves the loop; no subroutine, since it ends in EXIT
    "BRA 0x0",  # 20
    "STG.E [R2.64], R4",  # 30
    "EXIT",  # 40
)


@pytest.mark.parametrize(
    ("program", "through", "path", "loop"),
    [
        (LOOP, None, [0, 1, 2, 3, 4, 5, 6], [2, 3, 4]),
        (BRANCH, None, [0, 4, 5, 6, 7, 2, 3], []),
        (BRANCH, r"LDG.*128", [0, 1, 2, 3], []),
        (BRANCH, r"LDG\.E$", [0, 4, 5, 6, 7, 2, 3], []),
        (NESTED, None, [0, 1, 2, 3, 4, 5], [1, 2, 3, 4]),
        (ASIDE, None, [0, 1, 2, 3], []),
        (LEFT_BY_CALL, None, [0, 1, 2, 3, 4], [0, 1, 2]),
        (
            LEFT_BY_CALL,
            "LDS",
            [0, 1, 2, 3, 4],
            [0, 1, 2],
        ),  # a full iteration, not the shortest path
        ((), None, [], []),
    ],
)
def test_trace_follows_a_thread_that_does_all_of_the_work(program, through, path, loop):
    for found, expected in zip(trace(parse(listing(*program)), through), (path, loop), strict=True):
        assert [i.address // 16 for i in found] == expected


def test_parse_splits_a_line_into_its_parts():
    (i,) = parse(listing("@!UP1 LDG.E.U8.CONSTANT R4, [R2.64+-0x1]"))
    assert (i.predicate, i.opcode, i.kind) == ("@!UP1", "LDG.E.U8.CONSTANT", "LDG")
    assert i.operands.strip() == "R4, [R2.64+-0x1]"


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDG.E", 32),
        ("LDG.E.U8.CONSTANT", 8),
        ("STG.E.U16", 16),
        ("LDG.E.64", 64),
        ("LDG.E.LTC128B.128", 128),
        ("LDG.E.LTC128B", 32),  # LTC128B is the L2 prefetch size, not the width
        ("STG.E.ENL2.256", 256),
        ("LDSM.16.M88.4", 128),
    ],
)
def test_the_width_of_an_access(opcode, expected):
    assert bits(opcode) == expected


def test_tally_counts_accesses_and_pipes():
    memory = "LDG.E.128 LDGSTS.E.128 STG.E.U8 LDS.64 SHFL.IDX LDL"
    other = "FFMA IMAD.MOV.U32 HFMA2 MUFU.RCP I2F IADD3 LOP3.LUT LDC ULDC S2R BAR.SYNC EXIT"
    found = tally(parse(listing(*memory.split(), *other.split())))
    assert (found.instructions, found.shared) == (18, 1)
    assert (found.loads, found.stores) == ({128: 2}, {8: 1})
    # lsu in passes of 32 bits: 4 + 4 + 1 + 2, and one each for the shuffle and for local memory
    assert found.pipes == {"lsu": 13, "fma": 3, "xu": 2, "alu": 2}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.booleans()), min_size=1, max_size=9))
def test_trace_finds_the_longest_path(steps):
    """Compare with the list of all paths.

    A step is (may jump, distance of the jump, is a wide load if it may not jump).
    """
    lines = [
        f"@P0 BRA {16 * (n + far):#x}" if jump else f"LDG.E{'.128' * wide}"
        for n, (jump, far, wide) in enumerate(steps)
    ]
    lines += ["EXIT"] * 4
    code, ways = parse(listing(*lines)), [[0]]
    done = []
    while ways:
        way = ways.pop()
        here = way[-1]
        after = (
            {here + 1, here + steps[here][1]}
            if here < len(steps) and steps[here][0]
            else {here + 1}
        )
        ways += [[*way, n] for n in after] if lines[here] != "EXIT" else []
        done += [way] if lines[here] == "EXIT" else []
    wide = [sum("128" in lines[n] for n in way) for way in done]
    assert len(trace(code)[0]) == max(map(len, done))
    path, loop = trace(code, "128")
    assert sum("128" in i.opcode for i in path) == max(wide) and not loop
    assert len(path) == min(len(way) for way, n in zip(done, wide, strict=True) if n == max(wide))


# ---- real kernels


@triton.jit
def _copy(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


@triton.jit
def _row_sums(source, target, columns, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(source + tl.program_id(0) * columns + at, mask=at < columns, other=0.0)
    tl.store(target + tl.program_id(0), tl.sum(sums))


@triton.jit
def _twice_the_sum(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at)
    tl.store(target + at, values + tl.sum(values))  # every value stays in a register until here


@cache
def copy_kernel(target: str, dtype: torch.dtype, block: int) -> bytes:
    """Return the machine code of a copy by 4 warps. Each thread copies block / 128 values."""
    x = torch.zeros(block, dtype=dtype)
    with imaginary_gpu(target) as launches:
        _copy[(1,)](x, x, BLOCK=block)
    return launches[0].binary


# dtype of a copy, block size, and its memory accesses: width in bits -> number
COPIES = [
    (torch.float32, 512, {128: 1}),
    (torch.float32, 1024, {128: 2}),
    (torch.uint8, 128, {8: 1}),
    (torch.int16, 256, {32: 1}),
]


@pytest.mark.parametrize("target", targets("sm_86"))
@pytest.mark.parametrize(("dtype", "block", "accesses"), COPIES)
def test_copy_accesses_are_as_wide_as_the_values_of_a_thread(target, dtype, block, accesses):
    counts = count(copy_kernel(target, dtype, block))
    assert counts.path.loads == counts.path.stores == accesses
    assert (counts.loop.instructions, counts.spills, counts.shared_bytes, counts.path.shared) == (
        0,
        0,
        0,
        0,
    )


@pytest.mark.parametrize("target", targets("sm_75", "sm_120"))
def test_a_real_loop_is_found(target):
    x = torch.zeros(64, 4096)
    with imaginary_gpu(target) as launches:
        _row_sums[(64,)](x, x, 4000, BLOCK=512)
    counts = count(launches[0].binary)
    assert (
        set(counts.loop.loads) == {128} and 0 < counts.loop.instructions < counts.path.instructions
    )
    assert counts.path.stores == {32: 1}
    # The sum over the warps comes after the loop.
    assert counts.path.shared > counts.loop.shared == 0
    # Triton's shared memory is dynamic, and the KiB that sm_90 reserves is not counted.
    assert counts.shared_bytes == 0


def test_spills_are_counted():
    x = torch.zeros(4096)
    with imaginary_gpu("sm_86") as launches:
        # 128 values per thread in 64 registers
        _twice_the_sum[(1,)](x, x, BLOCK=4096, num_warps=1, maxnreg=64)
    counts = count(launches[0].binary)
    assert counts.spills > 0 and counts.registers <= 64


# ---- occupancy


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warps"),
    [
        ("sm_86", 32, 0, 128, 48),  # full occupancy
        ("sm_80", 56, 0, 64, 36),  # registers: 65536 / (56 x 32) = 36.6 warps
        ("sm_90", 48, 0, 64, 40),  # 42.7 warps, allocated in groups of four
        ("sm_86", 41, 0, 32, 16),  # 16 blocks of one warp
        ("sm_86", 33, 0, 256, 48),  # 33 -> 40 registers, 51 -> 48 warps
        # shared: 100 KiB / (20000 + 1024 -> 21120) = 4.8 blocks of 4 warps
        ("sm_89", 32, 20000, 128, 16),
        ("sm_75", 32, 16300, 128, 16),  # 64 KiB / (16300 -> 16384) = 4 blocks of 4 warps
        ("sm_75", 64, 256, 64, 32),
        ("sm_120", 255, 0, 1024, 0),  # the registers allow 8 warps, and a block has 32
        ("sm_75", 32, 70000, 32, 0),
    ],
)
def test_occupancy_of_an_sm(target, registers, shared, threads, warps):
    most = {"sm_75": 32, "sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90": 64, "sm_120": 48}[target]
    assert occupancy(target, registers, shared, threads) == warps / most


@pytest.mark.parametrize("target", targets("sm_75", "sm_90"))
@given(st.integers(1, 255), st.integers(0, 99 << 10), st.integers(1, 1024))
def test_occupancy_never_rises_with_larger_demands(target, registers, shared, threads):
    here = occupancy(target, registers, shared, threads)
    assert 0 <= here <= 1
    assert occupancy(target, registers + 8, shared, threads) <= here
    assert occupancy(target, registers, shared + 512, threads) <= here


# ---- errors


def test_input_that_is_not_machine_code_is_refused(tmp_path):
    amd = b"\x7fELF" + bytes(14) + (224).to_bytes(2, "little")
    for binary in (b"", b"#!/bin/sh", amd):
        with pytest.raises(ValueError, match="need a cubin"):
            count(binary)
    with pytest.raises(ValueError, match="cannot read"):
        count(copy_kernel("sm_86", torch.float32, 512)[:1000])
    (tmp_path / "text").write_text("no code")
    assert cubins(tmp_path / "text", "sm_86") == []


def test_a_kernel_is_picked_by_name():
    binary = copy_kernel("sm_86", torch.float32, 512)
    assert list(functions(binary)) == ["_copy"]
    assert count(binary, "^_co") == count(binary)
    with pytest.raises(ValueError, match="'_paste', which fits none"):
        count(binary, "_paste")


def test_a_computed_jump_is_refused():
    with pytest.raises(ValueError, match="fixed addresses"):
        trace(parse(listing("BRX R2 -0x10", "EXIT")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sm_70", 32, 0, 128), "need one of sm_75"),
        (("sm_86", 32, 0, 2048), "1 to 1024"),
        (("sm_86", 32, 0, 0), "1 to"),
    ],
)
def test_values_outside_the_limits_of_an_sm_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        occupancy(*arguments)
