"""Proves that every fast op equals its reference, saves less memory, and can be switched off.

Outputs and gradients are compared. Attention and cross-entropy have their own files; this file
tests their switch and the memory that they save for backward.
"""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora as ml
from helpers.toy import kept, llama, lora, noise
from minilora_kernels.allocator import row_blocks
from minilora_kernels.ops.attention import attention, plain_attention
from minilora_kernels.ops.mode import fast, reference_ops
from minilora_kernels.ops.rms_norm import plain_rms_norm, rms_norm
from minilora_kernels.ops.rope import plain_rotate, rotate
from minilora_kernels.ops.swiglu import gated, plain_gated


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def code(request, monkeypatch):
    """Run every test with the compiled steps, if there is a C compiler, and with those of torch."""
    if request.param == "torch":
        monkeypatch.setenv("MINILORA_STEPS", "torch")
    elif shutil.which("cc") is None:
        pytest.skip("no C compiler (cc): the steps run in torch")
    return request.param


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def angles(length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turns = torch.rand(1, 1, length, size // 2, dtype=torch.float64).repeat(1, 1, 1, 2) * 7
    return turns.cos().to(dtype), turns.sin().to(dtype)


def forms(name: str, dtype: torch.dtype):
    """Return the fast op, its reference implementation and their differentiable inputs."""
    x, w = noise(3, 5, 24, dtype=dtype), noise(24, dtype=dtype, seed=1)
    cos, sin = angles(5, 24, dtype)
    gate, up = noise(3, 5, 24, dtype=dtype), noise(3, 5, 24, dtype=dtype, seed=2)
    return {
        "norm": (
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: plain_rms_norm(x, w, 1e-5),
            [x, w],
        ),
        "gemma's norm": (
            lambda x, w: rms_norm(x, w, 0.1, gemma=True),
            lambda x, w: plain_rms_norm(x, w, 0.1, gemma=True),
            [x, w],
        ),
        "swiglu": (gated, plain_gated, [gate, up]),
        "geglu": (
            lambda g, u: gated(g, u, gelu=True),
            lambda g, u: plain_gated(g, u, gelu=True),
            [gate, up],
        ),
        "rotate": (
            lambda x: rotate(x, cos, sin),
            lambda x: plain_rotate(x, cos, sin),
            [x[:, None]],
        ),
        "rotate, heads inside": (
            lambda x: rotate(x.transpose(1, 2), cos[:, :, :3], sin[:, :, :3]),
            lambda x: plain_rotate(x.transpose(1, 2), cos[:, :, :3], sin[:, :, :3]),
            [noise(2, 3, 4, 24, dtype=dtype)],
        ),
    }[name]


NAMES = ["norm", "gemma's norm", "swiglu", "geglu", "rotate", "rotate, heads inside"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fast_op_equals_its_plain_form(name, dtype, code):
    """Compare values bit for bit in torch, and within an ulp or two when compiled.

    Compiled code sums in another order and approximates e^x in another way. Gradients sum in
    another order and, in 16 bit, with fewer roundings, so they differ by a few ulp of the largest.
    """
    quick, plain, inputs = forms(name, dtype)
    results = []
    for form in (quick, plain):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = form(*leaves)
        y.backward(noise(*y.shape, dtype=dtype, seed=3).detach())
        results.append((y, [x.grad for x in leaves]))
    (y, grads), (expected, wanted) = results
    exact = code == "torch" or "rotate" in name or dtype not in (torch.float32, torch.bfloat16)
    assert torch.equal(y, expected) if exact else near(y, expected, cancels=name == "geglu")
    assert y.dtype == dtype
    for found, plain_grad in zip(grads, wanted, strict=True):
        assert found.dtype == dtype
        assert (found - plain_grad).abs().max() <= 8 * torch.finfo(
            dtype
        ).eps * plain_grad.abs().max()


def near(y: Tensor, expected: Tensor, cancels: bool = False) -> bool:
    """Return whether y is within 4 units in the last place of fp32, or 1 of bf16.

    Values in bf16 round the same way, except for ties. The unit is that of the largest value where
    torch's own form cancels (1 + tanh x).
    """
    sizes = expected.abs().max() if cancels else expected.abs()
    ulps = 4 if y.dtype == torch.float32 else 1
    return bool(((y - expected).abs() <= ulps * torch.finfo(y.dtype).eps * sizes).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_op_passes_a_gradient_check(name):
    quick, _, inputs = forms(name, torch.float64)
    assert torch.autograd.gradcheck(quick, inputs)


@given(rows=st.integers(0, 700), width=st.integers(1, 700), gemma=st.booleans())
# all examples run with the same `code`
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_norm_of_any_size_and_in_blocks(rows, width, gemma, code):
    x, w = noise(rows, width).detach(), noise(width, seed=1).detach()
    y, expected = rms_norm(x, w, 1e-5, gemma), plain_rms_norm(x, w, 1e-5, gemma)
    assert torch.equal(y, expected) if code == "torch" else near(y, expected)


# `code` changes nothing here
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 5000), width=st.integers(1, 300_000))
def test_row_blocks_cover_every_row_once(rows, width):
    for device in ("cpu", "meta"):
        blocks = list(row_blocks(rows, width, torch.device(device)))
        assert [i for block in blocks for i in range(rows)[block]] == list(range(rows))
        assert len(blocks) <= 1 or device == "cpu"


# ---- the switch and the memory saved for backward


@pytest.mark.parametrize(
    "name,share", [("norm", 0.4), ("gemma's norm", 0.4), ("swiglu", 0.7), ("geglu", 0.7)]
)
def test_a_fast_op_saves_less_for_backward(name, share):
    quick, plain, inputs = forms(name, torch.bfloat16)
    assert kept(lambda: quick(*inputs)) <= share * kept(lambda: plain(*inputs))


def test_attention_saves_no_attention_weights():
    """The (T, T) weights would take 4 x 256 x 256 x 4 bytes."""
    q, k, v = noise(1, 4, 256, 8), noise(1, 2, 256, 8), noise(1, 2, 256, 8)
    assert kept(lambda: attention(q, k, v)) <= 4 * (q.numel() + k.numel() + v.numel())
    assert kept(lambda: plain_attention(q, k, v)) > 4 * 4 * 256 * 256


@pytest.mark.parametrize("quantize", [False, True])
def test_a_model_on_plain_ops(quantize):
    """The graph contains no fast op, and loss and gradients agree with those of the fast ops."""
    model = llama()
    if quantize:
        ml.quantize_model(model)
    lora(model)
    ids, results, seen = torch.arange(40).view(2, 20) % 60, [], []
    for switch in (False, True):
        model.zero_grad()
        before = fast()
        logits = run(model, ids, switch)
        seen.append({type(node).__name__ for node in graph(logits)})
        logits.float().square().mean().backward()
        results.append(
            [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
        assert fast() == before
    ours = {
        "_RMSNormBackward",
        "_SumBackward",
        "_RotateBackward",
        "_GatedBackward",
        "_CausalBackward",
        "_LoRALinearBackward",
    }
    assert ours <= seen[0] and not ours & seen[1]
    for found, expected in zip(*results, strict=True):
        # fp32, sums in other orders
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-9


def run(model: nn.Module, ids: Tensor, plain: bool) -> Tensor:
    if not plain:
        return model(ids)
    with reference_ops():
        return model(ids)


def graph(tensor: Tensor) -> set:
    """Return every node of the autograd graph of a tensor."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


def test_the_switch_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), reference_ops():
        assert not fast()
        raise ZeroDivisionError
    assert fast()


def test_a_second_derivative_is_refused():
    """The handwritten backward is not differentiable; its derivative would be silently wrong."""
    x, w = noise(4, 24), noise(24, seed=1)
    (grad,) = torch.autograd.grad(rms_norm(x, w, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
