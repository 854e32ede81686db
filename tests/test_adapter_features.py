"""Proves that an adapted model still holds its base: its tensors under their plain names, to be read and to be loaded;
and that biases and whole modules that train with an adapter are PEFT's in the file, and are switched and undone with
the adapter, bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn

from minilora.adapters import (
    adapter_state_dict,
    base_state_dict,
    disabled_adapters,
)
from minilora.config import LoRAConfig
from minilora.inject import eject, inject, lora_layers
from minilora.quant import quantize_model
from tiny import oracle, tokens, twin

TOKENS = tokens(2, 9)


def same(found: dict, expected: dict) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with everything that trains moved, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return twin(oracle(attention_bias=True))


# ---- the base's state


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_the_base_is_there_under_its_plain_names(llama, quantised):
    model = copy.deepcopy(llama)
    if quantised:
        quantize_model(model)
    expected = copy.deepcopy(model.state_dict())
    inject(model, LoRAConfig(target_modules="all-linear"))
    inject(model, LoRAConfig(target_modules=["q_proj"]), name="second")
    shake(model)
    active = {path: layer.active for path, layer in lora_layers(model).items()}
    assert same(base_state_dict(model), expected)
    assert {path: layer.active for path, layer in lora_layers(model).items()} == active
    weight = base_state_dict(model)["model.norm.weight"]
    assert weight.data_ptr() == model.get_parameter("model.norm.weight").data_ptr()  # live, no copy
    eject(model)
    assert same(base_state_dict(model), expected)  # and without adapters it is the state itself


def test_the_base_of_a_module_under_two_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))})
    expected = model.state_dict()
    inject(model, LoRAConfig(r=2, target_modules=["a", "b.0"]))
    assert same(base_state_dict(model), expected)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_a_bare_state_goes_to_the_base_and_leaves_the_adapters(llama, quantised):
    model, other = copy.deepcopy(llama), twin(oracle(seed=1, attention_bias=True))
    if quantised:
        quantize_model(model)
        quantize_model(other)
    inject(model, LoRAConfig(target_modules="all-linear"))
    model = copy.deepcopy(shake(model))  # the hook survives a copy
    before = {key: value.clone() for key, value in adapter_state_dict(model).items()}
    bare = dict(other.state_dict())
    keys = list(bare)
    model.load_state_dict(bare)
    assert list(bare) == keys  # what the caller gave is not changed
    assert same(base_state_dict(model), other.state_dict())
    assert same(adapter_state_dict(model), before)
    with disabled_adapters(model):
        assert torch.equal(model(TOKENS), other(TOKENS))


def test_a_full_state_still_loads_and_a_half_one_still_fails(llama):
    model = copy.deepcopy(llama)
    inject(model)
    full = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(full)
    assert same(model.state_dict(), full)
    bare = base_state_dict(model)
    del bare["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(RuntimeError, match="q_proj.base_layer.weight"):
        model.load_state_dict(bare)
    buffer = io.BytesIO()
    torch.save(model, buffer)  # the hook can be pickled
