"""Proves that NF4Linear equals bitsandbytes' Linear4bit computed in x.dtype.

Its scales survive casts that ruin an fp32 buffer, and backward keeps no dense weight. Its state
dict is bitsandbytes' and is read strictly.
"""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.quantized_layers import CASTS, copies
from minilora.lora.inject import inject
from minilora.lora.layer import LoRALayer
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model


def quantized(out_features=96, in_features=128, **kwargs) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(in_features, out_features), **kwargs)


# ---- oracle


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_goes_both_ways_with_bitsandbytes(double_quant):
    import bitsandbytes as bnb

    linear = nn.Linear(128, 96, dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(
        128, 96, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.float32
    )
    theirs = theirs.to(torch.bfloat16)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")  # bitsandbytes quantises on this move
    state = theirs.state_dict()
    ours = NF4Linear.from_linear(
        nn.Linear(128, 96, dtype=torch.bfloat16), double_quant=double_quant
    )
    ours.load_state_dict(state)
    dense = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize(), dense)
    written = ours.state_dict()
    assert set(written) == set(state)
    assert all(
        torch.equal(written[key], state[key]) and written[key].dtype == state[key].dtype
        for key in state
    )
    # loading copies the tensors
    assert {t.data_ptr() for t in state.values()}.isdisjoint(
        p.data_ptr() for p in ours.parameters()
    )
    x = torch.randn(5, 128)
    torch.testing.assert_close(
        ours(x), nn.functional.linear(x, dense.float(), theirs.bias.float()), rtol=0, atol=1e-2
    )


def test_forward_and_gradient_are_those_of_the_dense_layer():
    layer = quantized()
    dense = nn.Linear(128, 96)
    dense.weight.data, dense.bias.data = layer.dequantize(), layer.bias.data
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = torch.randn(2, 5, 96)
    outs = [model(x) for model in (layer, dense)]
    grads = [torch.autograd.grad((out * y).sum(), x)[0] for out in outs]
    assert torch.equal(*outs) and torch.equal(*grads)  # the same matmuls on the same numbers
    (bias_grad,) = torch.autograd.grad((layer(x) * y).sum(), layer.bias)
    torch.testing.assert_close(bias_grad, y.sum((0, 1)))


# ---- property


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([32, 64, 256]),
    st.booleans(),
    st.booleans(),
)
def test_any_size_block_and_bias(out_features, in_features, blocksize, double_quant, bias):
    linear = nn.Linear(in_features, out_features, bias=bias)
    layer = NF4Linear.from_linear(linear, blocksize, double_quant)
    x = torch.randn(3, in_features)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(), linear.bias))
    assert len(layer.packed) % 16 == 0
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and again.weight.nbytes == layer.weight.nbytes


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_casts_leave_codes_and_scales_alone(cast, double_quant):
    layer = quantized(double_quant=double_quant)
    before = layer.dequantize(torch.float32)
    cast(layer)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer.bias.dtype != torch.float32
    assert layer(torch.randn(2, 128, dtype=layer.bias.dtype)).dtype == layer.bias.dtype


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (40, 96), (16, 2080), (24, 33)])
def test_one_token_without_gradients_runs_the_fused_gemv(size, bias):
    out_features, in_features = size
    layer, token = (
        NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias)),
        torch.randn(1, 1, in_features),
    )
    with Ops() as ops:
        with torch.no_grad():
            fused, two = layer(token), layer(token.expand(3, 3, -1))[:1]
        trained = layer(token)
    assert ops.names == ["gemv_nf4", "dequantize_nf4", "dequantize_nf4"]
    assert fused.shape == trained.shape == (1, 1, out_features)
    W, b = layer.dequantize(torch.float64), None if layer.bias is None else layer.bias.double()
    # fp32 sums of n products in any order, plus a bias below 1: n eps (sum |w x| + 1), eps = 2^-24
    bound = (in_features + 1) * 2**-24 * (F.linear(token.double().abs(), W.abs()) + 1)
    for y in (fused, two[:, :1], trained):
        assert ((y.double() - F.linear(token.double(), W, b)).abs() <= bound).all()


class Ops(TorchDispatchMode):
    """Dispatch mode that records the calls of minilora's ops."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minilora":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_backward_saves_no_dense_weight():
    layer = quantized(512, 512)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 512, requires_grad=True)).sum()
    assert saved and max(t.nbytes for t in saved) <= 512 * 512 // 2 < 512 * 512 * 4


@pytest.mark.slow  # inductor compiles for half a minute on a cold cache
def test_compiled_backward_saves_no_dense_weight():
    layer = quantized(512, 512)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 512, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = compiled(x)
    assert max((t.nbytes for t in saved), default=0) <= 512 * 512 // 2
    torch.testing.assert_close(y, layer(x))


def test_autocast_casts_x_and_not_the_scales():
    layer = quantized()
    x = torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer.bfloat16()(x.bfloat16()))


def test_checkpoint_and_compile_agree():
    layer, x = quantized(), torch.randn(5, 128, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    for y in (checkpointed, compiled):
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_forward_train_and_eval_change_nothing():
    layer = quantized()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for mode in (layer.eval, layer.train, layer.eval):
        with torch.no_grad():
            mode()(torch.randn(2, 128, dtype=torch.float32))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_lora_layer_wraps_an_nf4_linear():
    layer = LoRALayer(quantized(), r=4)
    assert "bits=4" in repr(layer) and layer.weight.shape == (96, 128)
    layer(torch.randn(2, 128)).sum().backward()
    assert layer.adapters["default"].lora_B.grad is not None


# ---- round trip


def test_copies_and_files_keep_every_bit():
    layer, x = quantized(), torch.randn(5, 128)
    for other in copies(
        layer, quantized, lambda: NF4Linear.from_linear(nn.Linear(128, 96, device="meta"))
    ):
        assert torch.equal(other(x), layer(x))
        assert other(x).device.type == "cpu"


def test_quantize_model_takes_every_linear_but_the_output(tiny_llama_config):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**tiny_llama_config | {"tie_word_embeddings": False}))
    names = quantize_model(model, skip=["k_proj", "layers.0.mlp.up_proj"])
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert linears == {
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
    }
    assert (
        all(isinstance(model.get_submodule(name), NF4Linear) for name in names) and len(names) == 11
    )
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    injected = copy.deepcopy(model)
    inject(injected)
    assert injected(torch.arange(8)[None]).logits.equal(model(torch.arange(8)[None]).logits)


def test_a_layer_under_two_names_stays_dense_under_both():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(64, 64)})
    assert quantize_model(model) == ["c"] and model["a"] is model["b"] is layer


def test_tied_heads_stay_dense():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(8, 64), "body": nn.Linear(64, 64), "head": nn.Linear(64, 8)}
    )
    model["head"].weight = model["embed"].weight
    assert quantize_model(model) == ["body"]


# ---- error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "Missing key.*weight"),
        (lambda s: s.pop("weight.absmax"), "missing .*absmax"),
        (lambda s: s.pop("bias"), "Missing key.*bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda s: s.update({"weight.absmax": s["weight.absmax"].to(torch.float32)}), "uint8"),
        (
            lambda s: s.update({"weight.nested_absmax": s["weight.nested_absmax"].bfloat16()}),
            "finite fp32",
        ),
        (lambda s: s.update(quantized(64, 128).state_dict()), "expected .*96, 128.* got .*64, 128"),
        (lambda s: s.update(quantized(blocksize=32).state_dict()), "blocksize"),
        (lambda s: s.update(weight=torch.zeros(96, 128)), "weight"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_read_strictly(change, message, assign):
    layer = quantized()
    before = layer.dequantize()
    state = dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.dequantize(), before)


def test_misuse_raises():
    with pytest.raises(ValueError, match="first index|index"):
        linear = nn.Linear(64, 4)
        linear.weight.data[1, 2] = float("nan")
        NF4Linear.from_linear(linear)
    with pytest.raises(ValueError, match="skip: 'lm_hed' matches nothing. Nearest: 'head'|skip"):
        quantize_model(nn.ModuleDict({"head": nn.Linear(64, 4)}), skip=["lm_hed"])
    with pytest.raises(ValueError, match="no nn.Linear to quantise"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(RuntimeError, match="DDP"):
        quantized()._replicate_for_data_parallel()
    assert (
        json.loads(
            bytes(quantized().state_dict()["weight.quant_state.bitsandbytes__nf4"].tolist())
        )["blocksize"]
        == 64
    )
