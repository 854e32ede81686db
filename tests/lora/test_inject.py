"""Tests of inject and eject.

inject adapts the same layers as PEFT for the same config and ignores no entry of it. eject restores
the model exactly.
"""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora.lora.active import delete_adapter, disable_adapters, list_adapters, set_adapter
from minilora.lora.config import LoRAConfig, TaskType
from minilora.lora.inject import eject, inject
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import lora_layers

CONFIGS = {
    "default": {},
    "list": {"target_modules": ["q_proj", "o_proj"]},
    "whole name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.[02]\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"],
    },
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3},
        "alpha_pattern": {"layers.2.mlp.up_proj": 5},
    },
}


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def adapted(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Return (rank, scaling) for each adapted layer."""
    layers = lora_layers(model).items()
    return {
        path: (layer.adapters["default"].r, layer.adapters["default"].scaling)
        for path, layer in layers
    }


# ---- oracle


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_inject_adapts_the_same_layers_as_peft(llama, fields):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    theirs = get_peft_model(copy.deepcopy(llama), LoraConfig(**fields, r=4, task_type="CAUSAL_LM"))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }
    ours = copy.deepcopy(llama)
    names = inject(ours, LoRAConfig(**fields, r=4, task_type="CAUSAL_LM"))
    assert adapted(ours) == expected and set(names) == set(expected)


def test_adapts_gpt2_as_peft_does(gpt2):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        copy.deepcopy(gpt2), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = copy.deepcopy(gpt2)
    inject(ours, LoRAConfig(target_modules="all-linear"))
    expected = {
        name.split(".lora_A")[0] for name, _ in theirs.named_parameters() if ".lora_A" in name
    }
    assert {f"base_model.model.{path}" for path in lora_layers(ours)} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_prj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 99]},
        {"target_modules": ["q_proj"], "lora_alpha": 0},
    ],
    ids=[
        "a typo among targets",
        "a typo in modules_to_save",
        "a layer too many",
        "alpha 0",
    ],
)
def test_configs_that_peft_accepts_silently_are_refused(llama, fields):
    """The faults: a typo next to a correct name, an unknown layer, scaling 0."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(copy.deepcopy(llama), LoraConfig(**fields))
    with pytest.raises(ValueError):
        inject(copy.deepcopy(llama), LoRAConfig(**fields))


def test_adapter_injected_in_eval_mode_has_no_dropout(llama):
    """In PEFT, dropout is active after injection into a model in eval mode: two calls differ."""
    from peft import LoraConfig, get_peft_model

    fields = {"target_modules": ["q_proj"], "lora_dropout": 0.5}
    theirs, ours = get_peft_model(copy.deepcopy(llama), LoraConfig(**fields)), copy.deepcopy(llama)
    inject(ours, LoRAConfig(**fields))
    tokens, outputs = torch.arange(8)[None], []
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        outputs.append([model(tokens).logits for _ in range(2)])
    assert not torch.equal(*outputs[0]) and torch.equal(*outputs[1])


# ---- property and round trip

names = st.lists(
    st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]),
    min_size=1,
)


@given(names, st.integers(1, 16), st.integers(0, 3))
def test_eject_undoes_exactly(llama, targets, r, seed):
    model = copy.deepcopy(llama)
    model.model.embed_tokens.requires_grad_(False)  # eject must restore this flag
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    injected = inject(model, LoRAConfig(target_modules=targets, r=r), seed=seed)
    assert torch.equal(model(tokens).logits, expected)  # B = 0
    assert {name.rpartition(".")[2] for name in injected} == set(targets)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.adapters.default.lora_{x}" for path in injected for x in "AB"}
    assert set(eject(model)) == set(injected)
    assert dict(model.named_modules()) == modules  # the same objects, not copies
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model(tokens).logits, expected)


def test_initialisation_depends_on_seed_and_layer_name_only(llama):
    few, all_ = copy.deepcopy(llama), copy.deepcopy(llama)
    torch.manual_seed(1)
    inject(few, LoRAConfig(target_modules=["up_proj"]), seed=3)
    torch.manual_seed(2)
    inject(all_, LoRAConfig(target_modules="all-linear"), seed=3)
    one, other = lora_layers(few), lora_layers(all_)
    assert all(
        torch.equal(one[p].adapters["default"].lora_A, other[p].adapters["default"].lora_A)
        for p in one
    )
    drawn = {layer.adapters["default"].lora_A.flatten()[0].item() for layer in other.values()}
    assert len(drawn) == len(other)  # each layer draws its own values


def test_gaussian_initialisation(llama):
    model = copy.deepcopy(llama)
    inject(model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))
    drawn = torch.cat(
        [layer.adapters["default"].lora_A.flatten() for layer in lora_layers(model).values()]
    )
    # 2,688 draws: one σ of the estimate is 1.4 % of 1/4, and 0.01 is nearly three σ.
    assert abs(drawn.std() - 1 / 4) < 0.01


def test_several_adapters_are_switched_combined_and_deleted(llama):
    model, tokens = copy.deepcopy(llama), torch.arange(8)[None]
    base = model(tokens).logits
    inject(model, LoRAConfig(target_modules=["q_proj"]))
    inject(model, LoRAConfig(target_modules=["q_proj", "up_proj"], r=2), name="second")
    for layer in lora_layers(model).values():
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.lora_B)
    assert list_adapters(model) == ["default", "second"]
    outputs = {}
    for active in ("default", "second", ["default", "second"]):
        set_adapter(model, active)
        outputs[str(active)] = model(tokens).logits
    assert len({out.sum().item() for out in [base, *outputs.values()]}) == 4
    with disable_adapters(model):
        assert torch.equal(model(tokens).logits, base)
    assert torch.equal(model(tokens).logits, outputs["['default', 'second']"])
    delete_adapter(model, "second")
    assert torch.equal(model(tokens).logits, outputs["default"])
    assert not isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), LoRALayer)
    delete_adapter(model, "default")
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_module_under_two_names_is_adapted_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))})
    inject(model, LoRAConfig(target_modules=["a", "b.0"]))
    assert model["a"] is model["b"][0] and isinstance(model["a"], LoRALayer)
    eject(model)
    assert model["a"] is shared and model["b"][0] is shared


def test_all_linear_never_enters_a_lora_layer(llama):
    model = copy.deepcopy(llama)
    first = inject(model, LoRAConfig(target_modules="all-linear"))
    assert inject(model, LoRAConfig(target_modules="all-linear"), name="second") == first


def test_a_peft_tutorial_config_runs_unchanged(llama):
    config = LoRAConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
    )
    assert len(inject(copy.deepcopy(llama), config)) == 6


# ---- error: the message names the nearest match, and the model is unchanged


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches nothing. Nearest: 'v_proj'"),
        ({"target_modules": "model.*q_prj"}, "matches nothing"),
        (
            {"target_modules": ["mlp"]},
            "LlamaMLP, which has no adapter. Layers in it that have: ['gate_proj'",
        ),
        (
            {"target_modules": ["norm"]},
            "LlamaRMSNorm, which has no adapter. Layers in it that have: none",
        ),
        ({"target_modules": []}, "expected names"),
        (
            {"target_modules": "all-linear", "exclude_modules": ["lm_hed"]},
            "exclude_modules: 'lm_hed' matches nothing",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 99]},
            "numbers [99]; there are [0, 1, 2]",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
            "layers_pattern: 'h' matches nothing",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
            "rank_pattern: 'k_proj' matches nothing",
        ),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"q_prj": 2}},
            "alpha_pattern: 'q_prj' matches nothing",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no layer is left"),
    ],
)
def test_nothing_is_silently_ignored(llama, fields, message):
    model = copy.deepcopy(llama)
    with pytest.raises(ValueError, match=re.escape(message)):
        inject(model, LoRAConfig(**fields))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_other_misuse_raises(llama, gpt2):
    model = copy.deepcopy(llama)
    inject(model)
    with pytest.raises(ValueError, match="'default' exists already"):
        inject(model)
    with pytest.raises(ValueError, match="adapter: 'deflaut' matches nothing. Nearest: 'default'"):
        set_adapter(model, "deflaut")
    with pytest.raises(ValueError, match="one is named twice"):
        set_adapter(model, ["default", "default"])
    with pytest.raises(ValueError, match="shares its weight with 'transformer.wte'"):
        inject(copy.deepcopy(gpt2), LoRAConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="no default for model type None"):
        inject(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"use LoRALayer\(it\)"):
        inject(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="got Embedding: put it into one"):
        inject(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="no layers to adapt"):
        inject(nn.Sequential(nn.ReLU()), LoRAConfig(target_modules="all-linear"))
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear, which has no adapter"):
        # MultiheadAttention reads the weight of out_proj and never calls the layer.
        inject(attention, LoRAConfig(target_modules=["out_proj"]))
