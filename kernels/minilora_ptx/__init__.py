"""A machine that runs PTX on a CPU: to read, step through and check what Triton compiled.

Reading order:

    parse.py         text -> instructions
    numbers.py       number formats and exact rounding
    instructions/    opcode -> numpy function; shuffles and matrices
    lanes.py         the threads and their registers
    machine.py       branches, barriers, the loop over instructions
    memory.py        extents, and who used which byte
    access.py        loads and stores
    findings.py      races, divergent barriers, uninitialised reads
    counts.py        instructions, sectors, lines and bank passes
    from_triton.py   the launches of Triton's kernels
    examples.py      one launch of each kernel of minilora, with the result of its reference
    command.py       python -m minilora_ptx run, step, count

The machine needs numpy; from_triton.py imports Triton where it needs it. The library does not
import this package, and the wheel does not contain it.
"""

from minilora_ptx.findings import Fault, Finding
from minilora_ptx.from_triton import Launch, ptx_machine
from minilora_ptx.machine import Machine
from minilora_ptx.memory import GlobalMemory
from minilora_ptx.parse import Kernel, PTXError, parse

__all__ = [
    "Fault",
    "Finding",
    "GlobalMemory",
    "Kernel",
    "Launch",
    "Machine",
    "PTXError",
    "parse",
    "ptx_machine",
]
