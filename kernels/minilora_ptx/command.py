"""Command line: run, step through and count minilora's kernels on the PTX machine.

cd kernels
python -m minilora_ptx run                                  every kernel against its reference
python -m minilora_ptx step gated --warp 0 --lanes 0,31     line by line, with values
python -m minilora_ptx count                                a table of counts
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minilora_ptx.counts import Counts
from minilora_ptx.examples import EXAMPLES
from minilora_ptx.from_triton import ptx_machine
from minilora_ptx.lanes import WARP, Lanes
from minilora_ptx.numbers import KINDS, Array, from_bf16
from minilora_ptx.parse import Instruction, Register, Vector


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Arguments, None for those of the process.
    """
    options = _parser().parse_args(arguments)
    options.function(options)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    parser = argparse.ArgumentParser(prog="minilora_ptx", description="Run compiled kernels.")
    commands = parser.add_subparsers(required=True)
    helps = {
        "run": (_run, "run kernels, compare with the reference, print findings"),
        "step": (_step, "print each instruction of a warp with its values"),
        "count": (_count, "print instructions, sectors, lines and bank passes"),
    }
    for name, (function, text) in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("--target", default="sm_86", help="NVIDIA target (default sm_86)")
        if name != "step":
            command.add_argument("kernels", nargs="*", help="names of kernels (default all)")
            continue
        command.add_argument("kernel", choices=EXAMPLES, help="name of the kernel")
        command.add_argument("--warp", type=int, default=0, help="warp of CTA 0 (default 0)")
        command.add_argument("--lanes", default="0,1,31", help="lanes to show (default 0,1,31)")
        command.add_argument("--lines", help="only these lines of the Python file, such as 150-160")
    return parser


def _chosen(options: argparse.Namespace) -> list[str]:
    """Return the kernels to run."""
    unknown = [name for name in options.kernels if name not in EXAMPLES]
    if unknown:
        raise SystemExit(f"no kernel {unknown[0]}: choose from {', '.join(EXAMPLES)}")
    names = options.kernels or [*EXAMPLES]
    if options.target == "sm_75":  # which does not use the product of few tokens
        names = [name for name in names if name != "matmul_nf4"]
    return names


def _run(options: argparse.Namespace) -> None:
    """Run kernels and compare their results with the reference."""
    bad = 0
    for name in _chosen(options):
        with ptx_machine(options.target) as launches:
            results = EXAMPLES[name]()
        wrong = [result.name for result in results if not result.right()]
        findings = [str(f) for launch in launches for f in launch.machine.findings.all()]
        seconds = sum(launch.seconds for launch in launches)
        state = f"WRONG: {', '.join(wrong)}" if wrong else "equals its reference"
        print(f"{name:25} {options.target:7} {state}, {seconds:.2f} s")
        for finding in findings:
            print(f"    {finding}")
        bad += bool(wrong or findings)
    if bad:
        raise SystemExit(1)


# ---- step


def _step(options: argparse.Namespace) -> None:
    """Print the instructions that one warp executes."""
    lanes_shown = [int(lane) for lane in options.lanes.split(",")]
    wrong = [lane for lane in lanes_shown if not 0 <= lane < WARP]
    if wrong:
        raise SystemExit(f"a warp has lanes 0 to 31, got {wrong[0]}")
    first, last = _range(options.lines)
    shown_place = ("", 0)

    def show(lanes: Lanes, instruction: Instruction, executing: Array) -> None:
        nonlocal shown_place
        start = options.warp * WARP
        if lanes.ctas[0] != 0 or not lanes.active[start : start + WARP].any():
            return
        if not first <= instruction.place[1] <= last:
            return
        if instruction.place != shown_place:
            shown_place = instruction.place
            print(f"\n{_python_line(*shown_place)}")
        print(f"    {instruction.text}")
        for lane in lanes_shown:
            text = _effect(lanes, instruction, executing, start + lane)
            if text:
                print(f"        lane {lane:2}  {text}")

    with ptx_machine(options.target, observer=show):
        EXAMPLES[options.kernel]()


def _range(lines: str | None) -> tuple[int, int]:
    """Return the first and the last line of an option such as 150-160."""
    if lines is None:
        return 0, 10**9
    first, _, last = lines.partition("-")
    return int(first), int(last or first)


def _python_line(file: str, number: int) -> str:
    """Return a line of a kernel with its file and number."""
    import triton.language

    import minilora_kernels.triton

    for package in (minilora_kernels.triton, triton.language):
        path = Path(str(package.__file__)).parent / file
        if file and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            return f"{file}:{number}  {lines[number - 1].strip()}"
    return f"{file}:{number}"


def _effect(lanes: Lanes, instruction: Instruction, executing: Array, lane: int) -> str:
    """Return the registers that an instruction wrote in a lane, and the address it used."""
    if not executing[lane]:
        return "does not execute it" if instruction.guard else ""
    parts = []
    space = instruction.opcode.split(".")[1:2]
    addresses = lanes.access.last_addresses
    if instruction.opcode.startswith(("ld.", "st.")) and space != ["param"]:
        number = int(np.flatnonzero(executing).searchsorted(lane))
        if addresses is not None:
            parts.append(f"address {int(addresses[number]):#x}")
    if not instruction.operands or instruction.opcode.startswith(("st.", "bra", "bar")):
        return ", ".join(parts)
    destination = instruction.operands[0]
    items = destination.items if isinstance(destination, Vector) else (destination,)
    for item in items:
        if isinstance(item, Register) and item.name in lanes.registers:
            value = lanes.registers[item.name][lane]
            parts.append(f"{item.name} = {_value(value, instruction.opcode)}")
    return ", ".join(parts)


def _value(value: np.generic, opcode: str) -> str:
    """Return the value of a register as its opcode reads it: a number, or bits."""
    if isinstance(value, np.bool_):
        return str(bool(value))
    parts = opcode.split(".")
    kind = parts[-2] if parts[0] == "cvt" else parts[-1]
    size = np.dtype(KINDS.get(kind, np.uint8)).itemsize
    bits = np.asarray(value)
    if kind == "bf16":
        return f"{float(from_bf16(bits)):.6g}"
    if kind[0] in "fs" and size == bits.itemsize and not kind.endswith("x2"):
        return f"{bits.view(KINDS[kind])[()]:.8g}"
    return f"{int(bits):#x}" if int(bits) > 9 else str(int(bits))


# ---- count


def _count(options: argparse.Namespace) -> None:
    """Print a table of counts."""
    print(f"counts of the examples on {options.target}, sums over all warps")
    heads = ("instructions", "requests", "sectors", "lines", "bytes", "shared", "passes", "cycles")
    print(f"{'kernel':25}" + "".join(f"{head:>13}" for head in heads))
    for name in _chosen(options):
        with ptx_machine(options.target, races=False, counting=True) as launches:
            EXAMPLES[name]()
        for launch in launches[:1]:
            print(f"{name:25}" + "".join(f"{n:13}" for n in _row(launch.machine.counts)))


def _row(counts: Counts) -> list[int]:
    """Return the counts of a launch in the order of the table's columns."""
    memory, shared = counts.total("global"), counts.total("shared")
    return [
        sum(counts.issued.values()),
        memory.requests,
        memory.sectors,
        memory.lines,
        memory.bytes,
        shared.requests,
        shared.passes,
        counts.cycles(),
    ]
