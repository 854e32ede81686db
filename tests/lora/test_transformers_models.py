"""Tests of transformers models for which minilora has no decoder.

The models are GPT-2 (Conv1D), OPT, Phi-3 (fused qkv and gate_up), T5 (encoder and decoder) and ViT
(images in, classes out), tiny and random. Oracle: PEFT adapts the same layers, and gives the same
output with the trained adapter. Property: a new adapter changes nothing, also in 4 bits. Round
trip: an adapter file. Errors: load_model's message points to transformers. Outputs are about 1 in
size, and PEFT's layer computes the same sums: 1e-5 is some fp32 roundings over two layers.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

import minilora as ml
from helpers.toy import FAST, VOCABULARY, Letters, adapters, rows

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FIELDS = {
    "gpt2": TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": TOKENS
    | WIDTH
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "phi3": TOKENS | WIDTH | {"intermediate_size": 64, "num_key_value_heads": 2},
    "t5": TOKENS
    | {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "vit": WIDTH | {"intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_labels": 5},
}
CLASSES = {"t5": AutoModelForSeq2SeqLM, "vit": AutoModelForImageClassification}
# PEFT chooses its wrapper by the task: None fits a model that generates no text.
TASKS = {
    "t5": ml.TaskType.SEQ_2_SEQ_LM,
    "vit": None,
}
# The number of linear layers, without the head of a language model.
LAYERS = {
    "gpt2": 8,
    "opt": 12,
    "phi3": 8,
    "t5": 32,
    "vit": 13,
}
models = pytest.mark.parametrize("name", FIELDS)
quantised = pytest.mark.parametrize("name", [name for name in FIELDS if name != "gpt2"])


def build(name: str) -> nn.Module:
    """Return a model with the same random weights every time, large enough to affect the output."""
    model = CLASSES.get(name, AutoModelForCausalLM).from_config(
        AutoConfig.for_model(name, **FIELDS[name])
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def output(model: nn.Module, name: str) -> Tensor:
    """Return the logits of a fixed input."""
    ids = torch.arange(3, 15).view(2, 6)
    if name == "vit":
        return model(
            pixel_values=torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
        ).logits  # (B, 5)
    return model(
        ids, **({"decoder_input_ids": ids[:, :4]} if name == "t5" else {})
    ).logits  # (B, T, V)


def adapted(model: nn.Module, name: str) -> nn.Module:
    """Return `model` with a new adapter on every linear layer."""
    task = TASKS.get(name, ml.TaskType.CAUSAL_LM)
    names = ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear", task_type=task))
    assert len(names) == LAYERS[name]
    return model


def trained(model: nn.Module, name: str) -> nn.Module:
    """Train two steps: causal language models with ml.train, others with a short loop."""
    before = adapters(model)
    if name in CLASSES:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            logits = output(model, name).flatten(0, -2)
            F.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long)).backward()
            optimizer.step()
    else:
        # Both steps see the same rows.
        whole = ml.TrainConfig(**FAST | {"max_steps": 2, "per_device_train_batch_size": 24})
        result = ml.train(model, Letters(), rows(24), whole)
        assert result.steps == 2 and 0 < result.losses[1] < result.losses[0]
    assert all(not torch.equal(tensor, before[key]) for key, tensor in adapters(model).items())
    return model


def check_in_peft(model: nn.Module, base: nn.Module, name: str, folder: Path) -> None:
    """Save the adapter of `model`; check that `base` with it gives its output, also in PEFT."""
    ml.save_adapter(model, folder)
    expected = output(model, name)
    assert (output(base, name) - expected).abs().max() > 1e-3  # the adapter has an effect
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(output(theirs, name), expected, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(base)
    ml.load_adapter(again, folder)
    torch.testing.assert_close(output(again, name), expected, rtol=1e-5, atol=1e-5)


# ---- oracle: PEFT


@models
def test_all_linear_selects_the_same_layers_as_peft(name):
    theirs = get_peft_model(build(name), LoraConfig(r=4, target_modules="all-linear"))
    found = ml.inject(model := build(name), ml.LoRAConfig(r=4, target_modules="all-linear"))
    assert sorted(found) == sorted(theirs.targeted_module_names)
    assert len(list(model.parameters())) == len(list(theirs.parameters()))


@models
def test_a_trained_adapter_runs_in_peft(name, tmp_path):
    model = adapted(build(name), name)
    # With gradients, torch uses another attention kernel for T5's trainable position biases.
    with torch.no_grad():
        assert torch.equal(output(model, name), output(build(name), name))  # B is zero
    check_in_peft(trained(model, name), build(name), name, tmp_path)


@quantised
def test_a_4_bit_model_trains_and_its_adapter_runs_in_peft(name, tmp_path):
    model, dense = build(name), build(name)
    weights = {
        path: module.weight
        for path, module in dense.named_modules()
        if isinstance(module, nn.Linear)
    }
    names = ml.quantize_model(model)
    assert len(names) == LAYERS[name] - (name == "vit")  # the classifier stays dense
    with torch.no_grad():
        for path in names:
            rounded = ml.dequantize_nf4(model.get_submodule(path).weight)
            # The relative error of NF4 for normally distributed weights.
            assert 0.05 < (rounded - weights[path]).norm() / weights[path].norm() < 0.15
            weights[path].copy_(rounded)
    torch.testing.assert_close(output(model, name), output(dense, name), rtol=1e-5, atol=1e-5)
    check_in_peft(trained(adapted(model, name), name), dense, name, tmp_path)


# ---- errors


def test_load_model_of_an_unknown_family_points_to_transformers(tmp_path):
    build("phi3").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"'phi3'.*llama \(Llama.*qwen3.*AutoModelForCausalLM.from_pretr.*ml.inject",
    ):
        ml.load_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(adapted(model, "phi3"), "phi3"), output(build("phi3"), "phi3"))


def test_conv1d_is_not_quantised():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no nn.Linear to quantise"):
        ml.quantize_model(build("gpt2"))


def test_a_rank_larger_than_a_layer_is_named():
    model = build("vit")
    with pytest.warns(UserWarning, match="vit.layers.0.attention.q_proj with r=33"):
        ml.inject(model, ml.LoRAConfig(r=33, target_modules="all-linear"))
    assert torch.equal(output(model, "vit"), output(build("vit"), "vit"))
