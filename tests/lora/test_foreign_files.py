"""Tests of files that are plain LoRA for the model, whatever made them and wrapped it.

PEFT is the oracle: a file that it reads as plain LoRA loads with equal outputs. Tensors of a wrapped
model are renamed if all of them have a counterpart, each exactly one. A file that does not fit is
refused with a missing and an unexpected name, and the probable cause.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minilora as ml
from helpers.kinds import build, close, output, shake
from minilora.lora.files.key_names import core_name
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE
from minilora.lora.registry import lora_configs

X = torch.linspace(-1, 1, 4 * 10).view(4, 10)


class Layers(nn.Module):
    """Two linear layers."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


@pytest.fixture
def base() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def from_peft(base: nn.Module, folder: Path, **fields: Any) -> Tensor:
    """Write a file with PEFT, whose tensors are all nonzero, and return the output."""
    from peft import LoraConfig, get_peft_model

    theirs = shake(get_peft_model(copy.deepcopy(base), LoraConfig(**fields))).eval()
    theirs.save_pretrained(str(folder))
    return theirs(X).detach()


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({k.replace(old, new): v for k, v in tensors.items()}, folder / WEIGHTS_FILE)


# ---- oracle: plain LoRA in PEFT


def test_default_config_of_a_plain_module_loads_in_peft(base, tmp_path):
    from peft import PeftModel

    ours = copy.deepcopy(base)
    ml.inject(ours, ml.LoRAConfig(r=2, target_modules=["lin0", "lin1"]))
    ml.save_adapter(shake(ours), tmp_path)
    assert ml.LoRAConfig().task_type is None
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["task_type"] is None
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    close(theirs(X), ours(X))


@pytest.mark.parametrize(("kind", "task"), [("llama", "CAUSAL_LM"), ("images", None)])
def test_file_stores_the_task_of_a_causal_language_model_only(tmp_path, kind, task):
    model = build(kind)
    ml.inject(model, ml.LoRAConfig(r=2, target_modules="all-linear"))
    ml.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["task_type"] == task


INITIAL = {
    "EVA": {"init_lora_weights": "eva"},
    "MiCA": {"init_lora_weights": "mica", "r": 2},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "none": {"init_lora_weights": False},
    "rank above both sides": {"r": 24},
}


@pytest.mark.parametrize("fields", INITIAL.values(), ids=INITIAL)
@pytest.mark.filterwarnings("ignore:.init_lora_weights. is 'eva'")
def test_file_with_other_initial_values_is_plain_lora(base, tmp_path, fields):
    expected = from_peft(base, tmp_path, **{"target_modules": ["lin0", "lin1"], "r": 4} | fields)
    ml.load_adapter(base, tmp_path)
    close(base(X), expected)


def test_file_of_eva_with_its_redistributed_ranks_loads(base, tmp_path):
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    config = LoraConfig(
        r=3,
        target_modules=["lin0", "lin1"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, adjust_scaling_factors=True),
    )
    theirs = get_peft_model(copy.deepcopy(base), config)
    directions = {  # in place of the singular vectors of a layer's inputs
        "base_model.model.lin0": torch.eye(5, 10),
        "base_model.model.lin1": torch.eye(1, 20),
    }
    initialize_lora_eva_weights(theirs, eva_state_dict=directions)
    shake(theirs).eval().save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert values["eva_config"] and values["rank_pattern"] == {"lin0": 5, "lin1": 1}
    ml.load_adapter(base, tmp_path)
    close(base(X), theirs(X))


def test_file_of_velora_loads_without_its_compression(base, tmp_path):
    from peft import VeloraConfig

    expected = from_peft(
        base,
        tmp_path,
        r=2,
        target_modules=["lin0"],
        velora_config=VeloraConfig(num_groups=2, init_type="random"),
    )
    ml.load_adapter(base, tmp_path)
    close(base(X), expected)


WIDER = {
    "targets": {"target_modules": ["lin0", "lin1", "q_proj"]},
    "exclusions": {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1", "q_proj"]},
    "only unknown exclusions": {"target_modules": ["lin0"], "exclude_modules": ["q_proj"]},
    "patterns": {
        "target_modules": ["lin0", "lin1"],
        "rank_pattern": {"q_proj": 3, "lin1": 2},
        "alpha_pattern": {"q_proj": 3, "lin1": 5},
    },
    "a pattern of a layer without an adapter": {
        "target_modules": ["lin0"],
        "rank_pattern": {"lin1": 3},
    },
    "saved modules": {"target_modules": ["lin0"], "modules_to_save": ["lin1", "score"]},
}


@pytest.mark.parametrize("fields", WIDER.values(), ids=WIDER)
def test_config_that_names_more_than_the_model_has_loads_with_a_warning(base, tmp_path, fields):
    expected = from_peft(base, tmp_path, r=4, **fields)
    with pytest.warns(UserWarning, match="entries of adapter_config.json match nothing"):
        ml.load_adapter(base, tmp_path)
    close(base(X), expected)
    ml.save_adapter(base, tmp_path / "again")  # `inject` accepts what is left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.load_adapter(build_again(base), tmp_path / "again")


def build_again(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    ml.eject(other)
    return other


def test_layer_numbers_that_the_model_does_not_have_are_left_out(tmp_path):
    model = build("llama")  # three layers
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}
    ml.inject(model, ml.LoRAConfig(r=2, **fields, layers_pattern=["layers"]))
    ml.save_adapter(shake(model), tmp_path)
    edit_config(tmp_path, layers_to_transform=[0, 2, 40], layers_pattern=["h", "layers"])
    with pytest.warns(UserWarning, match="layers_pattern 'h', layers_to_transform 40"):
        names = ml.load_adapter(other := build("llama"), tmp_path)
    assert len(names) == 2
    assert torch.equal(output(other), output(model))


# ---- round trip: names of wrapped models

NAMES = {
    "compiled": ("base_model.model.", "base_model.model._orig_mod."),
    "checkpointed": (".lora_A", "._checkpoint_wrapped_module.lora_A"),
    "checkpointed and FSDP": (".mlp.", "._fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
    "distributed": ("base_model.model.", "base_model.model.module."),
    "no prefix": ("base_model.model.", ""),
    "half a prefix": ("base_model.model.", "base_model."),
    "two prefixes": ("base_model.model.", "base_model.model.base_model.model."),
    "the body alone": ("base_model.model.model.", "base_model.model."),
    "a model in memory": (".weight", ".default.weight"),
    "another adapter's name": (".weight", ".mine.weight"),
    "pictures": ("base_model.model.model.", "base_model.model.model.language_model."),
    "pictures, older": ("base_model.model.model.", "base_model.model.language_model.model."),
}


@pytest.mark.parametrize(("old", "new"), NAMES.values(), ids=NAMES)
def test_tensors_of_a_wrapped_model_are_renamed_with_a_warning(tmp_path, old, new):
    model = build("llama")
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    ml.save_adapter(shake(model), tmp_path)
    rename(tmp_path, old, new)
    other = build("llama")
    with pytest.warns(UserWarning, match=r"saved from a wrapped model. All 12 tensors .* renamed"):
        ml.load_adapter(other, tmp_path)
    assert torch.equal(output(other), output(model))


def test_names_of_other_parameters_are_renamed_too(tmp_path):
    model = build("llama")
    config = ml.LoRAConfig(
        r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]
    )
    ml.inject(model, config)
    ml.save_adapter(shake(model), tmp_path)
    rename(tmp_path, "lora_magnitude_vector", "lora_magnitude_vector.default.weight")
    rename(tmp_path, "lm_head.weight", "lm_head.modules_to_save.default.weight")
    edit_config(tmp_path, target_modules=["_orig_mod.model.layers.0.self_attn.q_proj", "q_proj"])
    with pytest.warns(UserWarning, match="saved from a wrapped model"):
        ml.load_adapter(other := build("llama"), tmp_path)
    assert torch.equal(output(other), output(model))


def test_targets_that_name_a_wrapper_select_the_layers_inside(base, tmp_path):
    expected = from_peft(base, tmp_path, r=3, target_modules=["lin0", "lin1"])
    rename(tmp_path, "base_model.model.", "base_model.model._orig_mod.")
    edit_config(tmp_path, target_modules=["_orig_mod.lin0", "_orig_mod.lin1"])
    with pytest.warns(UserWarning, match="saved from a wrapped model"):
        ml.load_adapter(base, tmp_path)
    close(base(X), expected)
    assert lora_configs(base)["default"].target_modules == ["lin0", "lin1"]


def test_core_name_keeps_a_parameter_that_looks_like_an_adapters_name():
    model = nn.Linear(2, 2)
    names = {
        "base_model.model.a.lora_A.weight": "a.lora_A.weight",
        "a.lora_A.weight.weight": "a.lora_A.weight",
        "a.lora_B.bias": "a.lora_B.bias",
        "a.lora_embedding_A": "a.lora_embedding_A",
        "a.lora_embedding_A.default": "a.lora_embedding_A",
        "a.lora_magnitude_vector": "a.lora_magnitude_vector",
        "model.modules.a.bias": "modules.a.bias",
    }
    assert {name: core_name(name, model) for name in names} == names


# ---- error


def test_two_layers_of_one_core_name_are_not_renamed(tmp_path):
    def model() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"q": nn.Linear(4, 4)})
        return nn.ModuleDict({"q": nn.Linear(4, 4), "language_model": inner})

    ml.inject(ours := model(), ml.LoRAConfig(r=2, target_modules=["q"]))
    ml.save_adapter(shake(ours), tmp_path)
    rename(tmp_path, "base_model.model.", "base_model.model._orig_mod.")
    with pytest.raises(ValueError, match="4 missing: .*; 4 unexpected: .*_orig_mod"):
        ml.load_adapter(model(), tmp_path)


MESSAGES = {
    "a half": (
        lambda t: [t.pop(key) for key in [*t][6:]],
        "6 missing: .* Cause: the file is incom",
    ),
    "more": (
        lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in [*t.items()]}),
        "4 unexpected: .*layers.9.* Cause: the model has fewer layers",
    ),
    "another kind": (
        lambda t: [t.update({k.replace("layers", "h"): t.pop(k)}) for k in [*t]],
        r"12 missing: base_model.model.model.layers.0.*; 12 unexpected: base_model.model.model.h.0"
        ".* Cause: the layers have other names",
    ),
    "a wrapper and less": (
        lambda t: [t.update({f"_orig_mod.{k}": t.pop(k)}) for k in [*t][1:]] + [t.popitem()],
        "Cause: 10 of the missing tensors are in the file under other names",
    ),
    "another rank": (
        lambda t: t.update({k: v[:1].clone() for k, v in t.items() if "lora_A" in k}),
        r"6 of wrong shape or dtype: .*lora_A.*expected \(2, 64\), got \(1, 64\).* another rank",
    ),
}


@pytest.mark.parametrize(("damage", "message"), MESSAGES.values(), ids=MESSAGES)
def test_refused_file_shows_a_name_of_each_kind_and_the_cause(tmp_path, damage, message):
    model = build("llama")
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    ml.save_adapter(shake(model), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    other = build("llama")
    with pytest.raises(ValueError, match=message):
        ml.load_adapter(other, tmp_path)
    assert not ml.list_adapters(other)


def test_config_of_which_no_target_is_left_is_refused(base, tmp_path):
    from_peft(base, tmp_path, target_modules=["lin0"])
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="target_modules: 'q_proj' matches nothing"):
        ml.load_adapter(base, tmp_path)
