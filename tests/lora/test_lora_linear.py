"""Tests of `lora_linear`, the fused layer and adapter, and of recomputed activations.

lora_linear equals the reference implementation, forward and backward, and uses it for the cases
that it does not support. It keeps no output of a norm or a gate: backward recomputes them.
"""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minilora as ml
from helpers.toy import kept, noise
from minilora.lora.fused_linear import dense, lora_linear, plain_lora_linear
from minilora.lora.layer import LoRAAdapter
from minilora_kernels.ops.mode import reference_ops
from minilora_kernels.ops.rms_norm import rms_norm
from minilora_kernels.ops.swiglu import gated

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer(kind: str, dtype: torch.dtype, bias: bool = True, **options) -> ml.LoRALayer:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(48, 40, bias=bias, dtype=dtype)
    if kind == "nf4":
        base = ml.NF4Linear.from_linear(base)
    made = ml.LoRALayer(base, r=4, lora_alpha=6, **options)
    made.adapters["default"].lora_B.data.normal_()
    return made


def answers(form, made: ml.LoRALayer, x: Tensor) -> list[Tensor]:
    """Return y, and the gradients of x and of the trainable parameters."""
    made.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = form(made, leaf)
    y.backward(noise(*y.shape, dtype=y.dtype, seed=5).detach())
    return [y.detach(), leaf.grad, *(p.grad for p in made.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 48), (0, 48)], ids=str)
def test_lora_linear_equals_the_reference(kind, dtype, shape):
    """The fused form has fewer roundings than the two separate terms, each within half an ulp."""
    made, x = layer(kind, dtype), noise(*shape, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(lora_linear(made, x), plain_lora_linear(made, x))
    assert lora_linear(made, x).grad_fn.name() == "_LoRALinearBackward"
    results = [answers(form, made, x) for form in (lora_linear, plain_lora_linear)]
    assert len(results[0]) == 4
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        size = expected.abs().max() if expected.numel() else 0
        assert (
            not found.numel()
            or (found - expected).abs().max() <= 16 * torch.finfo(dtype).eps * size
        )


def test_lora_linear_passes_a_gradient_check():
    made = layer("dense", torch.float64).double()
    made.base_layer.bias.requires_grad_()
    names = [name for name, p in made.named_parameters() if p.requires_grad]
    assert len(names) == 3

    def call(x, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    made.fused = lora_linear
    inputs = [noise(3, 48, dtype=torch.float64)] + [
        p.detach().double().requires_grad_() for p in made.parameters() if p.requires_grad
    ]
    assert torch.autograd.gradcheck(call, inputs)


def refused() -> dict[str, ml.LoRALayer]:
    """Return layers that the fused form does not support."""
    made = {
        name: layer("dense", torch.float32)
        for name in ("hook", "two", "none", "bias", "wide", "trained")
    }
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
def test_lora_linear_uses_the_reference_for_unsupported_layers(name):
    made, x = refused()[name], noise(5, 48)
    torch.manual_seed(1)
    found = lora_linear(made, x)
    torch.manual_seed(1)
    assert torch.equal(found, plain_lora_linear(made, x))
    assert "_LoRALinear" not in str(found.grad_fn)


def test_lora_linear_uses_the_reference_under_autocast():
    made, x = layer("dense", torch.float32), noise(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_linear(made, x), plain_lora_linear(made, x))


def test_threads_do_not_share_the_dense_weight():
    """Each thread dequantises and multiplies many times: a shared buffer would mix the weights."""
    layers = [layer("nf4", torch.float32, bias=False) for _ in range(2)]
    layers[1].base_layer = ml.NF4Linear.from_linear(nn.Linear(48, 40, bias=False))
    x, wrong = noise(5, 48), []

    def work(made: ml.LoRALayer) -> None:
        expected = made.base_layer.dequantize()
        for _ in range(300):
            W = dense(made.base_layer.weight.parts(), torch.float32)
            if not torch.equal(W, expected) or not torch.equal(
                lora_linear(made, x), lora_linear(made, x)
            ):
                wrong.append(made)

    threads = [threading.Thread(target=work, args=(made,)) for made in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- recomputed activations


def projections(count: int) -> list[ml.LoRALayer]:
    made = [layer("dense", torch.float32) for _ in range(count)]
    for number, one in enumerate(made):
        one.fused = lora_linear
        one.adapters["default"].lora_B.data.normal_(generator=torch.Generator().manual_seed(number))
    return made


def norm_and_layers(x: Tensor, w: Tensor, made: list[ml.LoRALayer]) -> Tensor:
    y = rms_norm(x, w, 1e-5)
    return torch.stack([one(y) for one in made]).square().mean()


def gate_and_layer(x: Tensor, w: Tensor, made: list[ml.LoRALayer]) -> Tensor:
    return made[0](gated(x, x * w)).square().mean()


@pytest.mark.parametrize("form,count", [(norm_and_layers, 3), (gate_and_layer, 1)])
@pytest.mark.parametrize("way", ["once", "twice", "checkpointed"])
def test_recomputed_activations_give_the_same_gradients(form, count, way):
    """Backward runs once, twice, or under gradient checkpointing.

    The graph is a norm or a gate, and the layers that read it.
    """
    made, results = projections(count), []
    for plain in (False, True):
        x, w = noise(9, 48), noise(48, seed=1)
        for one in made:
            one.zero_grad()
        with reference_ops() if plain else nullcontext():
            y = (
                checkpoint(form, x, w, made, use_reentrant=False)
                if way == "checkpointed"
                else form(x, w, made)
            )
            for _ in range(2 if way == "twice" else 1):
                y.backward(retain_graph=way == "twice")
        results.append(
            [
                x.grad,
                w.grad,
                *(p.grad.clone() for one in made for p in one.parameters() if p.requires_grad),
            ]
        )
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()  # fp32, sums in another order


def test_activations_that_can_be_recomputed_are_not_kept():
    """A norm and three layers keep the norm's input, r = 1/RMS and three z = A x, but no output."""
    made, x, w = projections(3), noise(200, 48), noise(48, seed=1)
    frozen = sum(p.numel() for one in made for p in one.parameters()) + w.numel()
    squares = 3 * 200 * 40  # kept by `square`
    assert kept(lambda: norm_and_layers(x, w, made)) == 4 * (
        x.numel() + 200 + 3 * 200 * 4 + frozen - 3 * 40 + squares
    )


def test_recomputed_activations_are_freed_after_the_last_reader():
    """Otherwise all outputs would exist when backward ends: recomputing would save no memory."""
    made = projections(3)
    normed = rms_norm(noise(9, 48), noise(48, seed=1), 1e-5)
    gate = gated(noise(9, 48), noise(9, 48, seed=2))
    recipes = [y.recompute_note.recipe for y in (normed, gate)]
    (torch.stack([one(normed) for one in made]).sum() + made[0](gate).sum()).backward()
    assert [recipe.readers for recipe in recipes] == [0, 0]
    assert [recipe.value for recipe in recipes] == [None, None] and recipes[1].active is None


def test_an_activation_changed_in_place_is_not_recomputed():
    made, x, w = projections(1), noise(9, 48), noise(48, seed=1)

    def form(x: Tensor) -> Tensor:
        y = rms_norm(x, w, 1e-5)
        with torch.no_grad():
            y.mul_(3)  # as a hook may do
        return made[0](y)

    results = []
    for plain in (False, True):
        made[0].zero_grad()
        with reference_ops() if plain else nullcontext():
            form(x).sum().backward()
        results.append(made[0].adapters["default"].lora_A.grad.clone())
    assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()
