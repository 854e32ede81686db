"""Proves that the chunked cross-entropy of an output layer equals the plain one.

Loss and gradient are compared for every chunk size and head. Oracles: the five-line reference
implementation, torch's own gradient check, and the bytes that are alive at the peak.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora.tools.memory_plan.meter import Meter
from minilora_kernels.c import bindings
from minilora_kernels.ops import cross_entropy as ce
from minilora_kernels.ops.cross_entropy import (
    head_cross_entropy,
    linear_cross_entropy,
    plain_cross_entropy,
)


def problem(N: int, D: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).double().norm() / expected.double().norm().clamp_min(1e-30)).item()


@given(
    N=st.integers(1, 40),
    D=st.integers(1, 20),
    V=st.integers(2, 50),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_equal_the_plain_form(N, D, V, chunk, seed):
    hidden, weight, labels = problem(N, D, V, seed=seed)
    expected = plain_cross_entropy(hidden, weight, labels)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    found = linear_cross_entropy(hidden, weight, labels, chunk)
    (grad,) = torch.autograd.grad(found, hidden)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradient_by_finite_differences():
    # both implementations compute logits in fp32, so the step is large and the tolerance is fp32's
    hidden, weight, labels = problem(5, 4, 7)
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, labels, 2), hidden, eps=1e-2, atol=2e-3, rtol=1e-2
    )


@pytest.mark.parametrize("scale", [3.0, 1 / 160])
def test_gradient_carries_the_outer_factor(scale):
    hidden, weight, labels = problem(9, 8, 11)
    (expected,) = torch.autograd.grad(plain_cross_entropy(hidden, weight, labels) * scale, hidden)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 4) * scale, hidden)
    assert relative(grad, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_no_worse_than_the_plain_form(dtype):
    hidden, weight, labels = problem(64, 32, 300, dtype)
    exact = hidden.detach().float().requires_grad_()
    loss = plain_cross_entropy(exact, weight.float(), labels)
    (grad,) = torch.autograd.grad(loss, exact)
    errors = {}
    for form in (plain_cross_entropy, linear_cross_entropy):
        found = form(hidden, weight, labels)
        (g,) = torch.autograd.grad(found, hidden)
        assert g.dtype == dtype and found.dtype == torch.float32
        errors[form] = abs(found - loss).item() / loss.item(), relative(g.float(), grad)
    for ours, plain in zip(errors[linear_cross_entropy], errors[plain_cross_entropy], strict=True):
        assert ours <= 1.2 * plain  # the same roundings, summed in another order


def test_fp16_keeps_gradients_that_would_underflow():
    """With 1 - p = 6e-6 for the label, the gradient is 25 times fp16's smallest number."""
    weight = torch.tensor([[0.125] * 8, [-0.125] * 8], dtype=torch.float16)
    # the logits are exactly 6 and -6
    hidden = torch.full((1, 8), 6.0, dtype=torch.float16).requires_grad_()
    labels = torch.tensor([0])
    exact = hidden.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(
        plain_cross_entropy(exact, weight.float(), labels) * 2.0**12, exact
    )
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 2.0**12, hidden)
    assert relative(grad.float(), expected) < 2e-3  # fp16's unit roundoff is 5e-4


def test_fp16_takes_a_loss_scale_that_fp16_cannot_hold():
    hidden, weight, labels = problem(9, 8, 11, torch.float16)
    weight = weight / 100
    (plain,) = torch.autograd.grad(plain_cross_entropy(hidden, weight, labels), hidden)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 65536.0, hidden)
    assert relative(grad.float(), plain.float() * 65536) < 2e-3


class Head(nn.Module):
    """Output layer that is not a single matrix."""

    def __init__(self, D: int, V: int):
        super().__init__()
        self.a, self.b = nn.Linear(D, 3), nn.Linear(3, V)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("kind", ["frozen", "trainable", "biased", "module"])
def test_any_head(kind):
    torch.manual_seed(0)
    hidden, weight, labels = problem(10, 6, 9)
    head = Head(6, 9) if kind == "module" else nn.Linear(6, 9, bias=kind == "biased")
    if kind == "frozen":
        head.requires_grad_(False)
    parameters = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    found = head_cross_entropy(hidden, head, labels, 3)
    assert torch.allclose(found, expected, rtol=1e-6)
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert relative(a, b) < 1e-5


def test_trainable_weight_gets_its_gradient():
    hidden, weight, labels = problem(10, 6, 9)
    weight.requires_grad_()
    expected = torch.autograd.grad(plain_cross_entropy(hidden, weight, labels), (hidden, weight))
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 3), (hidden, weight))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_an_ignored_label_adds_no_loss_and_no_gradient(trained):
    hidden, weight, labels = problem(12, 6, 9)
    weight.requires_grad_(trained)
    labels[::3] = ce.IGNORE
    expected = plain_cross_entropy(hidden, weight, labels)
    found = linear_cross_entropy(hidden, weight, labels, 5)
    assert torch.allclose(found, expected, rtol=1e-6)
    parameters = [hidden, *[weight] * trained]
    grads = torch.autograd.grad(found, parameters)
    assert (grads[0][::3] == 0).all()
    for a, b in zip(grads, torch.autograd.grad(expected, parameters), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_row_of_a_head_that_trains_has_its_own_factor(dtype):
    """Give each row its own factor, as DPO does.

    The 16-bit sums of three chunks are each rounded: at most 3 units of 2^-9 (bf16) on the norm.
    """
    hidden, weight, labels = problem(24, 16, 50, dtype)
    factor = torch.rand(24) * 2.0**12
    head = nn.Linear(16, 50, bias=False)
    head.weight = nn.Parameter(weight)
    found = torch.autograd.grad(
        (ce.head_logprobs(hidden, head, labels, 8) * factor).sum(), (hidden, head.weight)
    )
    exact, W = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    log_p = (exact @ W.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    for a, b in zip(found, torch.autograd.grad((log_p * factor).sum(), (exact, W)), strict=True):
        assert relative(a.double(), b) < 1.5 * 2.0**-8 * 2


def test_a_head_that_trains_under_autocast():
    hidden, weight, labels = problem(10, 6, 9)
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(plain_cross_entropy(hidden, weight, labels), weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, labels, 4)
    (found,) = torch.autograd.grad(loss, weight)
    # bf16's unit roundoff is 4e-3
    assert found.dtype == torch.float32 and relative(found, expected) < 2e-2


@pytest.mark.parametrize("trainable", [False, True])
def test_the_logits_of_the_batch_never_exist(trainable, monkeypatch):
    """No tensor has more than chunk x V elements, and none of that size is saved for backward."""
    N, D, V, chunk = 64, 4, 1000, 8
    hidden, weight, labels = problem(N, D, V)
    weight.requires_grad_(trainable)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [
                t.numel()
                for t in (out if isinstance(out, tuple | list) else [out])
                if isinstance(t, torch.Tensor)
            ]
            largest = max([largest, *sizes])
            return out

    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ),
        Watch(),
    ):
        loss = linear_cross_entropy(hidden, weight, labels, chunk)
        during_forward = list(saved)
        loss.backward()
    assert largest == chunk * V
    assert max(during_forward) <= N * D or trainable and max(during_forward) <= V * D


@pytest.mark.parametrize("trained, most", [(False, 0.35e9), (True, 1.5e9)])
def test_bytes_at_8192_tokens_and_256000_words_on_a_gpu(trained, most, monkeypatch):
    """Count the op's own allocations, gradients included; tensors without data need no GPU.

    Published figures of other libraries at Gemma 2's sizes, with the gradient of W: 1.16 GB (CCE)
    and 1.47 GB (Liger).
    """
    monkeypatch.setattr(ce, "has_kernels", lambda device: True)
    N, D, V = 8192, 2304, 256000
    with torch.device("meta"), Meter() as meter:
        hidden = torch.empty(N, D, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(V, D, dtype=torch.bfloat16, requires_grad=trained)
        labels = torch.empty(N, dtype=torch.long)
        meter.stretch(0)
        linear_cross_entropy(hidden, weight, labels).backward()
    held = meter.stretch(0).rise
    print(f"{held / 1e6:.0f} MB above the inputs, W {'trained' if trained else 'frozen'}")
    # gradients and one chunk of logits
    assert hidden.nbytes + trained * weight.nbytes + 512 * V * 2 < held <= most


def test_default_chunk_bounds_the_logits(monkeypatch):
    monkeypatch.setattr(ce, "CHUNK_BYTES", 400)
    hidden, weight, labels = problem(50, 4, 30)
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: sizes.append(out.shape) or mm(*a, out=out))
    assert torch.allclose(
        linear_cross_entropy(hidden, weight, labels), plain_cross_entropy(hidden, weight, labels)
    )
    logits = [size[0] for size in sizes if size[1] == 30]
    assert set(logits) == {3, 2} and len(logits) == 17  # 3 rows of 30 in fp32 are 360 bytes


def test_no_gradient_is_computed_when_none_is_asked_for(monkeypatch):
    hidden, weight, labels = problem(5, 4, 7)
    wanted = []
    monkeypatch.setattr(bindings, "cross_entropy", lambda *given: wanted.append(given[-1]))
    monkeypatch.setattr(torch.Tensor, "scatter_", None)  # only the gradient calls scatter_
    with torch.no_grad():
        assert linear_cross_entropy(hidden.detach(), weight, labels) > 0
        assert linear_cross_entropy(hidden, weight, labels) > 0
    with pytest.raises(TypeError):
        linear_cross_entropy(hidden, weight, labels)
    assert wanted == [False, False, True]


@pytest.mark.parametrize("chunk", [3, None])
def test_a_head_in_fp32_that_trains_under_autocast(chunk):
    """Products are in bf16 and sums over chunks in fp32.

    bf16 rounds a logit and a probability by 2^-9.
    """
    hidden, weight, labels = problem(40, 16, 30)
    weight.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(plain_cross_entropy(*exact, labels), exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, chunk)
    found = torch.autograd.grad(loss, [hidden, weight])
    for gradient, expected in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32 and relative(gradient, expected) < 2**-6


def test_linear_cross_entropy_compiles_without_a_graph_break():
    """The sizes are large enough that eager code takes buffers from the pool."""
    hidden, weight, labels = problem(64, 8, 9000)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (linear_cross_entropy, compiled):
        loss = function(hidden, weight, labels)
        grads.append(torch.autograd.grad(loss, hidden)[0])
    assert relative(grads[1], grads[0]) < 1e-5  # fp32, another exponential


def test_no_labels_give_a_loss_of_zero():
    hidden, weight, labels = problem(0, 4, 7)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_errors():
    hidden, weight, labels = problem(5, 4, 7)
    with pytest.raises(ValueError, match=r"expected hidden \(N, D\) and labels \(N,\)"):
        linear_cross_entropy(hidden[None], weight, labels)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        linear_cross_entropy(hidden, weight, labels, 0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels + 7)
