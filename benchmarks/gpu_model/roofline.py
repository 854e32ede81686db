"""The least time of a kernel on a given card: a model from datasheet rates. Nothing is measured.

    pipes = {"issue": 7.7, "alu": 2.5}
    times = bounds(CARDS["RTX 4090"], elements=4096 * 4096, bytes_per_element=2.516, pipes=pipes)
    binding(times), max(times.values())        # ("DRAM", 41.9): the slowest resource is the limit

A kernel moves bytes and executes instructions. Every resource (memory, issue slots, each kind of
lane) has a rate, and therefore a least time; the largest of these times is the bound. Addresses are
part of the model: executed.py counts the cycles of the load and store unit by those of an executed
launch. The model leaves out effects that make real kernels slower: latency, the launch, and the 8
to 15 % of the datasheet's bandwidth that DRAM never reaches. The L2 cache can make a kernel look
faster if it holds the data. The ratio of the other resources to DRAM is the useful figure: below 1,
fewer instructions save no time, and only fewer bytes do.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU with the figures of its datasheet."""

    target: str  # architecture that Triton compiles for
    sms: int  # streaming multiprocessors
    ghz: float  # boost clock
    gb_per_s: float  # of DRAM, 10^9 bytes a second


CARDS = {
    "T4": Card("sm_75", 40, 1.59, 320),
    "RTX 3060": Card("sm_86", 28, 1.777, 360),
    "RTX 3090": Card("sm_86", 82, 1.695, 936),
    "RTX 4070": Card("sm_89", 46, 2.475, 504),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008),
    "RTX 5090": Card("sm_120", 170, 2.407, 1792),
    "A100-80": Card("sm_80", 108, 1.41, 2039),
    "H100 SXM": Card("sm_90", 132, 1.83, 3352),
}

# Thread instructions that an SM starts in a clock, from the throughput table of the CUDA C++
# Programming Guide. Four schedulers issue one warp each. LSU works in passes of 32 bits a thread,
# shuffles included; a request takes one for each line that it touches or pass that it needs. XU are
# conversions and MUFU.
LANES = {"issue": 128, "alu": 64, "fma": 128, "lsu": 32, "xu": 16}
LANES_OF = {"sm_75": {"fma": 64, "lsu": 16}, "sm_80": {"fma": 64}}  # targets that differ

# Bytes of DRAM for one NF4 weight in blocks of 64, with its scale: fp32, or double quantised in
# groups of 256.
WEIGHT = 1 / 2 + 4 / 64
WEIGHT_DOUBLE_QUANT = 1 / 2 + 1 / 64 + 4 / (64 * 256)
HALF = 2  # bytes of one weight in bf16 or fp16


def bounds(
    card: Card, elements: int, bytes_per_element: float, pipes: Mapping[str, float]
) -> dict[str, float]:
    """Return the least time of each resource in microseconds, "DRAM" first.

    `pipes` holds the instructions of one element for each of LANES: all of them under "issue", and
    those of each kind under the other names (`sass.Tally.pipes`). A missing name means 0. Raises
    ValueError for a negative cost or an unknown pipe.
    """
    unknown = sorted(set(pipes) - set(LANES))
    if unknown:
        raise ValueError(f"need pipes out of {', '.join(LANES)}, got {', '.join(unknown)}")
    if min(elements, bytes_per_element, *pipes.values()) < 0:
        raise ValueError(
            f"need no negative cost, got {elements=}, {bytes_per_element=}, {dict(pipes)}"
        )
    lanes = LANES | LANES_OF.get(card.target, {})
    clocks = {pipe: elements * cost / (card.sms * lanes[pipe]) for pipe, cost in pipes.items()}
    microseconds = {pipe: count / (card.ghz * 1e3) for pipe, count in clocks.items()}
    return {"DRAM": elements * bytes_per_element / (card.gb_per_s * 1e3), **microseconds}


def binding(times: Mapping[str, float]) -> str:
    """Return the resource with the longest time, which sets the bound."""
    return max(times, key=lambda resource: times[resource])


def pressure(times: Mapping[str, float]) -> tuple[str, float]:
    """Return the busiest resource after DRAM, and its time as a share of DRAM's time.

    ("lsu", 0.33) leaves two thirds of the time to spare; ("issue", 1.07) makes the kernel slower
    than its bytes.
    """
    busiest = binding({resource: time for resource, time in times.items() if resource != "DRAM"})
    return busiest, times[busiest] / times["DRAM"]
