"""Tests of small Triton kernels on the machine: the compiler's own patterns, with exact results.

Values are small integers, so that sums and products are exact in any order.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from minilora_kernels.triton import launch
from minilora_ptx import ptx_machine

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="Triton interprets its kernels here")


@triton.jit
def _add(x_ptr, y_ptr, out_ptr, n, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def _transpose(x_ptr, out_ptr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + i * SIZE + j, tl.trans(tl.load(x_ptr + i * SIZE + j)))


@triton.jit
def _sum(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


@triton.jit
def _softmax(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=-float("inf"))
    e = tl.exp2(x - tl.max(x, axis=0))
    tl.store(out_ptr + offsets, e / tl.sum(e, axis=0), mask=offsets < n)


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + i * SIZE + j)
    b = tl.load(b_ptr + i * SIZE + j)
    tl.store(out_ptr + i * SIZE + j, tl.dot(a, b, input_precision="ieee"))


@triton.jit
def _cumsum(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.cumsum(tl.load(x_ptr + offsets), axis=0))


@triton.jit
def _gather(x_ptr, index_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.gather(x, tl.load(index_ptr + offsets), 0))


def integers(*shape, dtype=torch.float32):
    return torch.randint(-8, 9, shape).to(dtype)


def found(launches) -> list[str]:
    return [str(finding) for launch in launches for finding in launch.machine.findings.all()]


@pytest.mark.parametrize("n, start", [(1, 0), (1000, 0), (1024, 1), (3000, 3)])
def test_add(n, start):
    x, y = integers(n + start)[start:], integers(n + start)[start:]
    out = torch.full((n + 64,), 77.0)
    with ptx_machine("sm_86") as launches:
        _add[(triton.cdiv(n, 1024),)](x, y, out[:n], n, SIZE=1024)
    assert torch.equal(out[:n], x + y) and (out[n:] == 77).all() and not found(launches)


@pytest.mark.parametrize("target", ["sm_75", "sm_86", "sm_90", "sm_120"])
def test_patterns_of_the_compiler(target):
    """A transpose and a gather use shared memory, sums shuffles, and a product tensor cores."""
    x, index = integers(64, 64), torch.randint(256, (256,), dtype=torch.int32)
    half = [integers(64, 64, dtype=torch.float16) for _ in range(2)]
    out = {name: torch.zeros(64, 64) for name in ("transpose", "dot")}
    total, scan, gathered = torch.zeros(1), torch.zeros(1024), torch.zeros(256)
    numbers, few = integers(1024), torch.tensor([3.0] * 5 + [2.0] * 6)
    shares = torch.zeros(11)
    with ptx_machine(target) as launches:
        _transpose[(1,)](x, out["transpose"], SIZE=64)
        _sum[(1,)](numbers, total, SIZE=1024)
        _cumsum[(1,)](numbers, scan, SIZE=1024)
        _gather[(1,)](numbers, index, gathered, SIZE=256)
        _softmax[(1,)](few, shares, 11, SIZE=16)
        if target != "sm_75":  # whose tensor cores have another shape
            _dot[(1,)](*half, out["dot"], SIZE=64)
    assert torch.equal(out["transpose"], x.T)
    assert total == numbers.sum() and torch.equal(scan, numbers.cumsum(0))
    assert torch.equal(gathered, numbers[index.long()])
    assert torch.equal(shares, few.exp2() / 64)  # 5 * 8 + 6 * 4
    if target != "sm_75":
        assert torch.equal(out["dot"], half[0].float() @ half[1].float())
    assert not found(launches)


def test_a_matrix_product_in_fp32():
    a, b, out = integers(32, 32), integers(32, 32), torch.zeros(32, 32)
    with ptx_machine("sm_86") as launches:
        _dot[(1,)](a, b, out, SIZE=32)
    assert torch.equal(out, a @ b) and not found(launches)


def test_a_mask_that_is_one_too_long_is_out_of_bounds():
    from minilora_ptx import Fault

    x = torch.from_numpy(np.zeros(1000, np.float32))
    with ptx_machine("sm_86"), pytest.raises(Fault, match="out of bounds"):
        _add[(1,)](x, x.clone(), x.clone(), 1001, SIZE=1024)
