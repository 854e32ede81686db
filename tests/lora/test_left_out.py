"""Tests of the warning for the parts of a model that get no adapter and stay dense.

Oracle: the bytes that are counted by hand, from the parameters of transformers' models. Property:
a model of linear layers alone gives no warning. Error: an expert parameter is no target.
"""

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import minilora as ml
from helpers.kinds import build
from helpers.tiny import oracle
from helpers.toy import llama
from minilora.lora.registry import lora_layers

IDS = torch.arange(10).view(2, 5)
ALL = ml.LoRAConfig(r=2, target_modules="all-linear")
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "head_dim": 8,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
# The router of each family: a module of its own, or a subclass of nn.Linear that returns a tuple.
ROUTERS = {
    "mixtral": "mlp.gate",
    "qwen3_moe": "mlp.gate",
    "olmoe": "mlp.gate",
    "gpt_oss": "mlp.router",
    "phimoe": "mlp.router",
    "llama4_text": "feed_forward.router",
}
LINEAR_ROUTERS = ["phimoe", "llama4_text"]


def mixture(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | EXPERTS)
    return AutoModelForCausalLM.from_config(config).eval()


def share_of_experts(model: nn.Module, router: str) -> str:
    """Return the share of the bytes in matrices of experts and routers, as the warning prints it."""
    inside = 0
    total = sum(buffer.nbytes for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        total += parameter.nbytes
        if (".experts." in name or f"{router}." in name) and parameter.dim() >= 2:
            inside += parameter.nbytes
    return f"{inside / total:.1%}"


# ---- oracle: bytes counted by hand


@pytest.mark.parametrize("family", ROUTERS)
def test_experts_and_routers_are_reported_with_their_share(family):
    model = mixture(family)
    share = share_of_experts(model, ROUTERS[family])
    assert float(share.rstrip("%")) > 50
    text = rf"{share} of the model's bytes.*2 × model.layers.\*.*experts.gate_up_proj \(4, "
    with pytest.warns(UserWarning, match=f"all-linear.*{text}") as caught:
        names = ml.inject(model, ALL)
    assert len(caught) == 1
    assert not [name for name in names if "router" in name or name.endswith("gate")]
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
    ml.eject(model)
    with pytest.warns(UserWarning, match=f"stays dense: {text}") as caught:
        ml.quantize_model(model)
    assert len(caught) == 1
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_a_layer_with_packed_codes_in_buffers_is_reported():
    """The layers of GPTQ and AWQ have no `weight`."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 64
            self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))

    model = nn.Sequential(Packed(), nn.Linear(64, 64, bias=False))
    with pytest.warns(UserWarning, match=r"11.1% of .*: 0.qweight \(8, 64\)"):
        assert ml.inject(model, ALL) == ["1"]


@pytest.mark.parametrize("tied", [False, True])
def test_quantize_model_reports_a_tied_head_with_its_share(tied):
    model = oracle(tie_word_embeddings=tied)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ml.quantize_model(model)
    if not tied:
        assert not caught
        return
    total = sum(tensor.nbytes for tensor in [*oracle().parameters(), *oracle().buffers()])
    head = 97 * 64 * 4
    share = f"{head / (total - head):.1%}"
    assert len(caught) == 1 and share in str(caught[0].message)
    assert "lm_head.weight (97, 64)" in str(caught[0].message)


# ---- property


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "phi3", "images", "tied"])
def test_all_linear_gives_no_warning_where_it_takes_every_linear_layer(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ml.inject(build(kind), ml.LoRAConfig(r=2, target_modules="all-linear"))


def test_what_the_user_leaves_out_by_name_is_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.inject(mixture("mixtral"), ml.LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
        ml.quantize_model(oracle(), skip=["q_proj", "down_proj"])
        fields = {"exclude_modules": ["q_proj"], "modules_to_save": ["v_proj"]}
        ml.inject(oracle(), ml.LoRAConfig(r=2, target_modules="all-linear", **fields))


def test_a_plan_of_a_tied_model_gives_no_warning():
    from minilora.tools.memory_plan.step import shapes

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes(llama().config, ALL, torch.float32, (64, True))


# ---- error


@pytest.mark.parametrize("family", LINEAR_ROUTERS)
def test_a_router_that_returns_a_tuple_is_refused_by_name(family):
    model = mixture(family)
    with pytest.raises(ValueError, match="router: .*returns tuple and not one tensor"):
        ml.inject(model, ml.LoRAConfig(r=2, target_modules=["router"]))
    assert not lora_layers(model)


def test_an_expert_parameter_is_no_target():
    model = mixture("mixtral")
    message = "target_modules: 'gate_up_proj' is a parameter (4, 96, 32) and not a layer"
    with pytest.raises(ValueError, match=re.escape(message)):
        ml.inject(model, ml.LoRAConfig(r=2, target_modules=["q_proj", "gate_up_proj"]))
