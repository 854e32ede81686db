"""Tests of adapters on embeddings and convolutions, and of adapters with a bias, against PEFT.

Files are exchanged in both directions, byte for byte, and merging gives the same outputs. Outputs
are about 1 to 10 in size. minilora and PEFT add up the same fp32 products in another order:
1e-6 relative is about sixteen roundings of 6e-8.
"""

import copy
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from helpers.kinds import IMAGES, TOKENS, build, close, output, shake
from minilora.lora.files.save_load import WEIGHTS_FILE, adapter_state_dict, base_state_dict
from minilora.lora.layer import LoRALayer
from minilora.lora.registry import lora_layers

KINDS = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    ),
    "embedding, by rank": (
        "llama",
        {"target_modules": ["embed_tokens", "up_proj"], "rank_pattern": {"embed_tokens": 2}},
    ),
    "a scaled embedding": ("gemma", {"target_modules": ["embed_tokens"]}),
    "bias": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "both biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"}),
    "bias beside Conv1D's": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "fused Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"c_fc": 3}}),
    "fused q, k, v; gate, up": (
        "phi3",
        {"target_modules": ["qkv_proj", "gate_up_proj"], "layers_to_transform": [1]},
    ),
    "positions": ("gpt2", {"target_modules": ["wpe"]}),
    "Conv2d": ("images", {"target_modules": ["flat", "one"]}),
    "Conv1d": ("images", {"target_modules": ["long"], "lora_bias": True, "r": 2}),
    "all of them": ("images", {"target_modules": ["flat", "one", "long", "words", "head"], "r": 2}),
}
kinds = pytest.mark.parametrize(("kind", "fields"), KINDS.values(), ids=KINDS)


def adapted(kind: str, fields: dict) -> nn.Module:
    model = build(kind)
    ml.inject(model, ml.LoRAConfig(**{"r": 4, "task_type": None} | fields))
    return shake(model)


# ---- oracle: PEFT


@kinds
def test_files_are_exchanged_with_peft_in_both_directions(tmp_path, kind, fields):
    from peft import PeftModel

    ours = adapted(kind, fields)
    expected = output(ours)
    assert (expected - output(build(kind))).abs().max() > 1e-3  # the adapter has an effect
    ml.save_adapter(ours, tmp_path / "ours")
    assert not [
        key for key in load_file(tmp_path / "ours" / WEIGHTS_FILE) if "base_layer.weight" in key
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = PeftModel.from_pretrained(build(kind), str(tmp_path / "ours")).eval()
    close(output(theirs), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(kind)
    ml.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(output(again), expected)
    ml.save_adapter(again, tmp_path / "again")
    one, other = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("theirs", "again"))
    assert {key for key in one if ".base_layer.weight" not in key} == set(other)
    assert all(torch.equal(one[key], other[key]) for key in other)


@kinds
def test_a_file_written_by_peft_gives_its_output(tmp_path, kind, fields):
    from peft import LoraConfig, get_peft_model

    theirs = shake(get_peft_model(build(kind), LoraConfig(**{"r": 4} | fields))).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = build(kind)
    ml.load_adapter(ours, tmp_path / "theirs")
    close(output(ours), output(theirs))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ml.count_parameters(ours).trainable == trained


def test_embedding_adapter_is_initialised_as_in_peft():
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["embed_tokens"]))
    model = build("llama")
    names = ml.inject(model, ml.LoRAConfig(r=4, target_modules=["embed_tokens"]), seed=3)
    assert names == ["model.embed_tokens"]
    tensors = {
        key.rpartition("lora_")[2]: tensor for key, tensor in adapter_state_dict(model).items()
    }
    for name, tensor in theirs.named_parameters():
        if tensor.requires_grad:
            mine = tensors[re.sub(r".*lora_(embedding_\w).*", r"\1", name)]
            assert mine.shape == tensor.shape and bool(mine.any()) == bool(tensor.any())
    B = tensors["embedding_B"]
    assert abs(B.std() - 1) < 0.15  # 256 draws of N(0, 1): one σ of std is 1/√512 = 4 %
    again = build("llama")
    ml.inject(again, ml.LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"]), seed=3)
    assert torch.equal(
        adapter_state_dict(again)["base_model.model.model.embed_tokens.lora_embedding_B"], B
    )


def test_gradients_equal_pefts_and_padding_tokens_get_none(tmp_path):
    from peft import PeftModel

    fields = {"target_modules": ["words", "flat", "long"], "r": 2, "lora_bias": False}
    ours = adapted("images", fields)
    ml.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(build("images"), str(tmp_path), is_trainable=True)
    for model in (ours, theirs):
        model(IMAGES).square().sum().backward()
    grads = {p.shape: p.grad for p in ours.parameters() if p.requires_grad}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            assert grads[p.shape] is not None, name
            close(grads[p.shape], p.grad, 1e-5)  # sums over a batch
    A = ours.words.adapters["default"].lora_A
    assert A.grad[:, :3].all() and not A.grad[:, 3].any()


# ---- property: merged, switched off, undone


@kinds
def test_merged_model_computes_the_same(kind, fields):
    model = adapted(kind, fields)
    expected, state = output(model), copy.deepcopy(model.state_dict())
    merged = ml.merge(model)
    close(output(merged), expected, 1e-5)  # W x + B A x and (W + B A) x, over several layers
    assert not any(isinstance(module, LoRALayer) for module in merged.modules())
    for parameter in merged.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    report = ml.merge_report(model)
    assert len(report.layers) == len(lora_layers(model)) and report.total.error["float32"] < 1e-4


@kinds
def test_without_its_adapter_the_model_is_the_base(kind, fields):
    model, expected = build(kind), output(build(kind))
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    ml.inject(model, ml.LoRAConfig(**{"r": 4} | fields))
    assert torch.equal(output(model), expected)  # a new adapter changes nothing
    shake(model)
    with ml.disable_adapters(model):
        assert torch.equal(output(model), expected)
    found = base_state_dict(model)
    assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)
    adapters = [layer.adapters for layer in lora_layers(copy.deepcopy(model).half()).values()]
    assert adapters and all(
        p.dtype == torch.float32 for module in adapters for p in module.parameters()
    )
    ml.eject(model)
    assert torch.equal(output(model), expected) and dict(model.named_modules()) == modules


def test_in_16_bits_an_embedding_s_output_stays_in_16_bits():
    model = build("llama").bfloat16()
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["embed_tokens"], lora_alpha=16))
    shake(model)
    assert model.model.embed_tokens(TOKENS).dtype == torch.bfloat16
    # E, ΔE and their sum are each rounded by 2^-9; merging rounds once.
    close(
        model.model.embed_tokens(TOKENS).float(),
        ml.merge(model).model.embed_tokens(TOKENS).float(),
        2**-7,
    )


def test_all_linear_takes_neither_embeddings_nor_convolutions():
    model = build("images")
    assert ml.inject(model, ml.LoRAConfig(r=2, target_modules="all-linear")) == ["head"]
    assert "model.embed_tokens" not in ml.inject(
        build("llama"), ml.LoRAConfig(target_modules="all-linear")
    )


def test_dropout_applies_to_layers_but_not_to_embedding_ids():
    model = adapted(
        "images", {"target_modules": ["words", "flat"], "r": 2, "lora_dropout": 0.5}
    ).train()
    assert not torch.equal(output(model), output(model))
    ids = torch.arange(4)
    assert torch.equal(model.words(ids), model.words(ids))  # as in PEFT
    with pytest.raises(ValueError, match="lora_dropout would do nothing"):
        ml.inject(build("llama"), ml.LoRAConfig(target_modules=["embed_tokens"], lora_dropout=0.1))
