"""Tests that quantize_model keeps heads and trained layers dense.

Oracle: the modules that transformers puts next to the body of a model, which are new and untrained.
"""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import minilora as ml
from helpers.tiny import SIZES, oracle, twin
from minilora.quant.nf4_linear import NF4Linear

WIDTH = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
FIELDS = {
    "llama": SIZES,
    "qwen2": SIZES,
    "bert": WIDTH | {"num_hidden_layers": 1},
    "roberta": WIDTH | {"num_hidden_layers": 1},
    "distilbert": {"vocab_size": 97, "dim": 64, "hidden_dim": 96, "n_layers": 1, "n_heads": 4},
}
HEADS = {
    "llama": {"score"},
    "qwen2": {"score"},
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
}


def dense_layers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize("family", FIELDS)
def test_head_of_a_sequence_classifier_stays_dense(family):
    config = AutoConfig.for_model(family, num_labels=3, **FIELDS[family])
    model = AutoModelForSequenceClassification.from_config(config)
    names = ml.quantize_model(model)
    assert dense_layers(model) == HEADS[family]
    assert names and not HEADS[family] & set(names)


def test_head_of_a_token_classifier_stays_dense():
    config = AutoConfig.for_model("llama", num_labels=3, **SIZES)
    model = AutoModelForTokenClassification.from_config(config)
    ml.quantize_model(model)
    assert dense_layers(model) == {"score"}


def test_head_that_classify_adds_stays_dense():
    model = twin(oracle())
    ml.Classify(labels=["yes", "no"]).add_head(model)
    ml.quantize_model(model)
    assert dense_layers(model) == {"lm_head", "score"}


def test_layers_inside_a_classifier_of_another_model_are_quantised():
    model = nn.ModuleDict({"features": nn.Linear(64, 64)})
    model["classifier"] = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    assert "classifier.0" in ml.quantize_model(model)


def test_layers_that_train_with_an_adapter_stay_dense():
    model = twin(oracle())
    config = ml.LoRAConfig(
        r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["layers.0.mlp.up_proj"]
    )
    ml.inject(model, config)
    names = ml.quantize_model(model)
    assert "model.layers.0.self_attn.q_proj.base_layer" in names
    assert dense_layers(model) == {"lm_head.base_layer", "model.layers.0.mlp.up_proj"}
    assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), NF4Linear)
    model(torch.ones(1, 3, dtype=torch.long)).sum().backward()
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").grad is not None
