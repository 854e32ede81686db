"""Tests of every model family with every adapter feature in every file format.

One table lists families, another lists features; each pair is tested in every format against the
library that owns the format. Oracles: PEFT on transformers' model (in both directions, with file
bytes), transformers on merged weights, bitsandbytes in 4 bits, and our own reader on GGUF
(test_gguf_write.py uses transformers'). If a pair is refused, its test expects the error. Property:
the tables contain every family and every field of LoRAConfig. Widths are multiples of 64:
bitsandbytes' CPU code misreads the scales of others. Logits are 5 to 11 in size: 5e-5 is fp32 sums
in another order through two layers (6e-8 · 10 each).
"""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minilora as ml
from helpers.tiny import SMOLLM3, oracle, tokens, twin
from minilora.lora.files.save_load import WEIGHTS_FILE
from minilora.lora.targets import DEFAULT_TARGETS
from minilora.models.config import FAMILIES
from minilora.models.gguf.write import ARCHITECTURES

TIED, BIASED = {"tie_word_embeddings": True}, {"attention_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
GEMMA = {
    **{
        "family": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        "pad_token_id": None,
        "eos_token_id": None,
    },
    **{"layer_types": ["sliding_attention", "full_attention"], "bos_token_id": None},
}
# Fields of `oracle`; its default is four query heads and two key heads.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-biases": TIED | BIASED | {"mlp_bias": True, "num_key_value_heads": 4},
    "mistral-tied": TIED | {"family": "mistral", "sliding_window": None, "head_dim": 32},
    "mistral-window": {"family": "mistral", "sliding_window": 5, "num_key_value_heads": 1},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied-window": TIED | WINDOW | {"family": "qwen2"},
    "qwen3-biases-window": BIASED | WINDOW | {"family": "qwen3", "head_dim": 32},
    "qwen3-tied": TIED | {"family": "qwen3", "head_dim": 16, "num_key_value_heads": 1},
    "smollm3-tied": TIED | SMOLLM3,
    "gemma3-tied": TIED | GEMMA,
    "gemma3-biases": {**BIASED, **GEMMA, "tie_word_embeddings": False},
}

SOME = {"target_modules": ["q_proj", "up_proj"]}
NO_BIAS, SHARED, NO_TIE = (
    "there is no bias to train",
    "shares its weight",
    "nothing that trains shares its weight",
)
# Name -> fields of LoRAConfig, and the error for each trait of a family (see `traits`) that refuses
# them.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "defaults": ({}, {"no default": "no default for model type"}),
    "all-linear": ({"target_modules": "all-linear", "r": 4, "lora_alpha": 3}, {}),
    "rslora": (SOME | {"use_rslora": True}, {}),
    "patterns": (
        SOME
        | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3, "up_proj": 5}},
        {},
    ),
    "regex": ({"target_modules": r".*\.1\.(self_attn\.[qk]|mlp\.down)_proj"}, {}),
    "layers": (SOME | {"layers_to_transform": [1]}, {}),
    "layers-pattern": (SOME | {"layers_to_transform": 0, "layers_pattern": "layers"}, {}),
    "exclude": (
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
        {},
    ),
    "exclude-regex": (
        {"target_modules": "all-linear", "exclude_modules": r".*\.(0|self_attn)\..*"},
        {},
    ),
    "save-norms": (SOME | {"modules_to_save": ["input_layernorm", "model.norm"]}, {}),
    "save-head": (SOME | {"modules_to_save": ["lm_head"]}, {"tied": SHARED}),
    "save-both": (SOME | {"modules_to_save": ["lm_head", "embed_tokens"]}, {"tied": SHARED}),
    "lora-bias": (SOME | {"lora_bias": True}, {}),
    "target-head": ({"target_modules": ["q_proj", "lm_head"]}, {"tied": SHARED}),
    "target-embedding": ({"target_modules": ["embed_tokens", "up_proj"]}, {"tied": SHARED}),
    "tie-shared": (
        {"target_modules": ["embed_tokens", "up_proj"], "tie": "shared"},
        {"untied": NO_TIE},
    ),
    "tie-untie": ({"target_modules": ["lm_head", "up_proj"], "tie": "untie"}, {"untied": NO_TIE}),
    "bias-all": (SOME | {"bias": "all"}, {"no bias": NO_BIAS}),
    "bias-lora-only": (SOME | {"bias": "lora_only"}, {"no bias": NO_BIAS}),
    "gaussian": (SOME | {"init_lora_weights": "gaussian"}, {}),
    "dora": (SOME | {"use_dora": True}, {}),
    # The target is a full module name.
    "dropout": (
        {"target_modules": ["model.layers.1.mlp.up_proj"], "lora_dropout": 0.5},
        {},
    ),
}
# test_variants.py tests variants that start from W and may replace it, and test_trained_tokens.py
# rows of single tokens.
ELSEWHERE = {"loftq_config", "trainable_token_indices"}
# These fields are only written to the file.
CARRIED = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}

kinds = pytest.mark.parametrize("kind", KINDS)
TOKENS = tokens(2, 12)
FORMATS = "peft", "merged", "4 bits", "gguf"


def every_pair(format: str) -> pytest.MarkDecorator:
    """Run a test for each family and feature; three pairs in four are slow.

    The fast pairs of one format contain each family and each feature, and the fast pairs of all
    formats contain each pair once.
    """
    cases = []
    for i, kind in enumerate(KINDS):
        for j, feature in enumerate(FEATURES):
            is_fast = (i + j) % len(FORMATS) == FORMATS.index(format)
            marks = [] if is_fast else [pytest.mark.slow]
            cases.append(pytest.param(kind, feature, marks=marks))
    return pytest.mark.parametrize("kind, feature", cases)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Skip fsync, random initialisation and PEFT's model card, which these tests do not need."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("minilora.models.decoder._initialise", lambda _: None)
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


def traits(kind: str) -> set[str]:
    """Return the traits of a family that may refuse a feature."""
    given = KINDS[kind]
    biased = given.get("attention_bias") or given.get("family") == "qwen2"
    found = {"tied" if given.get("tie_word_embeddings") else "untied"}
    if not biased:
        found.add("no bias")
    if given.get("family", "llama") not in DEFAULT_TARGETS:  # PEFT has no default either
        found.add("no default")
    return found


@cache
def base(kind: str) -> nn.Module:
    """Return transformers' model, which callers copy before they change it."""
    sizes = {"num_hidden_layers": 2, "intermediate_size": 128}
    return oracle(**sizes | KINDS[kind])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, Tensor) else out.logits


def close(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(logits(a), logits(b), rtol=0, atol=5e-5)


def adapted(model: nn.Module, kind: str, feature: str) -> nn.Module | None:
    """Return `model` with the feature's adapter, changed as if trained.

    If the feature is refused, check the error and return None.
    """
    given, refusals = FEATURES[feature]
    before = logits(model)
    for message in (refusals[trait] for trait in traits(kind) & refusals.keys()):
        with pytest.raises(ValueError, match=message):
            ml.inject(model, ml.LoRAConfig(**given))
        assert torch.equal(logits(model), before) and not ml.list_adapters(model)
        return None
    ml.inject(model, ml.LoRAConfig(**given))
    assert (logits(move(model)) - before).abs().max() > 1e-2  # the adapter has an effect
    return model


def move(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def in_file(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors, without the base weight that PEFT stores for a targeted head."""
    tensors = load_file(folder / WEIGHTS_FILE)
    return {key: value for key, value in tensors.items() if not key.endswith(".base_layer.weight")}


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory) -> Callable[[str], tuple[nn.Module, nn.Module]]:
    """Return a function that loads a family's NF4 folder, written by us, here and in transformers.

    Callers copy the two models before use.
    """

    @cache
    def make(kind: str) -> tuple[nn.Module, nn.Module]:
        folder = tmp_path_factory.mktemp(kind)
        base(kind).save_pretrained(folder / "dense")
        ml.save_model(loaded(folder / "dense", quantize="nf4"), folder / "nf4", format="bnb-4bit")
        return loaded(folder / "nf4"), theirs(folder / "nf4")

    return make


def loaded(folder: Path, **options: Any) -> nn.Module:
    return ml.load_model(folder, dtype="float32", device="cpu", **options)


def theirs(folder: Path, **options: Any) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **options
    )
    return exact(model)


def exact(model: nn.Module) -> nn.Module:
    """Return `model` in eval mode, except for its 4-bit layers.

    In eval mode, bitsandbytes' CPU kernel permanently rounds their scales to bf16.
    """
    for module in model.eval().modules():
        module.training = isinstance(module, Linear4bit)
    return model


def saved(model: nn.Module, path: Path, format: str) -> bool:
    """Write `model` merged and return True.

    If the format does not support the model, check the error and return False.
    """
    config, message = model.config, None
    with_bias = any("lora_B.bias" in key for key in ml.adapter_state_dict(model))
    if config.model_type not in ("llama", "smollm3") and with_bias:
        message = "has a bias .lora_bias., for which the config of a"
    elif format == "gguf" and config.model_type not in ARCHITECTURES:
        message = "model_type of a GGUF file must be one of"
    elif format == "gguf" and config.model_type == "smollm3" and with_bias:
        message = "has no biases in smollm3 files"
    elif format == "gguf" and config.model_type == "gemma3_text" and config.attention_bias:
        message = "has no biases of attention"
    elif format == "gguf" and config.sliding_window and config.model_type != "gemma3_text":
        message = "would ignore sliding_window"
    if message is None:
        ml.save_model(model, path, format=format, merge=True)
        return True
    with pytest.raises(ValueError, match=message):
        ml.save_model(model, path, format=format, merge=True)
    return False


# ---- oracles


@every_pair("peft")
def test_peft(kind, feature, tmp_path):
    ours = adapted(twin(base(kind)), kind, feature)
    if ours is None:
        return
    ml.save_adapter(ours, tmp_path / "ours")
    close(PeftModel.from_pretrained(copy.deepcopy(base(kind)), str(tmp_path / "ours")).eval(), ours)
    given = dict(FEATURES[feature][0])
    # PEFT's field for tie="shared"; it has no field for tie="untie".
    given["ensure_weight_tying"] = given.pop("tie", None) == "shared"
    made = get_peft_model(copy.deepcopy(base(kind)), LoraConfig(task_type="CAUSAL_LM", **given))
    move(made).eval().save_pretrained(str(tmp_path / "theirs"))
    again = twin(base(kind))
    ml.load_adapter(again, tmp_path / "theirs")
    close(again, made)
    ml.save_adapter(again, tmp_path / "again")
    mine, first, last = (in_file(tmp_path / name) for name in ("ours", "theirs", "again"))
    assert mine.keys() == first.keys() == last.keys()  # the same tensors train
    assert all(
        first[key].dtype == last[key].dtype and torch.equal(first[key], last[key]) for key in first
    )


@every_pair("merged")
def test_merged(kind, feature, tmp_path):
    ours = adapted(twin(base(kind)), kind, feature)
    if ours is not None and saved(ours, tmp_path, "safetensors"):
        close(AutoModelForCausalLM.from_pretrained(tmp_path), ours)


@every_pair("4 bits")
def test_4_bits(kind, feature, tmp_path, in_4_bits):
    nf4, reference = in_4_bits(kind)
    ours = adapted(copy.deepcopy(nf4), kind, feature)
    if ours is None:
        return
    ml.save_adapter(ours, tmp_path / "ours")
    with_peft = exact(PeftModel.from_pretrained(copy.deepcopy(reference), str(tmp_path / "ours")))
    close(with_peft, ours)
    with_peft.save_pretrained(str(tmp_path / "theirs"))
    again = copy.deepcopy(nf4)
    ml.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))


@every_pair("gguf")
def test_gguf(kind, feature, tmp_path):
    ours = adapted(twin(base(kind)), kind, feature)
    if ours is None:
        return
    if not saved(ours, tmp_path / "m.gguf", "gguf"):
        return
    again, merged = loaded(tmp_path / "m.gguf"), ml.merge(ours)
    expected = merged.state_dict()
    assert again.state_dict().keys() >= expected.keys()
    # A file holds Gemma's norms as 1 + w, in fp32.
    shifted = ours.config.family.gemma
    for name, value in again.state_dict().items():
        # If one layer has a bias, all have one.
        wanted = expected.get(name, torch.zeros_like(value))
        if shifted and "norm" in name:
            assert ((value - wanted).abs() <= 2.0**-23 * (1 + wanted.abs())).all(), name
        else:
            assert torch.equal(value, wanted), name
    if shifted:
        close(again, merged)
    else:
        assert torch.equal(logits(again), logits(merged))


@kinds
def test_a_4_bit_base(kind, tmp_path, in_4_bits):
    """Each library reads the other's folder bit for bit.

    If each quantises the base itself, codes are equal and 8-bit scales differ by at most one step.
    """
    dense = copy.deepcopy(base(kind)).bfloat16()  # bitsandbytes is less exact for fp32 sources
    dense.save_pretrained(tmp_path / "dense")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    its_own = theirs(tmp_path / "dense", quantization_config=nf4)
    its_own.save_pretrained(tmp_path / "bnb")
    for mine, other in (in_4_bits(kind), (loaded(tmp_path / "bnb"), its_own)):
        names = [name for name, module in mine.named_modules() if isinstance(module, ml.NF4Linear)]
        assert len(names) == 2 * 7
        for name in names:
            weight = other.get_submodule(name).weight
            assert torch.equal(
                mine.get_submodule(name).dequantize(),
                dequantize_4bit(weight.data, weight.quant_state),
            )
        close(mine, other)
    again = loaded(tmp_path / "dense", quantize="nf4")
    for name in names:
        a, b = (
            again.get_submodule(name).weight.state_dict(),
            mine.get_submodule(name).weight.state_dict(),
        )
        assert torch.equal(a["weight"], b["weight"])
        assert (a["weight.absmax"].int() - b["weight.absmax"].int()).abs().max() <= 1


# ---- property: the tables are complete


def test_every_family_has_a_row():
    assert {row.get("family", "llama") for row in KINDS.values()} == set(FAMILIES)


def test_every_field_of_the_config_has_a_row():
    rows = {name for given, _ in FEATURES.values() for name in given}
    assert rows | CARRIED | ELSEWHERE == {field.name for field in fields(ml.LoRAConfig)}, (
        "a feature is missing in the table"
    )
