"""Tests of modules and biases that train with an adapter, under casts and in state dicts.

Oracle: the model without an adapter, cast in the same way. Property: a copy stays in fp32, whatever
the model is cast to, and the original follows the model. A state dict names originals and copies,
and so means the same whichever adapter is active. Round trip: the state of one adapter, loaded
while another one is active. Errors: a state without a copy.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import minilora as ml
from helpers.kinds import shake
from helpers.tiny import oracle, tokens, twin
from minilora.models.decoder import CausalLM

TOKENS = tokens(2, 7)
PARTS = ["lm_head", "embed_tokens", "norm"]
HEAD = "lm_head.modules_to_save.a.weight"


def with_parts(dtype: torch.dtype = torch.float32) -> CausalLM:
    """Return a model of a dtype whose modules PARTS train with an adapter."""
    model = twin(oracle()).to(dtype)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=PARTS))
    return model


def trainable_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


# ---- oracle: the model without an adapter, cast in the same way

CASTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("to", CASTS)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_model_runs_and_trains_its_modules_in_fp32(start, to):
    expected = twin(oracle()).to(start).to(to)(TOKENS)
    model = with_parts(start)
    model.to(to)
    out = model(TOKENS)
    assert out.dtype == to
    # The copies compute in fp32 and round each output once. 8 roundings of the logits' size.
    bound = 8 * torch.finfo(to).eps * expected.abs().max()
    assert (out - expected).abs().max() <= bound
    assert trainable_dtypes(model) == {torch.float64 if to == torch.float64 else torch.float32}
    out.float().sum().backward()
    with ml.disable_adapters(model):
        assert torch.equal(model(TOKENS), expected)
    ml.eject(model)
    assert torch.equal(model(TOKENS), expected)


def test_cast_while_the_adapter_is_off_reaches_it_later():
    model = with_parts()
    ml.set_adapter(model, [])
    model.bfloat16()
    ml.set_adapter(model, "default")
    assert model(TOKENS).dtype == torch.bfloat16
    assert trainable_dtypes(model) == {torch.float32}


def test_cast_of_a_copied_model_leaves_the_original_model_alone():
    model = with_parts()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    again.bfloat16()
    assert again(TOKENS).dtype == torch.bfloat16
    with ml.disable_adapters(model):
        assert model(TOKENS).dtype == torch.float32


class KeywordHead(nn.Module):
    """A model that calls its head by keyword and gets a tuple, as attention is called."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, x=None, scales=()):
            return self.out(x) * scales[0], None

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = self.Head()

    def forward(self, x):
        x = self.body(x)
        return self.head(x=x, scales=(x,))[0]


def test_trained_module_of_a_16_bit_model_takes_keywords_and_tuples():
    model = KeywordHead()
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    model.bfloat16()
    assert model(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_biases_follow_the_dtype_of_a_cast_model():
    model = twin(oracle(attention_bias=True))
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"], bias="all"))
    model.bfloat16()
    with ml.disable_adapters(model):
        assert model(TOKENS).dtype == torch.bfloat16
        model.half()
        assert model(TOKENS).dtype == torch.float16
    assert model(TOKENS).dtype == torch.float16


def test_compiler_reads_a_trained_module_in_one_graph():
    torch._dynamo.reset()
    model = with_parts(torch.bfloat16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), model(TOKENS))


# ---- state dicts


@pytest.fixture
def two_adapters() -> CausalLM:
    """A model with "a", which trains lm_head, and "b", which does not and is active."""
    model = twin(oracle())
    a = ml.LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ml.inject(model, a, name="a")
    shake(model)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"]), name="b")
    return model


def test_state_dict_is_the_same_whichever_adapter_is_active(two_adapters):
    states = {}
    for name in ("a", "b", []):
        ml.set_adapter(two_adapters, name)
        states[str(name)] = copy.deepcopy(two_adapters.state_dict())
    base = twin(oracle()).state_dict()
    assert HEAD in states["a"]
    assert torch.equal(states["a"]["lm_head.weight"], base["lm_head.weight"])
    for state in states.values():
        assert state.keys() == states["a"].keys()
        assert all(torch.equal(value, states["a"][key]) for key, value in state.items())


def test_state_of_one_adapter_loads_while_another_is_active(two_adapters):
    base_head = twin(oracle()).lm_head.weight
    ml.set_adapter(two_adapters, "a")
    expected = two_adapters(TOKENS)
    state = copy.deepcopy(two_adapters.state_dict())
    with torch.no_grad():
        two_adapters.lm_head.weight.add_(1)
    ml.set_adapter(two_adapters, "b")
    two_adapters.load_state_dict(state)
    assert torch.equal(two_adapters.lm_head.weight, base_head)
    ml.set_adapter(two_adapters, "a")
    assert torch.equal(two_adapters(TOKENS), expected)


@pytest.mark.parametrize("active", ["a", "b"])
def test_state_of_the_base_changes_the_original_and_no_copy(two_adapters, active):
    ml.set_adapter(two_adapters, active)
    before = two_adapters.state_dict()[HEAD].clone()
    other = twin(oracle(seed=1))
    two_adapters.load_state_dict(other.state_dict())
    assert torch.equal(two_adapters.state_dict()[HEAD], before)
    assert ml.base_state_dict(two_adapters).keys() == other.state_dict().keys()
    with ml.disable_adapters(two_adapters):
        assert torch.equal(two_adapters(TOKENS), other(TOKENS))


def test_state_of_trained_biases_comes_back():
    model = twin(oracle(attention_bias=True))
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"], bias="all"))
    shake(model)
    state = copy.deepcopy(model.state_dict())
    assert "model.layers.0.self_attn.k_proj.bias.modules_to_save.default" in state
    expected = model(TOKENS)
    shake(model, seed=1)
    assert not torch.equal(model(TOKENS), expected)
    model.load_state_dict(state)
    assert torch.equal(model(TOKENS), expected)
    model.load_state_dict(twin(oracle(attention_bias=True)).state_dict())  # bare names
    assert torch.equal(model(TOKENS), expected)


def test_state_without_the_copy_of_an_adapter_is_refused(two_adapters):
    state = dict(two_adapters.state_dict())
    del state[HEAD]
    with pytest.raises(RuntimeError, match=f"Missing key.*{HEAD}"):
        two_adapters.load_state_dict(state)
    state[HEAD] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=f"size mismatch for {HEAD}"):
        two_adapters.load_state_dict(state)


def test_merged_and_ejected_models_have_plain_states(two_adapters):
    expected = list(twin(oracle()).state_dict())
    ml.set_adapter(two_adapters, "a")
    merged = ml.merge(two_adapters)
    ml.eject(two_adapters)
    for model in (merged, two_adapters):
        assert list(model.state_dict()) == expected
        assert not model._state_dict_hooks and not model._load_state_dict_pre_hooks
