"""Parser of PTX text: one kernel, its registers, its parameters and its list of instructions.

PTX (PTX ISA manual, chapter 4) has one statement a line in the text that Triton's compiler writes:

    .reg .b32 %r<203>;                                  203 registers of 32 bits, %r0 to %r202
    .loc 1 150 31                                       what follows comes from line 150 of file 1
    $L__BB0_2:                                          a label, the target of branches
    @%p1 ld.global.b32 { %r2 }, [ %rd2 + 0 ];           a guard, an opcode and its operands

A guard `@%p1` means: only lanes where the predicate %p1 is true execute the instruction.
"""

import re
from dataclasses import dataclass, field

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


class PTXError(Exception):
    """A PTX program that is wrong, or that uses what the machine does not know."""


@dataclass(frozen=True)
class Register:
    """A register such as %r1, or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: its bits, as an integer that may be negative."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """The name of a variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """A memory operand [base + offset]."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """Several operands in braces; `None` stands for `_`, a result that nobody needs."""

    items: tuple["Register | Immediate | Symbol | None", ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        number: Position in the kernel's list.
        text: The statement as written, without comment.
        opcode: Opcode with all its modifiers, such as "ld.global.v4.b32".
        operands: Operands in their order; the destination is the first.
        guard: Predicate register of the guard, or "" without a guard.
        wanted: Value of the guard for which a lane executes the instruction.
        place: Python file and line from which it was compiled, ("", 0) if unknown.
        line: Line of the PTX text, from 1 on.
    """

    number: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: str
    wanted: bool
    place: tuple[str, int]
    line: int

    def where(self) -> str:
        """Return the PTX line, and the Python line if it is known, as text for messages."""
        python = f" ({self.place[0]}:{self.place[1]})" if self.place[0] else ""
        return f"PTX line {self.line}: {self.text}{python}"


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        name: Name of the entry.
        target: Target of the text, such as "sm_90a".
        parameters: Name and bits of each parameter, in order.
        threads: Threads of a CTA that .reqntid or .maxntid states, 0 if neither does.
        registers: Name of a family without its number ("%rd") and the bits of its registers.
        instructions: All instructions.
        labels: Label and the position of the instruction that follows it.
        shared: Name and address of each variable in shared memory.
        shared_bytes: Bytes of the variables whose size the text states.
    """

    name: str = ""
    target: str = ""
    parameters: list[tuple[str, int]] = field(default_factory=list)
    threads: int = 0
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0

    def bits(self, register: str) -> int:
        """Return the bits of a register.

        Args:
            register: Name of the register, such as "%rd12".

        Raises:
            PTXError: If no .reg statement declares it.
        """
        family = register.rstrip("0123456789")
        if family not in self.registers:
            raise PTXError(f"no .reg statement declares {register}: found {[*self.registers]}")
        return self.registers[family]


LABEL = re.compile(r"^([\w$]+):$")
LOCATION = re.compile(r"^\.loc\s+(\d+)\s+(\d+)")
FILE = re.compile(r'^\.file\s+(\d+)\s+"([^"]+)"')
ENTRY = re.compile(r"\.entry\s+([\w$]+)")
PARAMETER = re.compile(r"^\.param\s+\.[a-z](\d+)\s.*?([\w$]+),?$")
FAMILY = re.compile(r"^\.reg\s+\.(\w+)\s+(%\w+?)<\d+>;$")
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b(\d+)\s+([\w$]+)(?:\[(\d*)\])?;")
STATEMENT = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);$")
OPENING_ADDRESS = re.compile(r"^\[\s*([%\w$.-]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


def parse(text: str) -> Kernel:
    """Parse the text of one kernel.

    Args:
        text: PTX with one .entry and one statement a line.

    Returns:
        The kernel.

    Raises:
        PTXError: If a line is not understood.
    """
    kernel = Kernel()
    files: dict[str, str] = {}
    place = ("0", 0)
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("//")[0].strip()
        if line.startswith(".section"):  # debug information, to the end of the text
            break
        if match := LOCATION.match(line):
            place = (match[1], int(match[2]))
        elif match := LABEL.match(line):
            kernel.labels[match[1]] = len(kernel.instructions)
        elif line.startswith(".") or line in ("", "{", "}", "(", ")"):
            _directive(kernel, line)
        else:
            kernel.instructions.append(_statement(line, number, len(kernel.instructions), place))
    for line in text.splitlines():
        if match := FILE.match(line.strip()):
            files[match[1]] = match[2].rpartition("/")[2]
    for instruction in kernel.instructions:
        file, python_line = instruction.place
        instruction.place = (files.get(file, ""), python_line)
    if not kernel.instructions:
        raise PTXError("the text has no instruction: expected the PTX of one kernel")
    return kernel


def _directive(kernel: Kernel, line: str) -> None:
    """Store what a line that begins with a point declares."""
    if match := ENTRY.search(line):
        if kernel.name:
            raise PTXError(f"the text has two entries, {kernel.name} and {match[1]}: give one")
        kernel.name = match[1]
    elif match := PARAMETER.match(line):
        kernel.parameters.append((match[2], int(match[1])))
    elif match := FAMILY.match(line):
        kernel.registers[match[2]] = BITS[match[1]]
    elif match := SHARED.search(line):
        alignment = int(match[1] or 1)
        kernel.shared_bytes = -(-kernel.shared_bytes // alignment) * alignment
        kernel.shared[match[3]] = kernel.shared_bytes
        kernel.shared_bytes += int(match[4] or 0) * int(match[2]) // 8
    elif line.startswith((".reqntid", ".maxntid")):
        sizes = re.findall(r"\d+", line)
        kernel.threads = 1
        for size in sizes:
            kernel.threads *= int(size)
    elif line.startswith(".target"):
        kernel.target = line.split()[1].rstrip(",")


def _statement(line: str, number: int, position: int, place: tuple[str, int]) -> Instruction:
    """Return the instruction of one line."""
    match = STATEMENT.match(line)
    if not match:
        raise PTXError(f"PTX line {number} is not understood: {line}")
    operands = tuple(_operand(item) for item in _split(match[4]))
    return Instruction(
        number=position,
        text=" ".join(line.split()),
        opcode=match[3],
        operands=operands,
        guard=match[2] or "",
        wanted=not match[1],
        place=place,
        line=number,
    )


def _split(text: str) -> list[str]:
    """Split operands at the commas outside of braces."""
    items = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [item.strip() for item in items if item.strip()]


def _operand(text: str) -> Operand:
    """Return one operand."""
    if text.startswith("{"):
        return Vector(tuple(_plain_or_none(item) for item in text.strip("{} ").split(",")))
    if "|" in text:  # shfl.sync writes a value and a predicate
        return Vector(tuple(_plain_or_none(item) for item in text.split("|")))
    if match := OPENING_ADDRESS.match(text):
        return Address(_plain(match[1]), int(match[2] or "0", 0))
    return _plain(text)


def _plain_or_none(text: str) -> Register | Immediate | Symbol | None:
    """Return an operand of a vector."""
    text = text.strip()
    return None if text == "_" else _plain(text)


def _plain(text: str) -> Register | Immediate | Symbol:
    """Return a register, a constant or a name."""
    if text.startswith("%"):
        return Register(text)
    if re.match(r"^0[fd][0-9A-Fa-f]+$", text):  # the bits of a float (manual, section 4.5.2)
        return Immediate(int(text[2:], 16))
    if re.match(r"^-?(0x[0-9A-Fa-f]+|\d+)U?$", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
