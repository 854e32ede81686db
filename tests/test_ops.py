"""Proves that every fast op equals its plain form, forward and backward, keeps less, and can be switched off.

Attention and cross-entropy have files of their own; here are their switch and what they keep.
"""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import minilora as ml
from minilora.lora import LoRAAdapter
from minilora.ops import fast, plain_ops, row_blocks
from minilora.ops.attention import attention, plain_attention
from minilora.ops.lora_linear import dense, lora_linear, plain_lora_linear
from minilora.ops.norm import plain_rms_norm, rms_norm
from minilora.ops.rotate import plain_rotate, rotate
from minilora.ops.swiglu import gated, plain_gated
from toy import llama, lora

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def angles(length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turns = torch.rand(1, 1, length, size // 2, dtype=torch.float64).repeat(1, 1, 1, 2) * 7
    return turns.cos().to(dtype), turns.sin().to(dtype)


def forms(name: str, dtype: torch.dtype):
    """(fast form, plain form, their differentiable inputs)."""
    x, w = random(3, 5, 24, dtype=dtype), random(24, dtype=dtype, seed=1)
    cos, sin = angles(5, 24, dtype)
    gate, up = random(3, 5, 24, dtype=dtype), random(3, 5, 24, dtype=dtype, seed=2)
    return {
        "norm": (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: plain_rms_norm(x, w, 1e-5), [x, w]),
        "gemma's norm": (
            lambda x, w: rms_norm(x, w, 0.1, gemma=True),
            lambda x, w: plain_rms_norm(x, w, 0.1, gemma=True),
            [x, w],
        ),
        "swiglu": (gated, plain_gated, [gate, up]),
        "geglu": (lambda g, u: gated(g, u, gelu=True), lambda g, u: plain_gated(g, u, gelu=True), [gate, up]),
        "rotate": (lambda x: rotate(x, cos, sin), lambda x: plain_rotate(x, cos, sin), [x[:, None]]),
        "rotate, heads inside": (
            lambda x: rotate(x.transpose(1, 2), cos[:, :, :3], sin[:, :, :3]),
            lambda x: plain_rotate(x.transpose(1, 2), cos[:, :, :3], sin[:, :, :3]),
            [random(2, 3, 4, 24, dtype=dtype)],
        ),
    }[name]


NAMES = ["norm", "gemma's norm", "swiglu", "geglu", "rotate", "rotate, heads inside"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fast_op_equals_its_plain_form(name, dtype):
    """Values to the bit. Gradients: sums in another order, and in 16 bit fewer roundings: a few ulp of the largest."""
    quick, plain, inputs = forms(name, dtype)
    results = []
    for form in (quick, plain):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = form(*leaves)
        y.backward(random(*y.shape, dtype=dtype, seed=3).detach())
        results.append((y, [x.grad for x in leaves]))
    (y, grads), (expected, wanted) = results
    assert torch.equal(y, expected) and y.dtype == dtype
    for found, plain_grad in zip(grads, wanted, strict=True):
        assert found.dtype == dtype
        assert (found - plain_grad).abs().max() <= 8 * torch.finfo(dtype).eps * plain_grad.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_op_passes_a_gradient_check(name):
    quick, _, inputs = forms(name, torch.float64)
    assert torch.autograd.gradcheck(quick, inputs)


@given(rows=st.integers(0, 700), width=st.integers(1, 700), gemma=st.booleans())
def test_norm_of_any_size_and_in_blocks(rows, width, gemma):
    x, w = random(rows, width).detach(), random(width, seed=1).detach()
    assert torch.equal(rms_norm(x, w, 1e-5, gemma), plain_rms_norm(x, w, 1e-5, gemma))


@given(rows=st.integers(0, 5000), width=st.integers(1, 300_000))
def test_row_blocks_cover_every_row_once(rows, width):
    for device in ("cpu", "meta"):
        blocks = list(row_blocks(rows, width, torch.device(device)))
        assert [i for block in blocks for i in range(rows)[block]] == list(range(rows))
        assert len(blocks) <= 1 or device == "cpu"


# ---- a layer and its adapter


def layer(kind: str, dtype: torch.dtype, bias: bool = True, **options) -> ml.LoRALayer:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(48, 40, bias=bias, dtype=dtype)
    if kind == "nf4":
        base = ml.NF4Linear.from_linear(base)
    made = ml.LoRALayer(base, r=4, lora_alpha=6, **options)
    made.adapters["default"].lora_B.data.normal_()
    return made


def answers(form, made: ml.LoRALayer, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of what trains."""
    made.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = form(made, leaf)
    y.backward(random(*y.shape, dtype=y.dtype, seed=5).detach())
    return [y.detach(), leaf.grad, *(p.grad for p in made.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 48), (0, 48)], ids=str)
def test_layer_and_adapter_in_one_step(kind, dtype, shape):
    """Fewer roundings than the two terms apart, each within half an ulp of what it rounds."""
    made, x = layer(kind, dtype), random(*shape, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(lora_linear(made, x), plain_lora_linear(made, x))
    assert lora_linear(made, x).grad_fn.name() == "_LoRALinearBackward"
    results = [answers(form, made, x) for form in (lora_linear, plain_lora_linear)]
    assert len(results[0]) == 4
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        size = expected.abs().max() if expected.numel() else 0
        assert not found.numel() or (found - expected).abs().max() <= 16 * torch.finfo(dtype).eps * size


def test_layer_and_adapter_pass_a_gradient_check():
    made = layer("dense", torch.float64).double()
    made.base_layer.bias.requires_grad_()
    names = [name for name, p in made.named_parameters() if p.requires_grad]
    assert len(names) == 3

    def call(x, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    made.fused = lora_linear
    inputs = [random(3, 48, dtype=torch.float64)] + [
        p.detach().double().requires_grad_() for p in made.parameters() if p.requires_grad
    ]
    assert torch.autograd.gradcheck(call, inputs)


def refused() -> dict[str, ml.LoRALayer]:
    """Layers of which the fast form must leave its hands."""
    made = {name: layer("dense", torch.float32) for name in ("hook", "two", "none", "bias", "wide", "trained")}
    made["dropout"] = layer("dense", torch.float32, lora_dropout=0.5)
    made["hook"].base_layer.register_forward_hook(lambda *_: None)
    made["two"].add_adapter("more", LoRAAdapter(48, 40, 2))
    made["two"].use(["default", "more"])
    made["none"].use([])
    made["bias"].add_adapter("b", LoRAAdapter(48, 40, 2, lora_bias=True))
    made["bias"].use(["b"])
    made["wide"].base_layer.double()
    made["trained"].base_layer.weight.requires_grad_()
    return made


@pytest.mark.parametrize("name", ["hook", "two", "none", "bias", "trained", "dropout"])
def test_what_the_one_step_leaves_to_the_plain_form(name):
    made, x = refused()[name], random(5, 48)
    torch.manual_seed(1)
    found = lora_linear(made, x)
    torch.manual_seed(1)
    assert torch.equal(found, plain_lora_linear(made, x))
    assert "_LoRALinear" not in str(found.grad_fn)


def test_autocast_takes_the_plain_form():
    made, x = layer("dense", torch.float32), random(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_linear(made, x), plain_lora_linear(made, x))


def test_threads_do_not_share_the_dense_weight():
    """Each dequantises and multiplies many times over; a shared buffer would mix their weights."""
    layers = [layer("nf4", torch.float32, bias=False) for _ in range(2)]
    layers[1].base_layer = ml.NF4Linear.from_linear(nn.Linear(48, 40, bias=False))
    x, wrong = random(5, 48), []

    def work(made: ml.LoRALayer) -> None:
        expected = made.base_layer.dequantize()
        for _ in range(300):
            W = dense(made.base_layer.weight.parts(), torch.float32)
            if not torch.equal(W, expected) or not torch.equal(lora_linear(made, x), lora_linear(made, x)):
                wrong.append(made)

    threads = [threading.Thread(target=work, args=(made,)) for made in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the switch, and what is kept


def kept(function) -> int:
    """Bytes that a forward pass keeps for backward, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())


@pytest.mark.parametrize("name,share", [("norm", 0.4), ("gemma's norm", 0.4), ("swiglu", 0.7), ("geglu", 0.7)])
def test_a_fast_op_keeps_less(name, share):
    quick, plain, inputs = forms(name, torch.bfloat16)
    assert kept(lambda: quick(*inputs)) <= share * kept(lambda: plain(*inputs))


def test_attention_keeps_no_weights():
    """T x T of them would be 4 x 256 x 256 x 4 bytes."""
    q, k, v = random(1, 4, 256, 8), random(1, 2, 256, 8), random(1, 2, 256, 8)
    assert kept(lambda: attention(q, k, v)) <= 4 * (q.numel() + k.numel() + v.numel())
    assert kept(lambda: plain_attention(q, k, v)) > 4 * 4 * 256 * 256


@pytest.mark.parametrize("quantize", [False, True])
def test_a_model_on_plain_ops(quantize):
    """No fast op is left in the graph, and loss and gradients agree with the fast ones."""
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
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert fast() == before
    ours = {"_RMSNormBackward", "_RotateBackward", "_GatedBackward", "_CausalBackward", "_LoRALinearBackward"}
    assert ours <= seen[0] and not ours & seen[1]
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-9  # fp32, sums in other orders


def run(model: nn.Module, ids: Tensor, plain: bool) -> Tensor:
    if not plain:
        return model(ids)
    with plain_ops():
        return model(ids)


def graph(tensor: Tensor) -> set:
    """Every node of autograd's graph behind a tensor."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


def test_the_switch_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), plain_ops():
        assert not fast()
        raise ZeroDivisionError
    assert fast()


def test_a_second_derivative_is_refused():
    """Backward is written by hand, once: deriving it again would be silently wrong."""
    x, w = random(4, 24), random(24, seed=1)
    (grad,) = torch.autograd.grad(rms_norm(x, w, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
