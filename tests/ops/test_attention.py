"""Proves that fused attention equals its reference and that the mask follows its definition.

Outputs and gradients are compared.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.bounds import attention_sizes
from minilora_kernels.ops.attention import BLOCK, attention, causal_mask, plain_attention


def heads(rows: int, count: int, length: int, kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    """Return q (rows, 4, count, 8), k and v (rows, kv_heads, length, 8), random, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, 4, count, 8), (rows, kv_heads, length, 8), (rows, kv_heads, length, 8)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("count,length", [(1, 1), (9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_attention_equals_the_plain_form(kv_heads, count, length, masked, dtype):
    """Compare outputs and gradients.

    Each number may differ by the rounding of its own sums in two orders (bounds.py).
    """
    ids = torch.tensor([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 7])[:, :length]
    mask = causal_mask(count, length, window=3, document_ids=ids) if masked else None
    grad = heads(2, count, length, seed=1)[0].detach()
    results = []
    for form in (attention, plain_attention):
        inputs = [x.detach().to(dtype).requires_grad_() for x in heads(2, count, length, kv_heads)]
        out = form(*inputs, mask)
        out.backward(grad.to(dtype))
        results.append([out, *(x.grad for x in inputs)])
    sizes = attention_sizes(*inputs, grad, mask)
    for fused, plain, size in zip(*results, sizes, strict=True):
        # both implementations round by eps/2
        assert ((fused - plain).abs() <= torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backward_in_blocks(kv_heads, length, dtype):
    """Compare gradients over several blocks of queries with fp64.

    In bf16 the error is at most 1.5 times that of the reference implementation.
    """
    results = []
    for form, kind in (
        (plain_attention, torch.float64),
        (attention, dtype),
        (plain_attention, dtype),
    ):
        inputs = [
            x.detach().to(dtype).to(kind).requires_grad_()
            for x in heads(2, length, length, kv_heads)
        ]
        out = form(*inputs)
        out.backward(heads(2, length, length, seed=1)[0].detach().to(dtype).to(kind))
        results.append([x.grad.double() for x in inputs])
    for exact, found, plain in zip(*results, strict=True):
        least = 50 * torch.finfo(dtype).eps * exact.norm() if dtype != torch.bfloat16 else 0
        assert (found - exact).norm() <= max(least, 1.5 * (plain - exact).norm())


def test_under_autocast():
    """Compute in bf16 and return each gradient in the dtype of its input.

    As after RoPE, q and k are in fp32 and v is in bf16.
    """
    q, k, v = heads(2, 150, 150)
    v = v.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    out.float().square().sum().backward()
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    plain_attention(*exact).square().sum().backward()
    assert (
        out.dtype == torch.bfloat16
        and q.grad.dtype == torch.float32
        and v.grad.dtype == torch.bfloat16
    )
    for found, wanted in zip((q, k, v), exact, strict=True):
        # five roundings to bf16, 2^-9 each
        assert (found.grad - wanted.grad).norm() <= 2e-2 * wanted.grad.norm()


def test_plain_attention_passes_a_gradient_check():
    inputs = [x.detach().double().requires_grad_() for x in heads(1, 3, 4)]
    assert torch.autograd.gradcheck(plain_attention, inputs)


@given(
    ids=st.lists(st.integers(-1, 2), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 9),
    data=st.data(),
)
def test_mask_is_its_definition(ids, window, data):
    """Query i attends to key j if j is not later, is in the window and is in the same document."""
    length = len(ids)
    count = data.draw(st.integers(1, length))
    mask = causal_mask(count, length, window=window, document_ids=torch.tensor([ids]))
    for row in range(count):
        i = length - count + row
        for j in range(length):
            allowed = j <= i and (window is None or i - j < window) and ids[i] == ids[j]
            assert mask[0, 0, row, j].item() == allowed
