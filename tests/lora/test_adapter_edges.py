"""Tests of adapter features in combination.

They cover embeddings and convolutions with unusual options, modules_to_save together with tied
weights, several adapters that are added and deleted, and files in which little has been trained.
"""

import json

import pytest
import torch
from torch import nn

import minilora as ml
from helpers.kinds import build, close, output, shake
from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import ConvAdapter, EmbeddingAdapter
from minilora.lora.files.base_check import fingerprint, same_base
from minilora.lora.files.save_load import CONFIG_FILE
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import lora_configs

PLAIN = (8.0, 0.0, False, False)  # lora_alpha, lora_dropout, use_rslora, lora_bias

# ---- oracle


def test_a_frequent_token_s_gradient_is_scaled_as_in_the_base():
    base = nn.Embedding(5, 4, scale_grad_by_freq=True)
    layer = LoRALayer(base, r=None)
    layer.add_adapter("default", EmbeddingAdapter(base, 2, *PLAIN, seed=0))
    layer.use(["default"])
    layer(torch.tensor([1, 1, 1, 2])).sum().backward()
    grad = layer.adapters["default"].lora_A.grad  # (r, V)
    torch.testing.assert_close(grad[:, 1], grad[:, 2])  # token 1: three times one third


@pytest.mark.parametrize("numbers", [[1], [], 0])
@pytest.mark.parametrize("pattern", [None, "experts", ["layers", "experts"], ["experts", "layers"]])
def test_layers_are_numbered_as_peft_numbers_them(numbers, pattern):
    from peft import LoraConfig, inject_adapter_in_model

    def model() -> nn.Module:
        experts = [
            nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)) for _ in range(2)
        ]
        layers = nn.ModuleList(nn.ModuleDict({"experts": e}) for e in experts)
        return nn.ModuleDict({"body": nn.ModuleDict({"layers": layers})})

    fields: dict = {
        "r": 2,
        "target_modules": ["q"],
        "layers_to_transform": numbers,
        "layers_pattern": pattern,
    }
    theirs = inject_adapter_in_model(LoraConfig(**fields), model())
    assert ml.inject(model(), LoRAConfig(**fields)) == [
        n for n, m in theirs.named_modules() if hasattr(m, "lora_A")
    ]


# ---- property


def test_same_base_of_bf16_and_fp16_roundings_is_undecided():
    then, now = (
        fingerprint(nn.Linear(64, 64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)
    )
    assert same_base(then, now) is None and same_base(then, then) is True
    assert same_base(then, fingerprint(nn.Linear(64, 64, dtype=torch.bfloat16))) is False


def test_a_4_bit_layer_s_bias_counts_as_a_parameter():
    model = nn.Sequential(nn.Linear(64, 32))
    ml.quantize_model(model)
    assert ml.count_parameters(model).total == 64 * 32 + 32


def test_max_rank_is_the_smaller_side_of_each_kind_of_layer():
    assert ConvAdapter(nn.Conv2d(1, 8, 2), 5, *PLAIN, seed=0).max_rank == 4
    assert ConvAdapter(nn.Conv2d(4, 6, 2, groups=2), 2, *PLAIN, seed=0).max_rank == 6
    assert EmbeddingAdapter(nn.Embedding(5, 9), 2, *PLAIN, seed=0).max_rank == 5


def test_inject_warns_of_a_rank_above_the_smaller_side():
    model = nn.ModuleDict({"a": nn.Linear(9, 4), "b": nn.Linear(9, 9)})
    with pytest.warns(UserWarning, match="r: 1 of 2 layers .* first a with r=5, of which 4 can"):
        ml.inject(model, LoRAConfig(r=5, target_modules="all-linear"))
    x = torch.ones(2, 9)
    expected = shake(model)["a"](x)
    close(ml.merge(model)["a"](x), expected)
    for method in ("pissa", "loftq"):
        with pytest.raises(ValueError, match=f"a: r: {method} decomposes W, .* at most rank 4"):
            ml.inject(
                nn.ModuleDict({"a": nn.Linear(64, 4)}),
                LoRAConfig(r=5, target_modules=["a"], init_lora_weights=method),
            )


def test_sums_of_adapters_of_any_rank_are_exact():
    def weights(seed: int) -> ml.AdapterWeights:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(9, 4)})
        with pytest.warns(UserWarning, match="r: 1 of 1 layers"):
            ml.inject(model, LoRAConfig(r=12, target_modules=["a"]))
        return ml.AdapterWeights.of(shake(model, seed))

    first, second = weights(0), weights(1)
    total = (first + second).truncate(6)  # 24 rows of A, of which 4 can be used
    ((B, A),) = total.layers().values()
    ((B1, A1),) = first.layers().values()
    ((B2, A2),) = second.layers().values()
    close(B @ A, B1 @ A1 + B2 @ A2, 1e-5)  # an SVD in fp64 of fp32 factors
    assert total.error < 1e-6


def test_inactive_module_takes_the_models_mode_when_activated():
    model = build("llama")
    ml.inject(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    ml.set_adapter(model, [])
    model.train()
    ml.set_adapter(model, "default")
    assert all(module.training for module in model.modules())


def test_gaussian_values_depend_on_the_layer_and_the_seed():
    def values(seed: int) -> list[torch.Tensor]:
        model = build("llama")
        ml.inject(
            model, LoRAConfig(target_modules=["q_proj"], init_lora_weights="gaussian"), seed=seed
        )
        return [tensor for key, tensor in ml.adapter_state_dict(model).items() if "lora_A" in key]

    first, again, other = values(0), values(0), values(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_untied_modules_to_save_are_merged_separately():
    model = build("tied")
    ml.inject(
        model,
        LoRAConfig(
            target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], tie="untie"
        ),
    )
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    expected = output(shake(model))
    close(output(ml.merge(model)), expected, 1e-5)  # fp32, sums in another order


def test_a_tie_inside_a_saved_module_needs_no_tie_option():
    words, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = words.weight
    model = nn.ModuleDict(
        {"body": nn.ModuleDict({"words": words, "head": head}), "other": nn.Linear(4, 4)}
    )
    ml.inject(model, LoRAConfig(r=2, target_modules=["other"], modules_to_save=["body"]))
    body: nn.Module = model["body"]
    assert (
        body.get_submodule("words").weight is body.get_submodule("head").weight is not words.weight
    )


def test_all_linear_leaves_out_modules_to_save():
    model = build("llama")
    names = ml.inject(model, LoRAConfig(target_modules="all-linear", modules_to_save=["down_proj"]))
    assert len(names) == 6 * 3 and not any(name.endswith("down_proj") for name in names)


def test_delete_adapter_keeps_the_others_and_frees_its_modules():
    model = build("llama")
    ml.inject(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ml.inject(model, LoRAConfig(target_modules=["q_proj"]), name="second")
    ml.set_adapter(model, "default")
    head = model.lm_head
    ml.inject(model, LoRAConfig(target_modules=["k_proj"]), name="third")
    ml.set_adapter(model, "default")
    ml.delete_adapter(model, "second")
    assert model.lm_head is head and head.weight.requires_grad
    ml.delete_adapter(model, "default")
    assert model.lm_head is not head
    # No other adapter trains lm_head any more.
    ml.inject(model, LoRAConfig(target_modules=["lm_head"]), name="fourth")
    lora_configs(model).tokenizers["fourth"] = {"chat_template": "x"}
    ml.delete_adapter(model, "fourth")
    ml.inject(model, LoRAConfig(target_modules=["lm_head"]), name="fourth")
    assert "fourth" not in lora_configs(model).tokenizers


# ---- round trip


def test_save_writes_the_full_path_of_a_name_shared_with_the_head(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.proj = nn.ModuleDict({"proj": nn.Linear(4, 4)}), nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.proj

    ml.inject(model := Model(), LoRAConfig(r=2, target_modules="all-linear"))
    ml.save_adapter(shake(model), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == ["block.proj"]
    assert ml.load_adapter(Model(), tmp_path, check_base=False) == ["block.proj"]


def test_load_accepts_a_file_in_which_only_a_saved_module_trained(tmp_path):
    model = build("llama")
    ml.inject(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    model.model.norm.weight.data += 1
    ml.save_adapter(model, tmp_path)
    ml.load_adapter(other := build("llama"), tmp_path)
    close(output(other), output(model))


# ---- error


def test_load_of_an_untied_file_over_a_shared_adapter_is_refused(tmp_path):
    model = build("tied")
    targets = ["embed_tokens", "lm_head"]
    ml.inject(model, LoRAConfig(r=2, target_modules=targets, tie="untie"))
    ml.save_adapter(shake(model), tmp_path)
    ml.inject(shared := build("tied"), LoRAConfig(r=2, target_modules=targets, tie="shared"))
    before = {key: tensor.clone() for key, tensor in ml.adapter_state_dict(shared).items()}
    with pytest.raises(ValueError, match="exists with other layers or scaling"):
        ml.load_adapter(shared, tmp_path)
    assert all(
        torch.equal(tensor, before[key]) for key, tensor in ml.adapter_state_dict(shared).items()
    )
