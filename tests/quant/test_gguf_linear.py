"""Tests that a GGUFLinear computes what the dense layer of the same values does.

Its bytes survive casts, copies and files, and backward keeps no dense weight.
"""

import pytest
import torch
from torch import nn

from helpers.gguf_blocks import random_weight
from helpers.quantized_layers import CASTS, copies
from minilora.lora.config import LoRAConfig
from minilora.lora.fused_linear import lora_linear, plain_lora_linear
from minilora.lora.inject import inject
from minilora.lora.layer import LoRALayer
from minilora.quant.gguf_embedding import GGUFEmbedding
from minilora.quant.gguf_linear import GGUFLinear
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantized_linear import QuantizedLinear
from minilora_kernels.gguf import FORMATS


def kept(type_name="Q4_K", rows=48, seed=0, bias=True, heads=0) -> GGUFLinear:
    weight = random_weight(type_name, rows, 1, heads, seed)
    return GGUFLinear(weight, torch.linspace(-1, 1, rows) if bias else None)


def dense_twin(layer: QuantizedLinear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight.data = layer.dequantize(torch.float32)
    if layer.bias is not None:
        twin.bias.data = layer.bias.data.clone()
    return twin


# ---- property


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("heads", [0, 6])
def test_forward_and_gradient_are_those_of_the_dense_layer(name, heads):
    layer = kept(name, heads=heads)
    layer.bias.requires_grad_()
    dense = dense_twin(layer)
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    y = torch.randn(2, 5, 48)
    outs = [module(x) for module in (layer, dense)]
    grads = []
    for out, module in zip(outs, (layer, dense), strict=True):
        grads.append(torch.autograd.grad((out * y).sum(), (x, module.bias)))
    assert torch.equal(*outs) and torch.equal(grads[0][0], grads[1][0])  # the same matmuls
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_both_formats_follow_the_protocol():
    for layer in (kept(), NF4Linear.from_linear(nn.Linear(256, 48))):
        out = torch.empty(48, 256)
        assert layer.dequantize(out=out) is out
        assert torch.equal(out, layer.dequantize(torch.float32))
        with pytest.raises(ValueError, match="expected shape"):
            layer.dequantize(out=torch.empty(3, 256))
        stored = [p for name, p in layer.named_parameters() if name != "bias"]
        assert all(p.dtype == torch.uint8 and not p.requires_grad for p in stored)
        assert layer.storage()["quantize"] in ("nf4", "keep") and ":" in layer.fingerprint()
        with pytest.raises(RuntimeError, match="DDP"):
            layer._replicate_for_data_parallel()


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_bytes_alone(cast):
    layer = kept()
    before = layer.dequantize(torch.float32)
    cast(layer)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer(torch.randn(2, 256, dtype=layer.bias.dtype)).dtype == layer.bias.dtype


def test_autocast_computes_in_its_dtype():
    layer, x = kept(), torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), dense_twin(layer).bfloat16()(x))


def test_backward_keeps_bytes_and_no_dense_weight():
    layer, saved = kept(), []
    x = torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in saved] == [layer.blocks.data_ptr()]


@pytest.mark.parametrize("heads", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adapter_step_equals_the_reference(dtype, heads):
    layer = LoRALayer(kept(bias=False, heads=heads), r=4)
    adapter = layer.adapters["default"]
    nn.init.normal_(adapter.lora_B, std=0.1)
    results = []
    for function in (lora_linear, plain_lora_linear):
        x = torch.linspace(-1, 1, 6 * 256).view(6, 256).to(dtype).requires_grad_()
        out = function(layer, x)
        grads = torch.autograd.grad(out.float().square().sum(), (x, adapter.lora_A, adapter.lora_B))
        results.append((out, *grads))
    assert "_LoRALinear" in str(results[0][0].grad_fn)
    for found, expected in zip(*results, strict=True):
        size = expected.abs().max().item()
        bound = 256 * torch.finfo(dtype).eps * size
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_a_model_with_kept_layers_takes_adapters_by_name():
    model = nn.ModuleDict({"a": kept(), "b": nn.Linear(48, 8), "c": kept("Q8_0")})
    assert set(inject(model, LoRAConfig(target_modules="all-linear"))) == {"a", "b", "c"}
    assert "bits=4.5" in repr(model["a"]) and "bits=8.5" in repr(model["c"])
    assert model["a"].weight.shape == (48, 256)


def test_checkpoint_and_compile_agree():
    layer, x = kept(heads=6), torch.randn(9, 256, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    for y in (checkpointed, compiled):
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)
    embedding, ids = GGUFEmbedding(random_weight("Q8_0", 48)), torch.tensor([[3, 47], [0, 3]])
    looked_up = torch.compile(embedding, fullgraph=True, backend="aot_eager")(ids)
    assert torch.equal(looked_up, embedding.dequantize()[ids])


# ---- round trip


def test_copies_and_files_keep_every_byte():
    layer, x = kept(heads=6), torch.randn(5, 256)
    others = copies(layer, lambda: kept(seed=1, heads=6), lambda: kept(seed=1, heads=6).to("meta"))
    for other in others:
        assert torch.equal(other(x), layer(x))


# ---- error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "Missing key.*weight"),
        (lambda s: s.pop("weight.gguf"), "expected the keys"),
        (lambda s: s.pop("bias"), "Missing key.*bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda s: s.update(kept(rows=24).state_dict()), "expected .*48, 256.* got .*24, 256"),
        (lambda s: s.update(kept("Q5_K").state_dict()), "expected .*Q4_K.* got .*Q5_K"),
        (lambda s: s.update(kept(heads=6).state_dict()), r"expected .*, 0\), got .*, 6\)"),
        (lambda s: s.update(weight=s["weight"].float()), "uint8"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_read_strictly(change, message, assign):
    layer = kept()
    before = layer.dequantize()
    state = dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.dequantize(), before)
