"""Parts of the tests of the PTX machine: short programs by hand, and the cases of the kernels."""

import importlib.util
from collections.abc import Callable
from types import FunctionType, ModuleType

import numpy as np
import pytest

from helpers.source import ROOT
from minilora_ptx import GlobalMemory, Machine, parse

HEAD = """
.version 8.7
.target sm_86
.address_size 64
.visible .entry program(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred %p<10>;
	.reg .b16 %rs<40>;
	.reg .b32 %r<60>;
	.reg .b64 %rd<20>;
	.shared .align 16 .b8 room[{shared}];
"""


def program(body: str, parameters: int = 2, threads: int = 32, shared: int = 256) -> str:
    """Return the PTX of a kernel with pointers p0, p1, ... around these statements."""
    names = ",\n".join(f"\t.param .u64 .ptr .global .align 1 p{i}" for i in range(parameters))
    head = HEAD.format(parameters=names, threads=threads, shared=shared)
    return head + "\n".join(line.strip() for line in body.strip().splitlines()) + "\nret;\n}\n"


def execute(text: str, *arrays: np.ndarray, ctas: int = 1, **options) -> Machine:
    """Run a program on numpy arrays and return the machine."""
    memory = GlobalMemory()
    addresses = [memory.add_array(array) for array in arrays]
    machine = Machine(parse(text), (ctas, 1, 1), **options)
    machine.run(addresses, memory)
    return machine


# Each lane reads a value x[i] into %r1 and y[i] gets %r2 in the end.
START = """
    ld.param.b64 %rd1, [p0];
    ld.param.b64 %rd2, [p1];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.b32 %r1, [%rd4];
"""
FINISH = "st.global.b32 [%rd5], %r2;\n"


def each_lane(body: str, values: np.ndarray, **options) -> tuple[np.ndarray, Machine]:
    """Return what %r2 holds after `body`, which finds values in %r1, and the machine."""
    out = np.zeros(len(values), np.uint32)
    text = program(f"{START}{body}\n{FINISH}", threads=len(values))
    return out, execute(text, values.view(np.uint32), out, **options)


def interpreted_tests(name: str) -> ModuleType:
    """Return a module of tests/gpu/interpreted/, whose functions also hold on the machine."""
    path = ROOT / "tests" / "gpu" / "interpreted" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_on_the_machine", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fast_cases(function: Callable) -> Callable:
    """Return a copy of a test with those of its cases that are not slow."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    marks = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            fast = [v for v in values if not any(m.name == "slow" for m in getattr(v, "marks", ()))]
            mark = pytest.mark.parametrize(names, fast).mark
        marks.append(mark)
    copy.pytestmark = marks
    return copy


def shared_cases(cases: dict[str, list[str]]) -> dict[str, Callable]:
    """Return the tests with these names, by module of tests/gpu/interpreted/."""
    found = {}
    for module_name, names in cases.items():
        module = interpreted_tests(module_name)
        found |= {name: fast_cases(getattr(module, name)) for name in names}
    return found


def without(text: str, number: int, opcode: str = "bar.sync") -> str:
    """Return PTX without its instruction `number` of an opcode."""
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if line.split()[:1] == [opcode]]
    del lines[places[number]]
    return "\n".join(lines)


Alter = Callable[[str], str]
