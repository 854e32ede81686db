"""Proves that bins and one comparison (torch_cpu.py) find the codes of a full threshold search.

The comparison covers every number that occurs: all fp32 values of [-1, 1], plus or minus one ulp,
once for the weights and once for the scales.

Oracle: torch.bucketize on the thresholds, as in reference.py. The fast test takes thresholds and
their neighbours.
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
    near = [torch.cat([THRESHOLDS[kind], ends])]
    for way in (torch.inf, -torch.inf):
        for _ in range(3):
            near.append(torch.nextafter(near[-1], torch.tensor(way)))
    check(kind, torch.cat([*near, *near]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_every_value(kind):
    low = torch.arange(1 << 16)
    seen = 0
    for high in torch.arange(1 << 16).split(256):
        x = (high[:, None] << 16 | low).flatten().to(torch.int32).view(torch.float32)
        x = x[x.abs() <= 1 + 2**-23]
        x = x[: len(x) // 2 * 2]
        check(kind, x) if len(x) else None
        seen += len(x)
    assert seen == 2 * (0x3F800001 + 1)  # bit patterns of 0 .. 1 + ulp, with both signs
