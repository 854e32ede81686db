"""Tests of GGUF files of Qwen3 and Gemma 3.

Oracles: transformers reads the file that minilora writes (weights and logits), and the gguf package
has the names of the tensors. Round trip: minilora reads its own file. Errors: what llama.cpp would
compute in another way, and what a file must not contain.
"""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import minilora as ml
from helpers.bounds import UNIT, assert_rounded, rounding
from helpers.tiny import GEMMA, LLAMA3, SMOLLM3, oracle, tokens, twin
from minilora.models.config import DecoderConfig
from minilora.models.families import FULL, SLIDING
from minilora.models.gguf.config import read_config
from minilora.models.gguf.header import read_header
from minilora.models.save import save_model

# transformers' reader of GGUF knows only these heads, and this pattern of layers.
GEMMA_LIKE = GEMMA | {"head_dim": 256, "num_hidden_layers": 7, "layer_types": None}
CASES = {
    "qwen3": {"family": "qwen3", "head_dim": 128},
    "qwen3 tied": {"family": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    "gemma3": GEMMA_LIKE,
    "gemma3 untied": GEMMA_LIKE | {"tie_word_embeddings": False},
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
SMALL = GEMMA | {"query_pre_attn_scalar": 24}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens(2, 30))
    return out if isinstance(out, torch.Tensor) else out.logits


def written(folder: Path, **fields: Any) -> tuple[nn.Module, Path]:
    model = twin(oracle(**fields))
    save_model(model, folder / "m.gguf", format="gguf", dtype="float32")
    return model, folder / "m.gguf"


@pytest.mark.parametrize("case", CASES)
def test_file_of_a_family_equals_the_model_and_transformers(tmp_path, case):
    model, path = written(tmp_path, **CASES[case])
    again = ml.load_model(path, dtype="float32", device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    states = again.state_dict(), reference.state_dict()
    for name, value in model.state_dict().items():
        # 1 + w is rounded by half a unit of numbers below 4, then subtracted exactly.
        bound = 2 * UNIT if "gemma" in case and "norm" in name else 0.0
        for state in states:
            assert (state[name] - value).abs().max() <= bound, name
    bound = rounding(model, logits)
    assert_rounded(logits(again), logits(model), bound)
    assert_rounded(logits(reference), logits(model), bound)
    assert again.config.layer_types == model.config.layer_types


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_tensor_names_are_those_of_the_gguf_package(tmp_path, family):
    model, path = written(tmp_path, **CASES[family])
    arch = {"qwen3": gguf.MODEL_ARCH.QWEN3, "gemma3": gguf.MODEL_ARCH.GEMMA3}[family]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    expected = set()
    for name in model.state_dict():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            expected.add(names.get_name(name, try_suffixes=(".weight",)))
    assert {tensor.name for tensor in gguf.GGUFReader(path).tensors} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_types": [FULL] * 3},
        {"layer_types": [SLIDING] * 3},
        {"rope_parameters": TWO_ROPES},
    ],
    ids=["period 2", "all full", "all sliding", "two rotations"],
)
def test_gemma3_config_returns_from_a_file(tmp_path, fields):
    model, path = written(tmp_path, **SMALL | fields)
    again = ml.load_model(path, dtype="float32", device="cpu")
    for name in ("layer_types", "sliding_window", "rope_local_base_freq", "rope"):
        assert getattr(again.config, name) == getattr(model.config, name), name
    assert again.config.query_pre_attn_scalar == 24
    assert_rounded(logits(again), logits(model), rounding(model, logits))


def test_gemma3_file_trains_and_is_quantised(tmp_path):
    _, path = written(tmp_path, **SMALL)
    model = ml.load_model(path, quantize="nf4", dtype="float32", device="cpu")
    names = ml.inject(model, ml.LoRAConfig(r=2, target_modules="all-linear"))
    assert len(names) == 3 * 7
    model(tokens(1, 9)).square().mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad.abs().max() > 0 for grad in gradients)


# ---- errors


@pytest.mark.parametrize(
    "fields, message",
    [
        (SMALL | {"layer_types": [FULL, SLIDING, SLIDING]}, "the last of every p layers"),
        (GEMMA, r"by √24, not by √256 as query_pre_attn_scalar"),
        (SMALL | {"attention_bias": True}, "no biases of attention in gemma3 files"),
        (CASES["qwen3"] | {"attention_bias": True}, "no biases of attention in qwen3 files"),
        (CASES["qwen3"] | {"rope_parameters": LLAMA3}, "ignore the llama3 scaling"),
        ({"family": "qwen2", "rope_parameters": LLAMA3}, "ignore the llama3 scaling"),
        (SMOLLM3 | {"no_rope_layers": [0, 1, 1]}, "rotates q and k in three of four layers"),
        (SMOLLM3 | {"mlp_bias": True}, "no biases in smollm3 files"),
    ],
    ids=[
        "layers",
        "scalar",
        "gemma3 bias",
        "qwen3 bias",
        "qwen3 rope",
        "qwen2 rope",
        "smollm3",
        "smollm3 bias",
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"llama.cpp.*{message}"):
        written(tmp_path, **fields)
    assert not list(tmp_path.iterdir())


def test_error_of_the_model_comes_before_that_of_the_tokenizer(tmp_path):
    """The tokenizer's error says "leave the tokenizer out", which must not meet another error."""
    model = twin(oracle(family="mistral", sliding_window=5))
    with pytest.raises(ValueError, match="ignore sliding_window 5"):
        save_model(model, tmp_path / "m.gguf", format="gguf", tokenizer=object())


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> tuple[Path, dict, dict]:
    _, path = written(tmp_path_factory.mktemp("gemma"), **GEMMA_LIKE)
    return path, *read_header(path)


def config_with(header: tuple[Path, dict, dict], changes: dict[str, Any]) -> DecoderConfig:
    path, fields, records = header
    changed = dict(fields)
    for key, value in changes.items():
        changed[f"gemma3.{key}"] = value
    return read_config(path, changed, records, None)


def test_gemma3_keys_have_llama_cpps_meaning(header):
    assert config_with(header, {}).layer_types == (SLIDING,) * 5 + (FULL, SLIDING)
    every_third = config_with(header, {"attention.sliding_window_pattern": 3})
    assert every_third.layer_types == (SLIDING, SLIDING, FULL) * 2 + (SLIDING,)
    none = config_with(header, {"attention.sliding_window": 0})
    assert (none.sliding_window, none.layer_types) == (None, (FULL,) * 7)
    assert config_with(header, {"rope.freq_base_swa": 77.0}).rope_local_base_freq == 77.0
    # llama.cpp recognises the 27B model by its layers; it divides by √(hidden_size / heads).
    assert config_with(header, {"block_count": 62}).query_pre_attn_scalar == 80 // 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping.*unknown"),
        ({"attention.sliding_window": -1}, "sliding_window must be a whole number"),
        ({"attention.sliding_window_pattern": [True, False]}, "pattern must be a whole number"),
        ({"block_count": 10**12}, "out of the range of a model"),
    ],
)
def test_gemma3_keys_that_change_the_result_are_refused(header, changes, message):
    with pytest.raises(ValueError, match=message):
        config_with(header, changes)
