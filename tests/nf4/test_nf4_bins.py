"""Proves that bins and one comparison (torch_cpu.py) find the codes of a full threshold search.

The slow test takes 1,025 fp32 values of each of the 65,536 that share their first 16 bits, in [-1,
1] plus or minus one ulp. The code of a scale can change only at a threshold or between two of these
groups, and the code of a weight only at a threshold or between two bins, which are 1/16 wide. The
fast test takes thresholds, the edges of these bins, and their neighbours.

Oracle: torch.bucketize on the thresholds, as in reference.py.
"""

import pytest
import torch

from minilora_kernels import dynamic_map, nf4_thresholds
from minilora_kernels.nf4 import reference, torch_cpu

THRESHOLDS = {"weights": nf4_thresholds(), "scales": reference.midpoints(dynamic_map())}


def codes(kind: str, x: torch.Tensor) -> torch.Tensor:
    """Return the codes that the fast path gives to scaled values; weights are packed in pairs."""
    if kind == "scales":
        return torch_cpu._nested_codes(x)
    packed = torch.empty(len(x) // 2, dtype=torch.uint8)
    torch_cpu._pack_chunk(x.clone(), torch.empty_like(x), torch.empty_like(x), packed)
    return reference.unpack(packed)


def check(kind: str, x: torch.Tensor) -> None:
    expected = torch.bucketize(x, THRESHOLDS[kind], out_int32=True)
    assert torch.equal(codes(kind, x).int(), expected), x[codes(kind, x).int() != expected][:8]


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_thresholds_and_their_neighbours(kind):
    ends = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    edges = torch.arange(-31, 32, 2) / 32  # between the bins of weights
    near = [torch.cat([THRESHOLDS[kind], ends, edges])]
    for way in (torch.inf, -torch.inf):
        for _ in range(3):
            near.append(torch.nextafter(near[-1], torch.tensor(way)))
    check(kind, torch.cat([*near, *near]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_values_of_all_sizes(kind):
    low = torch.cat([torch.arange(0, 1 << 16, 64), torch.tensor([0xFFFF])])  # (1025,)
    seen = 0
    for high in torch.arange(1 << 16).split(4096):
        x = (high[:, None] << 16 | low).flatten().to(torch.int32).view(torch.float32)
        x = x[x.abs() <= 1 + 2**-23]
        seen += len(x)
        x = torch.cat([x, x[: len(x) % 2]])  # an even number: two codes share a byte
        if len(x):
            check(kind, x)
    # The first 16 bits of 0 to 1 are 0 to 0x3F80; of the last group only 1.0 is in the range.
    assert seen == 2 * (0x3F80 * len(low) + 1)
