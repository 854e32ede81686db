"""Tests of the base's state dict under adapters, and of trained biases and whole modules.

An adapted model still has the tensors of its base under their plain names, for reading and for
loading. Biases and whole modules that train with an adapter are stored in the file as PEFT stores
them. They are switched and removed with the adapter, bit for bit.
"""

import copy
import io
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from helpers.bounds import assert_rounded, rounding
from helpers.kinds import shake
from helpers.tiny import oracle, tokens, twin
from minilora.lora.files.save_load import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_state_dict,
    base_state_dict,
)
from minilora.lora.registry import lora_layers

TOKENS = tokens(2, 9)


def same(found: dict, expected: dict) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return twin(oracle(attention_bias=True))


# ---- the base's state


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_base_state_dict_has_the_bases_names_and_tensors(llama, quantised):
    model = copy.deepcopy(llama)
    if quantised:
        ml.quantize_model(model)
    expected = copy.deepcopy(model.state_dict())
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    ml.inject(model, ml.LoRAConfig(target_modules=["q_proj"]), name="second")
    shake(model)
    active = {path: layer.active for path, layer in lora_layers(model).items()}
    assert same(base_state_dict(model), expected)
    assert {path: layer.active for path, layer in lora_layers(model).items()} == active
    assert (
        base_state_dict(model)["model.norm.weight"].data_ptr()
        == model.get_parameter("model.norm.weight").data_ptr()
    )  # the live tensor, not a copy
    ml.eject(model)
    assert same(base_state_dict(model), expected)  # without adapters: the state itself


def test_the_base_of_a_module_under_two_names():
    model = nn.ModuleDict(
        {"a": (shared := nn.Linear(4, 4)), "b": nn.Sequential(shared, nn.Linear(4, 4))}
    )
    expected = model.state_dict()
    ml.inject(model, ml.LoRAConfig(r=2, target_modules=["a", "b.0"]))
    assert same(base_state_dict(model), expected)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_load_state_dict_of_a_plain_state_changes_the_base_only(llama, quantised):
    model, other = copy.deepcopy(llama), twin(oracle(seed=1, attention_bias=True))
    if quantised:
        ml.quantize_model(model)
        ml.quantize_model(other)
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    model = copy.deepcopy(shake(model))  # the load hook survives a copy
    before = {key: value.clone() for key, value in adapter_state_dict(model).items()}
    bare = dict(other.state_dict())
    keys = list(bare)
    model.load_state_dict(bare)
    assert list(bare) == keys  # the caller's dict is not changed
    assert same(base_state_dict(model), other.state_dict())
    assert same(adapter_state_dict(model), before)
    with ml.disable_adapters(model):
        assert torch.equal(model(TOKENS), other(TOKENS))


def test_a_full_state_still_loads_and_a_half_one_still_fails(llama):
    model = copy.deepcopy(llama)
    ml.inject(model)
    full = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(full)
    assert same(model.state_dict(), full)
    bare = base_state_dict(model)
    del bare["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(RuntimeError, match="q_proj.base_layer.weight"):
        model.load_state_dict(bare)
    torch.save(model, io.BytesIO())  # the hook can be pickled


# ---- biases and whole modules: oracle, PEFT


def hf(family: str = "llama") -> nn.Module:
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=97, bos_token_id=0, eos_token_id=0
        )
        return shake(GPT2LMHeadModel(config).eval())  # biases are zero at first
    return oracle(attention_bias=True)


TRAINED = {
    "lora_only": ("llama", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "all": ("llama", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "norms and Conv1D": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
            "bias": "all",
        },
    ),
    "a whole layer's norm": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    ),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_biases_of_norms_and_conv1d_are_exchanged_with_peft(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    family, fields = TRAINED["norms and Conv1D"]  # families of our decoder: test_matrix.py
    base = hf(family)
    ours = copy.deepcopy(base)
    ml.inject(ours, ml.LoRAConfig(r=4, **fields))
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, task_type="CAUSAL_LM", **fields))

    def plain(names):
        known = r"^base_model\.model\.|\.base_layer|\.modules_to_save\.default|adapters\.default\.|\.default\.weight"
        return {re.sub(known, "", name) for name in names}

    trainable = [
        {name for name, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    ]
    assert plain(trainable[0]) == plain(trainable[1])  # the same parameters train
    shake(ours)
    ml.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    # fp32, sums in another order
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=2e-5)
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    again.save_pretrained(str(tmp_path / "theirs"))
    loaded = copy.deepcopy(base)
    ml.load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(logits(loaded), logits(ours))
    files = [load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and all(
        torch.equal(files[0][key], files[1][key]) for key in files[0]
    )
    ml.save_adapter(loaded, tmp_path / "again")
    assert same(load_file(tmp_path / "again" / WEIGHTS_FILE), files[0])


# ---- property: switched and undone with the adapter


@pytest.mark.parametrize(("family", "fields"), TRAINED.values(), ids=TRAINED)
def test_without_its_adapter_the_model_is_the_base(family, fields):
    model = hf(family)
    # eject must restore a flag that is not the default.
    model.get_parameter("lm_head.weight").requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules, state, expected = (
        dict(model.named_modules()),
        copy.deepcopy(model.state_dict()),
        logits(model),
    )
    ml.inject(model, ml.LoRAConfig(r=4, **fields))
    assert torch.equal(logits(model), expected)  # copies start with the original values
    trained = logits(shake(model))
    assert not torch.equal(trained, expected)
    assert same(base_state_dict(model), state)
    with ml.disable_adapters(model):
        assert torch.equal(logits(model), expected)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), trained)
    ml.eject(model)
    assert (
        torch.equal(logits(model), expected) and dict(model.named_modules()) == modules
    )  # the same objects
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_adapters_with_saved_modules_or_biases_can_be_switched(llama):
    model, expected = copy.deepcopy(llama), logits(llama)
    outputs = {}
    for seed, (name, fields) in enumerate(
        {"head": {"modules_to_save": ["lm_head"]}, "biases": {"bias": "all"}}.items()
    ):
        ml.inject(
            model,
            ml.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"][: seed + 1], **fields),
            name=name,
        )
        outputs[name] = logits(shake(model, seed))
    ml.inject(
        model,
        ml.LoRAConfig(r=4, target_modules=["k_proj"], modules_to_save=["lm_head"]),
        name="other",
    )
    # The new lm_head is a copy of the original, not of another adapter's copy.
    assert torch.equal(logits(model), expected)
    for name in ("head", "biases", "head"):
        ml.set_adapter(model, name)
        assert torch.equal(logits(model), outputs[name])
        trainable = [path for path, p in model.named_parameters() if p.requires_grad]
        assert ("lm_head.weight" in trainable) == (name == "head")
    # One trains the head and the other the biases, so that both can be active.
    ml.set_adapter(model, ["head", "biases"])
    before = logits(model)
    with pytest.raises(ValueError, match="both train 'lm_head': use one at a time"):
        ml.set_adapter(model, ["head", "other"])
    assert torch.equal(logits(model), before)
    ml.delete_adapter(model, "other")
    ml.delete_adapter(model, "head")
    assert model.lm_head.weight.requires_grad is False and same(
        base_state_dict(model), llama.state_dict()
    )
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)  # its copy is removed, too
    ml.set_adapter(model, "biases")
    assert torch.equal(logits(model), outputs["biases"])
    ml.delete_adapter(model, "biases")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["lm_head", "norm", "embed_tokens"]}, {"bias": "lora_only"}]
)
def test_parts_of_a_16_bit_or_4_bit_model_train_in_fp32(llama, tmp_path, fields):
    model = copy.deepcopy(llama)
    ml.quantize_model(model)
    model = model.bfloat16()
    expected = logits(model)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules=["q_proj"], **fields))
    out = logits(model)
    assert out.dtype == torch.bfloat16
    # bf16 rounds by 2^-8. The head, norm and embedding now round once instead of twice: the bound
    # is four such roundings.
    assert (out - expected).abs().max() <= expected.abs().max() * 2**-6
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model(TOKENS).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    shake(model)
    ml.save_adapter(model, tmp_path)
    again = copy.deepcopy(llama)
    ml.quantize_model(again)
    again = again.bfloat16()
    ml.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    # Hooks and registry survive a copy.
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_merge_keeps_trained_biases_and_modules(llama):
    model = copy.deepcopy(llama)
    ml.inject(
        model,
        ml.LoRAConfig(
            r=4, target_modules="all-linear", modules_to_save=["lm_head", "norm"], bias="all"
        ),
    )
    shake(model)
    merged = ml.merge(model)
    assert merged.state_dict().keys() == llama.state_dict().keys()
    # Merging only reorders sums.
    assert_rounded(logits(merged), logits(model), rounding(merged, logits))
    assert not ml.eject(merged) and torch.equal(merged.lm_head.weight, model.lm_head.weight)


# ---- error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"modules_to_save": ["lm_haed"]},
            "modules_to_save: 'lm_haed' matches nothing. Nearest: 'lm_head'",
        ),
        ({"modules_to_save": ["q_proj"]}, "has an adapter"),
        (
            {"modules_to_save": ["self_attn"]},
            "'model.layers.0.self_attn' holds 'model.layers.0.self_attn.q_proj'",
        ),
        (
            {"modules_to_save": ["mlp", "up_proj"]},
            "holds 'model.layers.0.mlp.up_proj', which trains too",
        ),
        (
            {"target_modules": ["up_proj"], "bias": "lora_only"},
            "would do nothing: there is no bias",
        ),
    ],
)
def test_parts_that_cannot_train_are_refused_and_the_model_untouched(llama, fields, message):
    model = copy.deepcopy(llama)
    with pytest.raises(ValueError, match=message):
        ml.inject(model, ml.LoRAConfig(**{"target_modules": ["q_proj"]} | fields))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_tied_4_bit_16_bit_or_already_trained_parts_are_refused(llama):
    config = ml.LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="'lm_head' shares its weight"):
        ml.inject(twin(oracle(tie_word_embeddings=True)), config)
    model = copy.deepcopy(llama)
    ml.quantize_model(model)
    with pytest.raises(ValueError, match="is quantised and cannot train"):
        ml.inject(model, ml.LoRAConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]))
    with pytest.raises(ValueError, match="bfloat16 and trains in fp32"):
        ml.inject(
            copy.deepcopy(llama).bfloat16(), ml.LoRAConfig(target_modules=["q_proj"], bias="all")
        )
    ml.inject(model, config)
    with pytest.raises(ValueError, match="'lm_head': another adapter trains 'lm_head'"):
        ml.inject(model, ml.LoRAConfig(target_modules=["lm_head"]), name="second")
    ml.inject(model, ml.LoRAConfig(target_modules=["q_proj"], bias="all"), name="second")
    with pytest.raises(
        ValueError, match="another adapter trains 'model.layers.0.self_attn.q_proj.bias'|holds"
    ):
        ml.inject(
            model,
            ml.LoRAConfig(target_modules=["up_proj"], modules_to_save=["self_attn"]),
            name="third",
        )


def test_a_file_without_its_trained_parts_is_refused(llama, tmp_path):
    model = copy.deepcopy(llama)
    ml.inject(model, ml.LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ml.save_adapter(shake(model), tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert values["modules_to_save"] == ["lm_head"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values | {"bias": "all"}))
    other = copy.deepcopy(llama)
    with pytest.raises(
        ValueError,
        match="missing: base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
    ):
        ml.load_adapter(other, tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values | {"modules_to_save": None}))
    with pytest.raises(ValueError, match=r"lm_head.weight\[0, 0\] is .*, the model's"):
        ml.load_adapter(other, tmp_path)
    assert not lora_layers(other)
