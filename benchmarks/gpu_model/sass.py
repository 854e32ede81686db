"""Counts of NVIDIA machine code (SASS) with the compiler and the disassembler, without a GPU.

    with imaginary_gpu("sm_86") as launches:
        kernel[grid](...)
    counts = count(launches[0].binary)
    # 58 instructions, {32: 4} (four 32-bit loads), 32 registers
    counts.path.instructions, counts.path.loads, counts.registers
    occupancy("sm_86", counts.registers, launches[0].metadata.shared, threads=128)      # 1.0

A count is not a time. It is the number of instructions that one thread with full work issues: the
longest path from the entry to an EXIT, with each loop once and each EXIT under a predicate not
taken. An instruction that its predicate switches off still takes its issue slot and is counted.
CALLed helpers and the slow side of BRA.DIV (which a warp runs when its threads disagree) are not
followed, so a kernel that diverges runs more instructions than the count. The disassembler,
cuobjdump, comes with triton's wheel (Linux); no CUDA toolkit is needed.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: `/*0070*/ @P0 LDG.E.128 R4, [R2.64] ;`"""

    address: int
    predicate: str  # "" or "@P0", "@!UP1"
    opcode: str  # with modifiers, "LDG.E.128"
    kind: str  # without modifiers, "LDG"
    operands: str


@dataclass(frozen=True)
class Tally:
    """Totals of some instructions, for one thread."""

    instructions: int
    loads: dict[int, int]  # of global memory: bits of one access -> how many
    stores: dict[int, int]  # the same for stores
    shared: int  # loads, stores and atomics of shared memory
    # alu, fma, xu: instructions; lsu: passes (2 for a 64-bit access, 4 for a 128-bit access)
    pipes: dict[str, int]


@dataclass(frozen=True)
class Counts:
    """Result of `count` for one kernel."""

    path: Tally  # the longest path through the kernel, loop bodies once
    loop: Tally  # the instructions of the path inside loops; all zero without a loop
    spills: int  # loads and stores of local memory, anywhere in the kernel
    registers: int  # per thread
    shared_bytes: int  # static; Triton's is dynamic: launch.metadata.shared


def count(binary: bytes, name: str = "", through: str | None = None) -> Counts:
    """Return the counts of the one kernel in a cubin whose mangled name matches the regex `name`.

    `through` is a regex on opcodes. With it the counted path is the one with most matches, and the
    shortest of these. "LDG.*128" follows the fast side of a branch, where the longest path would
    follow the slow side. Raises ValueError if `binary` is not a cubin, if not exactly one kernel
    matches, or if a jump has no fixed address.
    """
    uses = functions(binary)
    fitting = {function: use for function, use in uses.items() if re.search(name, function)}
    if len(fitting) != 1:
        raise ValueError(
            f"need a name that fits one kernel, got {name!r}, "
            f"which fits {sorted(fitting) or 'none'}"
        )
    ((function, (registers, static)),) = fitting.items()
    text = _cuobjdump(binary, "-sass", "-fun", function)
    if int(re.findall(r"code for sm_(\d+)", text)[0]) >= 90:
        static -= min(static, _RESERVED)
    code = parse(text)
    path, loop = trace(code, through)
    spills = sum(i.kind in ("LDL", "STL") for i in code)
    return Counts(tally(path), tally(loop), spills, registers, static)


def functions(binary: bytes) -> dict[str, tuple[int, int]]:
    """Return (registers per thread, bytes of static shared memory) of each kernel in a cubin.

    The keys are mangled names. From sm_90 on, cuobjdump includes the KiB that the driver reserves.
    Raises ValueError for other files.
    """
    machine = int.from_bytes(binary[18:20], "little")
    if binary[:4] != b"\x7fELF" or machine != 190:
        raise ValueError(
            "need a cubin (ELF, machine 190), got a file that starts with "
            f"{binary[:4]!r}, {machine=}"
        )
    usage = re.finditer(
        r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", _cuobjdump(binary, "-res-usage")
    )
    return {use[1]: (int(use[2]), int(use[3])) for use in usage}


def cubins(path: Path, target: str) -> list[bytes]:
    """Return the machine code for `target` ("sm_86") in a library or program; empty without any."""
    with tempfile.TemporaryDirectory() as folder:
        # cuobjdump extracts the files whose name contains this text (without the full stop also
        # those of sm_90a), and fails if there are none.
        subprocess.run(
            [CUOBJDUMP, "-xelf", f"{target}.", path.resolve()], cwd=folder, capture_output=True
        )
        return [file.read_bytes() for file in sorted(Path(folder).iterdir())]


def _cuobjdump(binary: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([CUOBJDUMP, *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"cuobjdump {' '.join(options)} cannot read this machine code: {done.stderr.strip()}"
        )
    return done.stdout


# Some versions append hints of the scheduler: `BRA 0x770  &req={3,1,0}  ?trans6 ;`
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?\w+)\s+)?(([A-Z]\w*)[\w.]*)\s*([^;&?]*)[^;]*;", re.MULTILINE
)


def parse(text: str) -> list[Instruction]:
    """Return the instructions of one kernel from the output of `cuobjdump -sass`."""
    return [Instruction(int(address, 16), *rest) for address, *rest in _LINE.findall(text)]


def trace(
    code: list[Instruction], through: str | None = None
) -> tuple[list[Instruction], list[Instruction]]:
    """Return the path through a kernel, and its instructions inside loops.

    Both are in the order of execution, with each instruction once.
    """
    at = {instruction.address: n for n, instruction in enumerate(code)}
    onward = []
    for n in range(len(code)):
        onward.append([after for after in _onward(code, at, n) if after < len(code)])
    loops = _loops(onward)
    order, _ = _depth_first(_one_trip(onward, loops))

    # (matches, length) of the path from an instruction to the end; more is better
    best: dict[int, tuple[int, int]] = {}
    following: dict[int, int] = {}
    for n in order:
        ways = [after for after in onward[n] if after in best]
        if ways:
            following[n] = max(ways, key=lambda way: (best[way], way))
        elif onward[n] or code[n].kind == "RET":
            continue  # only a helper follows
        matches, length = best[following[n]] if ways else (0, 0)
        match = through is not None and re.search(through, code[n].opcode) is not None
        best[n] = (matches + match, length + (1 if through is None else -1))
    path = [0] if 0 in best else []
    while path and path[-1] in following:
        path.append(following[path[-1]])
    looped = set[int]().union(*loops.values())
    return [code[n] for n in path], [code[n] for n in path if n in looped]


def _onward(code: list[Instruction], at: dict[int, int], n: int) -> list[int]:
    """Return the instructions that may follow instruction n."""
    i = code[n]
    always = i.predicate in ("", "@PT", "@UPT")
    if i.kind in ("EXIT", "RET", "KILL"):
        return [] if always else [n + 1]
    if i.kind in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(
            f"need jumps to fixed addresses, got {i}: the path through this kernel is unknown"
        )
    if i.kind in ("BRA", "JMP") and ".DIV" not in i.opcode or i.opcode.startswith("CALL.REL"):
        # BRA.U !UP0, 0x1f0 has its condition as an operand. The assembler also leaves loops by a
        # CALL that never returns. Both ways of a CALL are tried; one into a helper ends in RET and
        # not at the end of the kernel.
        always = always and "," not in i.operands and i.kind != "CALL"
        target = at[int(i.operands.rpartition("0x")[2], 16)]
        return [target] if always else [target, n + 1]
    return [n + 1]


def _depth_first(onward: list[list[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """Return the nodes reached from node 0, each after its successors, and the edges of loops."""
    order, closing = list[int](), set[tuple[int, int]]()
    is_open = dict[int, bool]()
    todo = [0] if onward else []
    while todo:
        node = todo[-1]
        if node not in is_open:
            is_open[node] = True
            closing |= {(node, after) for after in onward[node] if is_open.get(after)}
            todo += [after for after in onward[node] if after not in is_open]
        elif is_open[todo.pop()]:
            is_open[node] = False
            order.append(node)
    return order, closing


def _loops(onward: list[list[int]]) -> dict[int, set[int]]:
    """Map the head of each loop to its body.

    The body is the head and the nodes that lead back to the head without passing it.
    """
    order, closing = _depth_first(onward)
    before = defaultdict(list)
    for n in order:
        for after in onward[n]:
            before[after].append(n)
    bodies = dict[int, set[int]]()
    for tail, head in closing:
        body = bodies.setdefault(head, {head})
        todo = [tail]
        while todo:
            n = todo.pop()
            if n not in body:
                body.add(n)
                todo += before[n]
    return bodies


def _one_trip(onward: list[list[int]], loops: dict[int, set[int]]) -> list[list[int]]:
    """Change `onward` so that every loop ends after one whole trip; return it.

    Instructions that jump back to the head lead to the exits of the loop instead. The other
    instructions of the loop cannot leave it.
    """
    exits = {
        head: [after for n in body for after in onward[n] if after not in body]
        for head, body in loops.items()
    }
    for head, body in sorted(loops.items(), key=lambda loop: len(loop[1])):  # inner loops first
        for n in body:
            if head in onward[n]:
                onward[n] = [after for after in onward[n] if after != head] + exits[head]
            else:
                onward[n] = [after for after in onward[n] if after in body]
    return onward


_LSU = re.compile(r"LD[GSL]?|LDGSTS|LDSM|ST[GSL]?|STSM|ATOM[GS]?|REDG?|SHFL")
_FMA = re.compile(r"[FH](FMA|MUL|ADD)2?|IMAD|IDP")
_XU = re.compile(r"MUFU|F2[FI]|I2F|FRND|POPC|FLO|BREV|FCHK")
# control, constants, special registers, tensor cores and the uniform pipe (one a warp)
_NO_LANES = re.compile(
    r"U\w+|BRA|EXIT|BSSY|BSYNC|BREAK|RET|CALL|JMP|KILL|NOP|YIELD|WARPSYNC|BAR|MEMBAR|ERRBAR"
    r"|DEPBAR|LDGDEPBAR|NANOSLEEP|CCTL|ACQBULK|PREEXIT|SYNCS|BMOV|LEPC|VOTE"
    r"|LDCU?|C?S2U?R|R2UR|\w*MMA|MOVM"
)


def tally(code: list[Instruction]) -> Tally:
    """Return totals of instructions. The opcode gives the pipe; opcodes in no list are ALU work."""
    pipes: dict[str, int] = dict.fromkeys(("alu", "fma", "lsu", "xu"), 0)
    for i in code:
        if _LSU.fullmatch(i.kind):
            pipes["lsu"] += max(1, bits(i.opcode) // 32)
        elif _NO_LANES.fullmatch(i.kind):
            continue
        elif _FMA.fullmatch(i.kind):
            pipes["fma"] += 1
        elif _XU.fullmatch(i.kind):
            pipes["xu"] += 1
        else:
            pipes["alu"] += 1
    loads = Counter(bits(i.opcode) for i in code if i.kind in ("LDG", "LD", "LDGSTS"))
    stores = Counter(bits(i.opcode) for i in code if i.kind in ("STG", "ST"))
    shared = sum(i.kind in ("LDS", "STS", "LDSM", "STSM", "ATOMS") for i in code)
    return Tally(len(code), dict(loads), dict(stores), shared, pipes)


def bits(opcode: str) -> int:
    """Return the width of one thread's memory access: STG.E.U8 -> 8, LDG.E.128 -> 128.

    The width is 32 without a modifier for it.
    """
    kind, *modifiers = opcode.split(".")
    if kind in ("LDSM", "STSM"):
        # The modifier is the number of matrices for the warp; each has 32 bits a thread.
        return 32 * int(modifiers[-1]) if modifiers[-1] in "24" else 32
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[modifier] for modifier in reversed(modifiers) if modifier in widths), 32)


# Warps, blocks and bytes of shared memory that one SM holds: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability". All have 65536 registers an SM. The units of allocation
# come from the CUDA Occupancy Calculator: registers by 256 a warp, to four warps at a time; shared
# memory by 128 bytes, 256 on sm_75, and 1 KiB a block for the driver from sm_80 on.
SM_LIMITS = {
    "sm_75": (32, 16, 64 << 10),
    "sm_80": (64, 32, 164 << 10),
    "sm_86": (48, 16, 100 << 10),
    "sm_89": (48, 24, 100 << 10),
    "sm_90": (64, 32, 228 << 10),
    "sm_120": (48, 24, 100 << 10),
}
_RESERVED = 1 << 10


def occupancy(target: str, registers: int, shared_bytes: int, threads: int) -> float:
    """Return the warps that fit on an SM as a share (0 to 1) of its maximum; 0.0: no block fits.

    `registers` are those of a thread, `shared_bytes` (static + dynamic) and `threads` those of a
    block. Raises ValueError if `target` is not in SM_LIMITS or a block cannot have so many threads.
    """
    if target not in SM_LIMITS:
        raise ValueError(f"need one of {', '.join(SM_LIMITS)}, got {target!r}")
    if not 1 <= threads <= 1024:
        raise ValueError(f"need 1 to 1024 threads in a block, got {threads}")
    max_warps, max_blocks, max_shared = SM_LIMITS[target]
    warps = math.ceil(threads / 32)
    registers_of_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    warps_by_registers = 65536 // registers_of_warp // 4 * 4
    unit, reserved = (256, 0) if target == "sm_75" else (128, _RESERVED)
    shared = math.ceil((shared_bytes + reserved) / unit) * unit
    by_shared = max_shared // shared if shared else max_blocks
    blocks = min(max_blocks, max_warps // warps, warps_by_registers // warps, by_shared)
    return blocks * warps / max_warps
