"""A machine that runs PTX on a CPU: to read, step through and check what Triton compiled.

Reading order:

    parse.py            text -> instructions
    numbers.py          number formats and exact rounding
    arithmetic.py       opcode -> numpy function
    conversions.py      cvt
    lanes.py            the threads and their registers
    machine.py          branches, barriers, the loop over instructions
    memory.py           extents, and who used which byte
    access.py           loads and stores
    warp.py             shuffles, votes, matrices
    fragments.py        where the lanes hold the values of a matrix
    wgmma.py            the matrix product of four warps
    findings.py         races, divergent barriers, uninitialised reads
    counts.py           instructions, sectors, lines and bank passes
    from_triton.py      the launches of Triton's kernels

The package needs numpy; from_triton.py imports torch and Triton where it needs them. The library
does not import it.
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
