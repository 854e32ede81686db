"""Tests of the compiled elementwise operations ("steps") for CPUs.

They are exact to a few roundings at every size and return None for inputs that they do not support.
The oracles compute in fp64. tests/ops compares the functions that call these steps with their
reference implementations.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.bounds import attention_sizes
from helpers.tiny import python
from helpers.toy import llama, lora, noise
from minilora_kernels.c import bindings
from minilora_kernels.ops import attention as att
from minilora_kernels.ops.rms_norm import plain_rms_norm

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): torch runs these operations"
)
DTYPES = [torch.float32, torch.bfloat16]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}
sizes = st.integers(1, 300)


def values(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (noise(*shape, seed=seed).detach() * scale).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def close(found: Tensor, exact: Tensor, ulps: float, of: Tensor | None = None) -> bool:
    """Return True if the error is at most `ulps` roundings of the exact value, or of `of`."""
    bound = ulps * EPS[found.dtype] * (exact if of is None else of).abs() + 1e-36
    return bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_over_the_whole_range_of_values(dtype, gelu):
    """Test every sixteenth bf16 number.

    Among them are huge ones, where e^x is 0 or infinite, and zeros of both signs.
    """
    bits = torch.arange(0, 1 << 16, 16, dtype=torch.int32).to(torch.int16)
    gate = bits.view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() < 1e12)].to(dtype)  # gelu's x³ must stay finite
    up = torch.ones_like(gate)
    y = bindings.gated(gate, up, gelu)
    x = gate.double()
    z = 1.5957691216057308 * (x + 0.044715 * x**3) if gelu else x
    exact = x * torch.sigmoid(z)
    assert y is not None and y.isfinite().all()
    # z is rounded to fp32, which changes the sigmoid by |z| units where the sigmoid is small.
    noise_of_z = exact * (1 + z.abs().clamp(max=90) * (2**-23 / EPS[dtype]))
    assert close(y, exact.where(z > -86, torch.zeros(())), 4, noise_of_z)
    for special in (torch.nan, torch.inf, -torch.inf):
        x = torch.full((3,), special, dtype=dtype)
        found, expected = bindings.gated(x, torch.ones_like(x), gelu), F.silu(x)
        assert found is not None and torch.equal(found.isnan(), expected.isnan())


@given(rows=st.integers(1, 40), width=sizes, dtype=st.sampled_from(DTYPES), gemma=st.booleans())
def test_rms_norm_and_its_gradients(rows, width, dtype, gemma):
    x, w, dy = (
        values(*s, dtype=dtype, seed=i)
        for i, s in enumerate([(rows, width), (width,), (rows, width)])
    )
    found = bindings.rms_norm(x, w, 1e-5, gemma)
    assert found is not None
    exact_x, exact_w = x.double().requires_grad_(), w.double().requires_grad_()
    exact = plain_rms_norm(exact_x, exact_w, 1e-5, gemma)
    exact.backward(dy.double())
    assert close(found[0], exact.detach(), 3)
    back = bindings.rms_norm_backward(x, w, found[1], dy, True, gemma)
    assert (
        back is not None
        and back[1] is not None
        and exact_x.grad is not None
        and exact_w.grad is not None
    )
    largest = (
        (dy.double() * (w.double() + gemma)).abs().amax(1, keepdim=True)
        * found[1].double()
        * (1 + width**0.5)
    )
    # dx is a difference, so its error is relative to the size of the two terms.
    assert close(back[0], exact_x.grad, 2, largest.expand_as(exact_x))
    assert close(
        back[1], exact_w.grad, rows + 4, (dy.double() * exact_x.detach() * found[1]).abs().sum(0)
    )
    without = bindings.rms_norm_backward(x, w, found[1], dy, False, gemma)
    assert without is not None and without[1] is None and torch.equal(without[0], back[0])


@given(
    rows=st.integers(1, 20),
    words=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_cross_entropy_loss_and_gradient(rows, words, dtype, seed):
    logits = values(rows, words, dtype=dtype, seed=seed, scale=5.0)
    labels = torch.randint(words, (rows,), generator=torch.Generator().manual_seed(seed))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    loss, kept = torch.empty(rows), logits.clone()
    assert bindings.cross_entropy(kept, labels, loss, False) and torch.equal(kept, logits)
    assert (loss - expected).abs().max() <= 1e-5  # sums of up to 3,000 terms, and logits up to 20
    assert bindings.cross_entropy(kept, labels, loss, True) and exact.grad is not None
    assert ((kept.double() - exact.grad).abs() <= 1e-5 + EPS[dtype] * exact.grad.abs()).all()


@given(N=st.integers(1, 3), size=st.integers(1, 20), start=st.integers(0, 70), G=st.integers(1, 3))
def test_weights_of_attention(N, size, start, G):
    keys = start + size
    scores, dP = (
        values(N, size * G, keys, dtype=torch.float32, seed=i, scale=3.0) for i in range(2)
    )
    wide = [x.double() for x in (scores, dP)]
    assert bindings.attention_weights(scores, dP, start, G)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_STEPS", "torch")
        P, dS = att._weights(*wide, start, G)
    assert (scores - P).abs().max() <= 1e-6 and (dP - dS).abs().max() <= 1e-5
    assert torch.equal(scores == 0, P == 0)  # no attention to later tokens


@given(
    T=st.integers(1, 130),
    d=st.sampled_from([32, 64, 96]),
    kv_heads=st.integers(1, 2),
    G=st.integers(1, 3),
    laid_out=st.booleans(),
)
def test_backward_of_attention_in_tiles(T, d, kv_heads, G, laid_out):
    """The gradients are those of fp64, within the rounding of their own sums (bounds.py)."""
    q, k, v, dy = (
        values(2, heads, T, d, dtype=torch.float32, seed=seed)
        for seed, heads in enumerate((kv_heads * G, kv_heads, kv_heads, kv_heads * G))
    )
    if laid_out:  # as a model does it: heads next to each other
        q, k, v, dy = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dy))
    wide_q, wide_k, wide_v = (x.double().requires_grad_() for x in (q, k, v))
    wide = att.plain_attention(wide_q, wide_k, wide_v)
    exact = torch.autograd.grad(wide, (wide_q, wide_k, wide_v), dy.double())
    with threads(2):
        found = bindings.attention_backward(q, k, v, dy, d**-0.5)
    assert found is not None
    bounds = attention_sizes(q, k, v, dy)[1:]
    for gradient, wanted, bound in zip(found, exact, bounds, strict=True):
        assert gradient.shape == wanted.shape
        assert ((gradient - wanted).abs() <= EPS[torch.float32] * bound).all()


def test_backward_of_attention_is_left_to_torch():
    """The tiles take fp32 and heads of whole tiles only, and enough heads for the threads."""
    x = values(1, 2, 9, 64, dtype=torch.float32)
    narrow = x[..., :20].contiguous()
    with threads(2):
        assert bindings.attention_backward(x, x, x, x, 1.0) is not None
        assert bindings.attention_backward(x, x, x, x.bfloat16(), 1.0) is None
        assert bindings.attention_backward(x, x, x, x.mT.contiguous().mT, 1.0) is None
        assert bindings.attention_backward(narrow, narrow, narrow, narrow, 1.0) is None
    with threads(3):  # two key heads would keep two of the three threads busy
        assert bindings.attention_backward(x, x, x, x, 1.0) is None


def test_threads_do_not_change_a_bit_of_attention():
    x = values(2, 3, 100, 64, dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(bindings.attention_backward(x, x, x, x, 0.125))
    for found in results[1:]:
        for gradient, wanted in zip(found, results[0], strict=True):
            assert torch.equal(gradient, wanted)


def test_threads_do_not_change_a_bit():
    x, w = values(700, 333, dtype=torch.bfloat16), values(333, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            found = bindings.rms_norm(x, w, 1e-5, False)
            assert found is not None
            back = bindings.rms_norm_backward(x, w, found[1], x, True, False)
            assert back is not None and back[1] is not None
            results.append([*found, back[0], back[1]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unsupported_inputs_are_left_to_torch(monkeypatch):
    x = torch.ones(2, 8)
    for other in (x.double(), x.half(), x.to("meta"), x.to(torch.int64)):
        assert bindings.gated(other, other, False) is None
    assert bindings.gated(x, x.bfloat16(), False) is None  # two dtypes
    loss = torch.empty(2)
    for bad in ([0, 8], [-1, 3]):  # C would read and write outside the row
        assert not bindings.cross_entropy(x.clone(), torch.tensor(bad), loss, True)
    assert not bindings.cross_entropy(
        x.clone(), torch.tensor([0, 1], dtype=torch.int32), loss, True
    )
    monkeypatch.setenv("MINILORA_STEPS", "torch")
    assert bindings.gated(x, x, False) is None


def test_a_strided_input_gives_the_values_of_its_contiguous_copy():
    x = values(6, 40, dtype=torch.float32)[:, ::2]
    expected, found = (
        bindings.gated(x.contiguous(), x.contiguous(), False),
        bindings.gated(x, x, False),
    )
    assert found is not None and expected is not None and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_learns_the_same_without_a_compiler(dtype, monkeypatch):
    """Compare loss and gradients of a whole model with and without the compiled steps."""
    results = []
    for choice in ("auto", "torch"):
        monkeypatch.setenv("MINILORA_STEPS", choice)
        torch.manual_seed(0)
        model = llama().to(dtype)
        lora(model)
        ids = torch.arange(40).view(2, 20) % 60
        hidden = model(ids).float().square().mean()
        hidden.backward()
        results.append(
            [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for found, expected in zip(*results, strict=True):
        # In bf16 some ties are rounded the other way, and all later layers pass the change on.
        assert (found - expected).norm() <= {torch.float32: 1e-4, torch.bfloat16: 0.1}[
            dtype
        ] * expected.norm() + 1e-9


def test_without_a_compiler_gated_is_the_reference_implementation():
    code = """
import torch
from minilora_kernels.c import bindings
from minilora_kernels.ops.swiglu import gated, plain_gated
x = torch.ones(2, 8)
print(bindings.gated(x, x, False), torch.equal(gated(x, x), plain_gated(x, x)))
"""
    assert python(code, CC="nowhere").split() == ["None", "True"]


@given(st.integers(1, 70), st.integers(1, 300), st.booleans(), st.sampled_from(DTYPES))
def test_one_token_through_a_dense_layer_of_any_size(rows, inner, with_bias, dtype):
    """A sum of n products in fp32 is off by at most n units of Σ |w x|, then rounded once."""
    torch.manual_seed(rows)  # an example must have the same weights when it is repeated
    layer = torch.nn.Linear(inner, rows, bias=with_bias).to(dtype)
    x = values(1, 1, inner, dtype=dtype)
    product = bindings.token_product(layer)
    with torch.no_grad():
        found = product(x)
        double = layer.double()
        exact = double(x.double())
        size = x.double().abs() @ double.weight.abs().T  # (1, 1, out)
    assert found.shape == exact.shape and found.dtype == dtype
    bound = (inner + 1) * 2**-24 * (size + exact.abs()) + EPS[dtype] * exact.abs() + 1e-36
    assert ((found.double() - exact).abs() <= 1.01 * bound).all()
