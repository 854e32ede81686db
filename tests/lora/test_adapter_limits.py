"""Tests of new biases in merged and saved models, and of adapters that are refused.

A bias that an adapter adds is written to merged and saved models, or saving is refused before
anything is written. An adapter that a layer cannot support is refused, and the model stays
unchanged.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from helpers.kinds import Images, build, close, output, shake
from helpers.tiny import oracle, twin
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE
from minilora.lora.registry import lora_layers

# ---- round trip: a bias that the base does not have


@pytest.mark.parametrize("format", ["safetensors", "bnb-4bit", "gguf"])
def test_a_new_bias_goes_into_the_saved_model(tmp_path, format):
    from transformers import AutoModelForCausalLM

    model = twin(oracle())
    if format == "bnb-4bit":
        ml.quantize_model(model, skip=["q_proj", "down_proj"])
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj", "down_proj"], lora_bias=True))
    expected = output(shake(model))
    path = tmp_path / ("m.gguf" if format == "gguf" else "m")
    ml.save_model(model, path, merge=True, format=format)
    again = ml.load_model(path, dtype="float32", device="cpu")
    close(output(again), expected, 1e-5)
    assert again.config.attention_bias and again.config.mlp_bias
    assert (
        not again.model.layers[0].self_attn.o_proj.bias.any()
        and again.model.layers[0].self_attn.q_proj.bias.any()
    )
    if format == "safetensors":
        close(output(AutoModelForCausalLM.from_pretrained(path)), expected, 1e-5)
        ml.save_model(ml.merge(model), tmp_path / "merged")
        files = [load_file(folder / "model.safetensors") for folder in (path, tmp_path / "merged")]
        assert files[0].keys() == files[1].keys() and all(
            torch.equal(files[0][k], files[1][k]) for k in files[0]
        )


@pytest.mark.parametrize(
    ("family", "target"),
    [("qwen2", "o_proj"), ("qwen3", "up_proj"), ("mistral", "q_proj"), ("llama", "lm_head")],
)
def test_save_refuses_a_bias_that_the_config_cannot_express(tmp_path, family, target):
    model = twin(oracle(family))
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=[target], lora_bias=True))
    with pytest.raises(ValueError, match=f"{target} has a bias .* {family} model has no field"):
        ml.save_model(model, tmp_path / "saved", merge=True)
    assert not [*tmp_path.iterdir()]
    close(output(ml.merge(shake(model))), output(model), 1e-5)  # merging in memory works


# ---- error


def variant(**fields) -> nn.Module:
    return nn.ModuleDict({"words": nn.Embedding(9, 8, **fields), "other": nn.Linear(8, 8)})


class Odd(nn.Embedding):
    def forward(self, input):
        return super().forward(input + 1)


REFUSED = {
    "max_norm": (lambda: variant(max_norm=1.0), {}, "words: an embedding with max_norm"),
    "sparse": (lambda: variant(sparse=True), {}, "words: an embedding with sparse"),
    "its own forward": (lambda: nn.ModuleDict({"words": Odd(9, 8)}), {}, "an overridden forward"),
    "lora_bias": (variant, {"lora_bias": True}, "words: lora_bias: an embedding has no bias"),
    "dilation": (
        lambda: nn.ModuleDict({"words": nn.Conv1d(4, 4, 3, dilation=2)}),
        {},
        "convolution with dilation",
    ),
    "padding": (
        lambda: nn.ModuleDict({"words": nn.Conv1d(4, 4, 3, padding_mode="circular")}),
        {},
        "convolution with padding_mode",
    ),
    "groups": (
        lambda: nn.ModuleDict({"words": nn.Conv1d(4, 4, 3, groups=2)}),
        {"r": 3},
        "multiple of .* 2 groups",
    ),
    "no such kind": (
        lambda: nn.ModuleDict({"words": nn.ConvTranspose1d(4, 4, 3), "l": nn.Linear(4, 4)}),
        {},
        "no ada",
    ),
}


@pytest.mark.parametrize(("make", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_unsupported_layers_and_ranks_are_refused(make, fields, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        ml.inject(model, ml.LoRAConfig(**{"r": 2, "target_modules": ["words"]} | fields))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_inspect_reports_the_norm_of_every_kind_of_update(tmp_path):
    model = build("images")
    ml.inject(
        model, ml.LoRAConfig(r=2, target_modules=["flat", "long", "words", "head"], task_type=None)
    )
    ml.save_adapter(shake(model), tmp_path)
    found = ml.inspect(tmp_path).layers
    assert found.keys() == lora_layers(model).keys()
    for path, layer in lora_layers(model).items():
        norm = layer.adapters["default"].delta(torch.float64).norm().item()
        assert abs(found[path]["norm"] - norm) <= 1e-6 * norm


def test_bias_all_does_not_train_the_bias_of_another_adapter():
    model = build("gpt2")
    ml.inject(model, ml.LoRAConfig(target_modules=["c_attn"], lora_bias=True))
    ml.inject(model, ml.LoRAConfig(target_modules=["c_fc"], bias="all"), name="second")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any("adapters.default" in name for name in trained)


def test_lora_plus_applies_to_b_and_its_bias_but_not_to_embeddings():
    from minilora.training.config import TrainConfig
    from minilora.training.optim.param_groups import new_optimizer

    model = build("images")
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["flat", "words"], lora_bias=False))
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["long"], lora_bias=True), name="biased")
    ml.set_adapter(model, ["default", "biased"])
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = new_optimizer(model, parameters, TrainConfig(loraplus_lr_ratio=16.0)).param_groups
    fast = {names[id(p)] for group in groups if group["lr_ratio"] == 16 for p in group["params"]}
    assert fast == {
        "flat.adapters.default.lora_B",
        "long.adapters.biased.lora_B",
        "long.adapters.biased.lora_bias",
    }


def test_grouped_convolution_equals_peft_and_cannot_be_merged(tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    base = Images(groups=2).eval()
    model = copy.deepcopy(base)
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["long"], task_type=None))
    ml.save_adapter(shake(model), tmp_path)
    close(
        output(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()), output(model)
    )
    with pytest.raises(ValueError, match="2 groups cannot hold its adapter"):
        ml.merge(model)
    layer = model.long.adapters["default"]
    # One impulse per element of a kernel gives the columns of the update.
    impulses = torch.eye(6 * 5).view(30, 6, 5)
    A, B = (p.detach() for p in (layer.lora_A, layer.lora_B))
    columns = torch.nn.functional.conv1d(
        torch.nn.functional.conv1d(impulses, A), layer.scaling * B, groups=2
    )
    assert abs(ml.inspect(tmp_path).layers["long"]["norm"] - columns.norm()) < 1e-5 * columns.norm()


@pytest.mark.parametrize("start", [False, "orthogonal"])
def test_load_accepts_files_with_other_initialisations(tmp_path, start):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(
        build("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    )
    shake(theirs).save_pretrained(str(tmp_path))
    ml.load_adapter(model := build("llama"), tmp_path)
    close(output(model), output(theirs))
    with pytest.raises(ValueError, match="init_lora_weights: not one of True"):
        ml.LoRAConfig(init_lora_weights=start)


def test_load_refuses_a_file_that_holds_other_base_weights(tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = shake(
        get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    )
    theirs.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = "base_model.model.lm_head.base_layer.weight"
    ml.load_adapter(build("llama").bfloat16(), tmp_path)  # equal in bf16
    tensors[key][5, 7] += 0.5
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    model = build("llama")
    with pytest.raises(
        ValueError, match=r"lm_head.base_layer.weight\[5, 7\] is .*, the model's .*--no_check_base"
    ):
        ml.load_adapter(model, tmp_path)
    assert not lora_layers(model)
    ml.load_adapter(model, tmp_path, check_base=False)
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"has 96 rows, and the model has 97 tokens"):
        ml.load_adapter(build("llama"), tmp_path)
    tensors.pop(key)
    save_file(
        tensors | {"base_model.model.norm.base_layer.weight": torch.ones(3)},
        tmp_path / WEIGHTS_FILE,
    )
    with pytest.raises(ValueError, match="unexpected: base_model.model.norm.base_layer.weight"):
        ml.load_adapter(build("llama"), tmp_path)


def test_untrained_embedding_or_bias_is_known_by_its_zero_factor(tmp_path):
    for fields, trained in (
        ({"target_modules": ["embed_tokens"]}, "lora_A"),
        ({"lora_bias": True}, "lora_bias"),
    ):
        model = build("llama")
        ml.inject(model, ml.LoRAConfig(**{"target_modules": ["q_proj"]} | fields))
        ml.save_adapter(model, tmp_path)
        with pytest.raises(ValueError, match="an untrained adapter"):
            ml.load_adapter(build("llama"), tmp_path)
        for layer in lora_layers(model).values():
            layer.adapters["default"].get_parameter(trained).data.fill_(0.5)
        ml.save_adapter(model, tmp_path)
        ml.load_adapter(build("llama"), tmp_path)


def test_lora_bias_with_gaussian_initialisation_is_refused():
    with pytest.raises(
        ValueError, match="lora_bias: PEFT has it without use_dora and with init_lora_weights=True"
    ):
        ml.LoRAConfig(lora_bias=True, init_lora_weights="gaussian")


@pytest.mark.parametrize("name", ["", "a.b", "train"])
def test_inject_with_an_invalid_name_changes_nothing(name):
    """The name "train" is a method of the nn.ModuleDict that holds the adapters."""
    model = build("llama")
    with pytest.raises(
        ValueError,
        match=f"adapter '{name}': expected a new, dotless name that is not a method of ModuleDict",
    ):
        ml.inject(model, name=name)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_ejecting_from_a_model_without_adapters_freezes_nothing():
    model = build("llama")
    assert ml.eject(model) == [] and all(p.requires_grad for p in model.parameters())


def test_fan_in_fan_out_describes_the_adapters_own_layers(tmp_path):
    """PEFT's field `fan_in_fan_out` is true for adapters of Conv1D layers."""
    model = nn.ModuleDict({"gpt2": build("gpt2"), "linear": nn.Linear(4, 4)})
    for name, turned in (("c_attn", True), ("linear", False)):
        ml.inject(model, ml.LoRAConfig(r=2, target_modules=[name]), name=name)
        ml.save_adapter(model, tmp_path, name)
        assert json.loads((tmp_path / CONFIG_FILE).read_text())["fan_in_fan_out"] is turned


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: expected >= 1, got 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected >= 1, got 0"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern: expected a dict of whole numbers"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected a dict of finite numbers"),
        ({"alpha_pattern": {"q_proj": 0}}, "not 0"),
        ({"use_rslora": "false"}, "use_rslora: expected True or False"),
        ({"layers_to_transform": 1.5}, "expected a list of whole numbers or a whole number"),
        ({"task_type": "SEQ_CLSS"}, "task_type: expected one of CAUSAL_LM, "),
        ({"target_modules": [7]}, "target_modules: expected a list of names or a string"),
        ({"target_modules": "*_proj"}, r"'\*_proj' is not a regular expression: nothing to repeat"),
        ({"rank_pattern": {"q_proj(": 2}}, "is not a regular expression"),
        ({"layers_pattern": ["h["], "layers_to_transform": 1}, "is not a regular expression"),
        ({"r": 2.5}, "whole number"),
        ({"lora_alpha": 0}, "not 0"),
        ({"lora_dropout": 1}, "lora_dropout: expected >= 0 and < 1"),
        ({"bias": "some"}, "expected one of none, all, lora_only"),
        ({"modules_to_save": "lm_head"}, "expected a list of names"),
        ({"init_lora_weights": "eva"}, "init_lora_weights: not one of True, gaussian, pissa"),
        ({"layers_pattern": "layers"}, "would do nothing"),
    ],
)
def test_a_config_is_checked_when_it_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        ml.LoRAConfig(**fields)
    with pytest.raises(TypeError, match="lora_r"):
        ml.LoRAConfig(lora_r=8)  # pyright: ignore[reportCallIssue] the misspelling is the test
