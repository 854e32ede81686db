"""Tests of LoRALayer, h = W x + s·B A x.

The layer equals PEFT's layer and a merged weight. With a new or inactive adapter its output is that
of the base, bit for bit. Adapter weights stay in fp32 under every cast. Copies, files, autocast,
meta tensors, checkpointing and compilation work as for torch's own modules.
"""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora.lora.layer import LoRAAdapter, LoRALayer


def trained(base: nn.Module, **kwargs) -> LoRALayer:
    """Return a LoRALayer whose B is not zero."""
    layer = LoRALayer(base, **kwargs)
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.lora_B)
    return layer


# ---- oracle


@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_peft(use_rslora):
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(48, 32))
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=use_rslora, target_modules=["0"])
    theirs = get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    ours = trained(copy.deepcopy(base)[0], r=4, lora_alpha=12, use_rslora=use_rslora)
    theirs.lora_A["default"].weight.data = ours.adapters["default"].lora_A.data.clone()
    theirs.lora_B["default"].weight.data = ours.adapters["default"].lora_B.data.clone()
    x = torch.randn(5, 48)
    # fp32: one side computes s z B, the other s (z B).
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_initial_values_are_those_of_nn_linear():
    adapter = LoRAAdapter(10_000, 64, r=16)
    bound = 0.01  # 1/√in
    assert adapter.lora_A.abs().max() <= bound
    # 160,000 draws: 1/√160,000 = 0.25 %.
    assert abs(adapter.lora_A.std() - bound / 3**0.5) < 0.01 * bound
    assert not adapter.lora_B.any()


# ---- property


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_output_equals_the_equation(in_features, out_features, data, dtype):
    r = data.draw(st.integers(1, min(in_features, out_features)))
    alpha = data.draw(st.floats(0.1, 64))
    layer = trained(
        nn.Linear(in_features, out_features, dtype=dtype), r=r, lora_alpha=alpha
    ).double()
    A, B = layer.adapters["default"].lora_A, layer.adapters["default"].lora_B
    W = layer.weight + alpha / r * B @ A
    x = torch.randn(3, in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ W.T + layer.bias)  # fp64, sums in another order


def test_new_or_inactive_adapter_gives_the_base_output_bit_for_bit():
    base, x = nn.Linear(48, 32), torch.randn(5, 48)
    expected = base(x)
    new = LoRALayer(base)
    assert torch.equal(new(x), expected)
    layer = trained(base)
    assert not torch.equal(layer(x), expected)
    layer.use([])
    assert torch.equal(layer(x), expected)


def test_active_adapters_add_up_and_only_they_train():
    layer = trained(nn.Linear(48, 32))
    layer.add_adapter("second", LoRAAdapter(48, 32, r=2, seed=5))
    nn.init.normal_(layer.adapters["second"].lora_B)
    x = torch.randn(5, 48)
    layer.use([])
    base = layer(x)
    single = {}
    for name in ("default", "second"):
        layer.use([name])
        single[name] = layer(x) - base
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
            f"adapters.{name}.lora_A",
            f"adapters.{name}.lora_B",
        }
    layer.use(["default", "second"])
    torch.testing.assert_close(
        layer(x) - base, single["default"] + single["second"], rtol=1e-5, atol=1e-5
    )


def test_initialisation_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    a = LoRAAdapter(48, 32, seed=7).lora_A
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(LoRAAdapter(48, 32, seed=7).lora_A, a)
    assert not torch.equal(LoRAAdapter(48, 32, seed=8).lora_A, a)


def test_gradients_are_correct_and_the_base_gets_none():
    layer = trained(nn.Linear(6, 5), r=3).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    adapter = layer.adapters["default"]
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x), (x, adapter.lora_A, adapter.lora_B))
    layer(x).sum().backward()
    assert layer.weight.grad is None and adapter.lora_A.grad is not None


def test_forward_train_and_eval_change_no_weight():
    layer = trained(nn.Linear(48, 32), lora_dropout=0.5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for mode in (layer.train, layer.eval, layer.train):
        mode()(torch.randn(2, 48)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_dropout_follows_the_mode_of_its_base():
    layer = trained(nn.Linear(48, 32).eval(), lora_dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


# ---- module behaviour: casts, copies, meta tensors, compilation


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)]
)
def test_casts_change_the_base_and_keep_adapters_in_fp32(cast):
    layer = trained(nn.Linear(48, 32))
    layer(torch.randn(2, 48)).sum().backward()
    masters = {name: p.clone() for name, p in layer.adapters.named_parameters()}
    cast(layer)
    assert layer.weight.dtype in (torch.float16, torch.bfloat16)
    for name, parameter in layer.adapters.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, masters[name])
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    assert layer(torch.randn(2, 48, dtype=layer.weight.dtype)).dtype == layer.weight.dtype


def test_copies_and_files_keep_every_bit():
    layer, x = trained(nn.Linear(48, 32)), torch.randn(5, 48)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = LoRALayer(nn.Linear(48, 32))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x)) and other.active == layer.active


def test_meta_then_assign_or_to_empty():
    layer, x = trained(nn.Linear(48, 32)), torch.randn(5, 48)
    with torch.device("meta"):
        empty = LoRALayer(nn.Linear(48, 32))
    assert empty(torch.randn(5, 48, device="meta")).shape == (5, 32)
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    copied = empty.to_empty(device="cpu")
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(assigned(x), layer(x)) and torch.equal(copied(x), layer(x))


def test_autocast_checkpoint_and_compile_agree():
    layer, x = trained(nn.Linear(48, 32)), torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    expected = layer(x)
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(checkpointed, expected) and torch.equal(compiled(x), expected)


def test_one_compilation_for_each_set_of_active_adapters():
    layer, x = trained(nn.Linear(48, 32)), torch.randn(5, 48)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for names in (["default"], [], ["default"], []):
        layer.use(names)
        compiled(x)
    assert counter.frame_count == 2


def test_repr_shows_rank_alpha_active_adapters_and_bits():
    text = repr(LoRALayer(nn.Linear(48, 32), r=4, lora_alpha=16))
    assert all(part in text for part in ("r=4", "lora_alpha=16", "active=('default',)", "bits=32"))


# ---- error


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "expected 1 or more, got 0"),
        ({"lora_alpha": 0}, "lora_alpha != 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha != 0"),
        ({"lora_dropout": 1.0}, "lora_dropout < 1"),
        ({"name": "a.b"}, "dotless"),
    ],
)
def test_bad_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LoRALayer(nn.Linear(48, 32), **kwargs)


def test_misuse_raises():
    with pytest.raises(ValueError, match=r"expected a linear base .*, got Embedding: use inject\."):
        LoRALayer(nn.Embedding(4, 4))
    layer = LoRALayer(nn.Linear(48, 32))
    with pytest.raises(ValueError, match="new, dotless name"):
        layer.add_adapter("default", LoRAAdapter(48, 32))
    with pytest.raises(ValueError, match=r"unknown adapters \['typo'\]"):
        layer.use(["typo"])
    assert layer.active == ("default",)
    with pytest.raises(RuntimeError, match="DDP"):
        layer._replicate_for_data_parallel()
