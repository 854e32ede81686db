"""Tests of the package's own examples: one launch of each of the 16 kernels, and its mutants.

A mutant is the PTX with one fault: a barrier removed, a comparison that lets one more value through,
or another value for the lanes outside of a mask. The machine must find each of them.
"""

import re

import pytest

from helpers.ptx import without
from minilora_kernels.triton import launch
from minilora_ptx import PTXError, ptx_machine
from minilora_ptx.examples import EXAMPLES

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="Triton interprets its kernels here")

OTHER_TARGETS = [pytest.param(t, marks=pytest.mark.slow) for t in ("sm_75", "sm_90", "sm_120")]
# Barriers of each kernel on sm_86, of which some may be missing without an effect: before a table is
# written again with the same values (gemv_nf4), and before a store whose bytes keep their values or
# are not read (adamw_8bit).
BARRIERS = {
    "dequantize_nf4": (1, ()),
    "quantize_nf4": (3, ()),
    "quantize_nf4_textbook": (1, ()),
    "double_quantize_nf4": (1, ()),
    "gemv_nf4": (7, (0, 2)),
    "gemv_nf4_textbook": (2, ()),
    "matmul_nf4": (11, ()),
    "cross_entropy": (5, ()),
    "adamw_8bit": (25, (10, 15)),
    "rms_norm": (6, ()),
    "rms_norm_backward": (4, ()),
    "rms_norm_weight": (4, ()),
}


def run(name: str, target: str = "sm_86", alter=None) -> tuple[list[str], list]:
    """Return what is wrong with a run of an example, as text, and its launches."""
    try:
        with ptx_machine(target, alter=alter) as launches:
            results = EXAMPLES[name]()
    except PTXError as error:
        return [str(error)], []
    wrong = [f"{result.name} is wrong" for result in results if not result.right()]
    found = [str(finding) for each in launches for finding in each.machine.findings.all()]
    return wrong + found, launches


@pytest.mark.parametrize("target", ["sm_86", *OTHER_TARGETS])
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_kernel_has_the_result_of_its_reference(name, target):
    if (name, target) == ("matmul_nf4", "sm_75"):
        pytest.skip("sm_75 does not use this kernel")
    wrong, launches = run(name, target)
    assert not wrong
    assert launches[0].machine.kernel.target.startswith(target)


def test_there_is_an_example_for_every_kernel():
    tiles = {*launch.TILES} - {"gemv_nf4_small", "matmul_nf4_many"}  # for other sizes
    assert {*EXAMPLES} == tiles and len(EXAMPLES) == 16


@pytest.mark.slow
@pytest.mark.strict
@pytest.mark.parametrize("name", BARRIERS)
def test_each_missing_barrier_is_found(name):
    _, launches = run(name)
    lines = launches[0].text.splitlines()
    count, harmless = BARRIERS[name]
    assert sum(line.split()[:1] == ["bar.sync"] for line in lines) == count
    for number in range(count):
        wrong, _ = run(name, alter=lambda text, number=number: without(text, number))
        assert bool(wrong) != (number in harmless), number


def test_a_missing_barrier_of_the_dequantiser_is_found():
    wrong, _ = run("dequantize_nf4", alter=lambda text: without(text, 0))
    assert any("race between warps" in finding for finding in wrong)


@pytest.mark.parametrize("name", ["dequantize_nf4_textbook", "gated", "rms_norm", "cross_entropy"])
def test_a_mask_that_is_one_too_long_is_found(name):
    """Let every comparison that guards a global access accept its limit too."""

    def longer(text: str) -> str:
        guards = {*re.findall(r"@(%p\d+) (?:ld|st)\.global", text)}
        changed = text
        for guard in guards:
            pattern = rf"setp\.(l|g)t\.(\w+)(\s+){guard},"
            changed = re.sub(pattern, rf"setp.\1e.\2\3{guard},", changed)
        assert changed != text
        return changed

    wrong, _ = run(name, alter=longer)
    assert wrong


@pytest.mark.parametrize(
    "name", ["quantize_nf4", "gemv_nf4", "cross_entropy", "rms_norm", "rms_norm_weight"]
)
def test_another_value_outside_of_the_mask_is_found(name):
    """Give 3.0 or a large integer to the lanes that a mask excludes."""
    masked = re.compile(r"(mov\.u\d+ %rs?\d+, )\S+;((?:\s+mov\.u\d+ .*;)*\s+@%p\d+ ld\.global)")

    def changed(text: str) -> str:
        altered, times = masked.subn(r"\g<1>0x40404040;\2", text)
        assert times
        return altered

    wrong, _ = run(name, alter=changed)
    assert wrong


def test_counts_of_a_launch():
    """A lane of the dequantiser writes 8 neighbours: full sectors but the last."""
    with ptx_machine("sm_86", counting=True) as launches:
        EXAMPLES["dequantize_nf4"]()
    counts = launches[0].machine.counts
    store = next(
        requests
        for number, requests in counts.requests.items()
        if counts.kernel.instructions[number].opcode == "st.global.v4.b32"
    )
    assert store.sectors == -(-store.bytes // 32)
    assert counts.total("shared").requests > 0
    assert sum(counts.issued.values()) == sum(counts.opcodes().values())
