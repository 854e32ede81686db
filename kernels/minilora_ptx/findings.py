"""Findings: what a program does that no program should do, with the line that does it.

An access out of bounds, a misaligned access and an unknown opcode stop the machine (`Fault`). The
others are collected, and the program continues as most GPUs would:

    race between warps      two warps use a byte, one writes, no barrier is in between
    race within a warp      the same by two lanes of one warp
    divergent barrier       a warp reaches a barrier without some of its threads, or the threads of
                            a CTA wait at different barriers, or some have ended
    uninitialised read      shared memory is read before it is written
    inactive lane           a shuffle or a matrix instruction needs a lane that does not execute it
"""

from dataclasses import dataclass

from minilora_ptx.parse import Instruction, PTXError


class Fault(PTXError):
    """An access or an instruction after which the machine cannot continue."""


@dataclass
class Finding:
    """One kind of finding at one instruction.

    Attributes:
        kind: Kind, from the list above.
        detail: The first case: CTA, warp, lane.
        instruction: The instruction.
        times: Number of lanes in which it occurred.
    """

    kind: str
    detail: str
    instruction: Instruction
    times: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.times} times, first {self.detail}: {self.instruction.where()}"


class Findings:
    """The findings of a run, one for each kind and instruction."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Finding] = {}

    def add(self, kind: str, instruction: Instruction, detail: str, times: int = 1) -> None:
        """Add a finding, or count it again.

        Args:
            kind: Kind of the finding.
            instruction: The instruction that shows it.
            detail: Where it occurs: CTA, warp, lane.
            times: Number of lanes.
        """
        key = (kind, instruction.number)
        if key in self._found:
            self._found[key].times += times
        else:
            self._found[key] = Finding(kind, detail, instruction, times)

    def all(self) -> list[Finding]:
        """Return all findings, in the order of the program."""
        return sorted(self._found.values(), key=lambda finding: finding.instruction.number)

    def kinds(self) -> set[str]:
        """Return the kinds that were found."""
        return {kind for kind, _ in self._found}
