"""Tests of the machine on short PTX programs: results that are right, and faults that are found."""

import numpy as np
import pytest

from helpers.ptx import FINISH, START, each_lane, execute, program
from minilora_ptx import Fault, PTXError, parse

LANES = np.arange(32, dtype=np.uint32)


def kinds(machine) -> set[str]:
    return machine.findings.kinds()


# ---- parsing


def test_an_unknown_opcode_is_named_with_its_line():
    with pytest.raises(PTXError, match=r"opcode brev.b32 is not known: PTX line \d+: brev.b32 %r2"):
        each_lane("brev.b32 %r2, %r1;", LANES)


@pytest.mark.parametrize(
    "line", ["add.s32 %q1, %r1, 1;", "add.s32 %r2, %r40, %r1;", "bra $nowhere;", "add.s32 %r2;"]
)
def test_a_wrong_statement_is_an_error(line):
    with pytest.raises(PTXError):
        each_lane(line, LANES)


def test_a_line_that_is_not_ptx_is_an_error():
    with pytest.raises(PTXError, match=r"line \d+ is not understood: x = y"):
        parse(program("\n\nx = y + z"))


def test_parse_reads_names_operands_and_places():
    text = program(".loc 1 12 3\n@!%p1 ld.global.v2.b32 { %r1, _ }, [ %rd1 + -16 ];\n")
    kernel = parse(text + '.file 1 "folder/kernel.py"\n')
    load = kernel.instructions[0]
    assert (load.opcode, load.guard, load.wanted) == ("ld.global.v2.b32", "%p1", False)
    assert load.place == ("kernel.py", 12) and load.operands[1].offset == -16
    assert load.operands[0].items[1] is None
    assert kernel.threads == 32 and kernel.parameters[1] == ("p1", 64)
    assert kernel.shared == {"room": 0} and kernel.shared_bytes == 256


# ---- control flow


def test_lanes_that_part_meet_again():
    body = """
        setp.lt.u32 %p1, %r1, 10;
        mov.b32 %r2, 1;
        @%p1 bra $L1;
        mov.b32 %r2, 2;
        bra.uni $L2;
        $L1:
        add.s32 %r2, %r2, 6;
        $L2:
        add.s32 %r2, %r2, 100;
    """
    out, machine = each_lane(body, LANES)
    assert (out == np.where(LANES < 10, 107, 102)).all()
    # the last addition is issued once for the warp, not once for each branch
    last = next(i for i in machine.kernel.instructions if i.text.endswith("100;"))
    assert machine.counts.issued[last.number] == 1


def test_each_lane_leaves_a_loop_after_its_own_number_of_trips():
    body = """
        mov.b32 %r2, 0;
        mov.b32 %r3, %r1;
        $L1:
        setp.eq.b32 %p1, %r3, 0;
        @%p1 bra $L2;
        add.s32 %r2, %r2, %r3;
        sub.s32 %r3, %r3, 1;
        bra.uni $L1;
        $L2:
    """
    assert (each_lane(body, LANES)[0] == LANES * (LANES + 1) // 2).all()


# ---- shared memory, barriers and races


SWAP = """
    mov.b32 %r3, room;
    shl.b32 %r4, %r0, 2;
    add.s32 %r5, %r3, %r4;
    st.shared.b32 [%r5], %r1;
    bar.sync 0;
    xor.b32 %r6, %r4, {mask};
    add.s32 %r7, %r3, %r6;
    ld.shared.b32 %r2, [%r7];
"""


def test_threads_exchange_values_through_shared_memory():
    values = np.arange(64, dtype=np.uint32)
    out, machine = each_lane(SWAP.format(mask=128), values)
    assert (out == values ^ 32).all() and not machine.findings.all()


@pytest.mark.parametrize("mask, kind", [(128, "race between warps"), (4, "race within a warp")])
def test_a_missing_barrier_is_a_race(mask, kind):
    body = SWAP.format(mask=mask).replace("bar.sync 0;", "")
    _, machine = each_lane(body, np.arange(64, dtype=np.uint32))
    assert kinds(machine) == {kind}
    assert "ld.shared.b32" in str(machine.findings.all()[0])


def test_a_warp_barrier_orders_the_lanes_of_a_warp_and_no_others():
    values = np.arange(64, dtype=np.uint32)
    for mask, expected in ((4, set()), (128, {"race between warps"})):
        body = SWAP.format(mask=mask).replace("bar.sync 0", "bar.warp.sync -1")
        assert kinds(each_lane(body, values)[1]) == expected


def test_two_lanes_that_write_different_values_to_one_place_are_a_race():
    body = "mov.b32 %r2, 0;\nst.shared.b32 [room], {value};"
    assert kinds(each_lane(body.format(value="%r1"), LANES)[1]) == {"race within a warp"}
    assert not kinds(each_lane(body.format(value="7"), LANES)[1])


def test_a_write_after_a_read_without_a_barrier_is_a_race():
    body = SWAP.format(mask=128) + "add.s32 %r8, %r1, 1;\nst.shared.b32 [%r5], %r8;"
    values = np.arange(64, dtype=np.uint32)
    assert kinds(each_lane(body, values)[1]) == {"race between warps"}
    fixed = body.replace("add.s32 %r8", "bar.sync 0;\nadd.s32 %r8")
    assert not kinds(each_lane(fixed, values)[1])


def test_two_ctas_that_write_one_place_are_a_race():
    out = np.zeros(32, np.uint32)
    body = "ld.param.b64 %rd1, [p0];\nmov.u32 %r1, %ctaid.x;\nst.global.b32 [%rd1], %r1;"
    assert kinds(execute(program(body, 1), out, ctas=2)) == {"race between warps"}
    assert not kinds(execute(program(body, 1), out, ctas=1))


def test_a_barrier_that_some_lanes_of_a_warp_skip_is_found():
    body = """
        mov.b32 %r2, 0;
        setp.lt.u32 %p1, %r1, 10;
        @%p1 bra $L1;
        bar.sync 0;
        $L1:
        bar.sync 0;
    """
    assert kinds(each_lane(body, LANES)[1]) == {"divergent barrier"}


def test_a_barrier_after_some_threads_ended_is_found():
    body = "mov.b32 %r2, 0;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;"
    assert kinds(each_lane(body, np.arange(64, dtype=np.uint32))[1]) == {"divergent barrier"}


def test_a_read_of_shared_memory_before_it_is_written_is_found():
    assert kinds(each_lane("ld.shared.b32 %r2, [room+16];", LANES)[1]) == {"uninitialised read"}


def test_a_shuffle_from_a_lane_that_is_not_there_is_found():
    body = """
        mov.b32 %r2, 0;
        setp.lt.u32 %p1, %r1, 4;
        @%p1 shfl.sync.idx.b32 %r2, %r1, 20, 31, 15;
    """
    assert kinds(each_lane(body, LANES)[1]) == {"inactive lane"}


# ---- faults


@pytest.mark.parametrize(
    "statement, words",
    [
        ("ld.global.b32 %r2, [%rd4+4];", "out of bounds: CTA 0, warp 0, lane 31"),
        ("ld.global.b32 %r2, [%rd1+-4];", "out of bounds: CTA 0, warp 0, lane 0"),
        ("ld.global.b32 %r2, [%rd4+2];", "misaligned: .* needs a multiple of 4"),
        ("ld.shared.b32 %r2, [room+256];", "shared memory has 256 bytes"),
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [room+8];", "misaligned"),
        ("ld.global.b32 %r2, [0];", "out of bounds"),
    ],
)
def test_a_wrong_access_stops_the_machine(statement, words):
    with pytest.raises(Fault, match=words):
        each_lane(statement, LANES)


def test_a_guard_protects_the_lanes_that_would_be_out_of_bounds():
    body = "mov.b32 %r2, 5;\nsetp.lt.u32 %p1, %r0, 31;\n@%p1 ld.global.b32 %r2, [%rd4+4];"
    out, _ = each_lane(body, LANES)
    assert (out == np.append(LANES[1:], 5)).all()


# ---- warps


@pytest.mark.parametrize(
    "mode, b, c, source",
    [
        ("bfly", 5, 31, LANES ^ 5),
        ("idx", 7, 31, LANES * 0 + 7),
        ("idx", 3, 0x181F, LANES // 8 * 8 + 3),  # segments of 8 lanes
        ("up", 4, 0, np.where(LANES < 4, LANES, LANES - 4)),
        ("down", 4, 31, np.where(LANES > 27, LANES, LANES + 4)),
        ("up", 1, 0x1800, np.where(LANES % 8 == 0, LANES, LANES - 1)),
    ],
)
def test_shuffle_takes_the_value_of_the_right_lane(mode, b, c, source):
    values = LANES * 3 + 1
    out, machine = each_lane(f"shfl.sync.{mode}.b32 %r2, %r1, {b}, {c}, -1;", values)
    assert (out == values[source]).all() and not machine.findings.all()


def test_votes_and_reductions_of_a_warp():
    values = np.array([5, 2, -9, 14] * 8, np.int32)
    out, _ = each_lane("redux.sync.max.s32 %r2, %r1, -1;", values)
    assert (out == 14).all()
    body = "setp.gt.s32 %p1, %r1, 3;\nvote.sync.ballot.b32 %r2, %p1, -1;"
    assert (each_lane(body, values)[0] == 0x99999999).all()


def test_ldmatrix_spreads_rows_over_lanes_and_stmatrix_collects_them():
    values = np.arange(64, dtype=np.uint16).view(np.uint32)  # 8 x 8: the value is 8 row + column
    body = """
        mov.b32 %r3, room;
        shl.b32 %r4, %r0, 2;
        add.s32 %r5, %r3, %r4;
        st.shared.b32 [%r5], %r1;
        bar.sync 0;
        and.b32 %r6, %r0, 7;
        shl.b32 %r6, %r6, 4;
        add.s32 %r7, %r3, %r6;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r2}}, [%r7];
    """
    row, column = LANES // 4, LANES % 4 * 2
    out, _ = each_lane(body.format(trans=""), values)
    assert (out == (8 * row + column + ((8 * row + column + 1) << 16))).all()
    out, _ = each_lane(body.format(trans=".trans"), values)
    assert (out == (8 * column + row + ((8 * (column + 1) + row) << 16))).all()


# ---- counts


@pytest.mark.parametrize(
    "stride, sectors, passes", [(4, 4, 1), (8, 8, 2), (128, 32, 32), (0, 1, 1)]
)
def test_counts_of_sectors_and_bank_passes(stride, sectors, passes):
    body = f"""
        mul.wide.u32 %rd6, %r0, {stride};
        add.s64 %rd7, %rd1, %rd6;
        ld.global.b32 %r2, [%rd7];
        mul.lo.s32 %r3, %r0, {stride};
        st.shared.b32 [%r3], 7;
    """
    memory = np.zeros(1056, np.uint32)
    out = np.zeros(32, np.uint32)
    text = program(START + body + FINISH, shared=4096)
    counts = execute(text, memory[-memory.ctypes.data % 128 // 4 :], out, counting=True).counts
    load = next(n for n, r in counts.requests.items() if r.sectors and n > 6)
    assert counts.requests[load].sectors == sectors
    assert counts.total("shared").passes == passes


@pytest.mark.parametrize(
    ("width", "stride", "cycles"),
    [("b32", 4, 1), ("b32", 128, 32), ("b32", 0, 1), ("v4.b32", 16, 4), ("v4.b32", 64, 16),
     ("v4.b32", 0, 4)],
)  # fmt: skip
def test_cycles_of_a_request_are_its_lines_or_its_registers(width, stride, cycles):
    """A line a cycle, and 128 bytes of registers a cycle even if all lanes read one address."""
    target = "{%r2, %r3, %r4, %r5}" if width.startswith("v4") else "%r2"
    body = f"""
        mul.wide.u32 %rd6, %r0, {stride};
        add.s64 %rd7, %rd1, %rd6;
        ld.global.{width} {target}, [%rd7];
        shfl.sync.bfly.b32 %r6, %r2, 1, 31, -1;
    """
    memory = np.zeros(1040, np.uint32)
    memory = memory[-memory.ctypes.data % 16 // 4 :]
    text = program(START + body + FINISH)
    counts = execute(text, memory, np.zeros(32, np.uint32), counting=True).counts
    # the first load, the store and the shuffle take a cycle each
    assert counts.cycles() == cycles + 3


def test_lines_are_counted_from_the_beginning_of_an_allocation():
    """numpy aligns to 16 bytes only; a GPU aligns allocations to 256."""
    room = np.zeros(256, np.uint32)
    found = set()
    for start in range(0, 64, 4):
        x, y = room[start : start + 32], np.zeros(32, np.uint32)
        counts = execute(program(START + FINISH.replace("%r2", "%r1")), x, y, counting=True).counts
        found.add(counts.total("global").lines)
    assert found == {2}
