"""Small random transformers models, the oracle of many tests, and minilora decoders like them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.source import ROOT
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RECURRENT = {  # a model of transformers alone, whose convolutions have a state
    "family": "lfm2",
    "num_hidden_layers": 2,
    "layer_types": ["conv", "full_attention"],
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
GEMMA = {
    **{
        "family": "gemma3_text",
        "head_dim": 24,
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "pad_token_id": None,
    },
    **{
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    **{"eos_token_id": None, "bos_token_id": None, "hidden_size": 80},  # √80 is not a 16-bit number
}
SMOLLM3 = {
    "family": "smollm3",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = {  # fields of `oracle`, for every option of a config
    "llama": {},
    "one head each": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "eps": {"rms_norm_eps": 0.1},
    "mistral": {"family": "mistral", "sliding_window": None},
    "window 5": {"family": "mistral", "sliding_window": 5},
    "window 1": {"family": "mistral", "sliding_window": 1},
    "window wider than text": {"family": "mistral", "sliding_window": 64},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied, wide heads, linear": {
        **{
            "family": "qwen2",
            "tie_word_embeddings": True,
            "head_dim": 24,
            "num_key_value_heads": 4,
        },
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
    },
    "qwen2 window 5": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen2 window above": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "qwen3 tied, biases, one key head": {
        **{"family": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
        "num_key_value_heads": 1,
    },
    "qwen3 llama3": {
        "family": "qwen3",
        "head_dim": 16,
        "rope_parameters": LLAMA3,
        "rms_norm_eps": 0.1,
    },
    "qwen3 window between": {
        **{"family": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 5},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "smollm3": SMOLLM3 | {"num_hidden_layers": 4},
    "smollm3 window, untied, biases": {
        **SMOLLM3 | {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
        **{"use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
    },
    "gemma3": GEMMA,
    "gemma3 untied, biases, linear": {
        **GEMMA
        | {"tie_word_embeddings": False, "attention_bias": True, "query_pre_attn_scalar": 100},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    },
    "gemma3 full": GEMMA | {"layer_types": ["full_attention"] * 3},
}


def oracle(family: str = "llama", seed: int = 0, **fields: Any) -> nn.Module:
    """Return a transformers model with random parameters, all large enough to affect the output."""
    config = AutoConfig.for_model(family, **SIZES | {"tie_word_embeddings": False} | fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights of norms are near one. Gemma's norms use 1 + w.
            mean = 1.0 if "norm" in name and "gemma" not in family else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def twin(model: nn.Module) -> CausalLM:
    """Return minilora's decoder with the config and the weights of a transformers model."""
    ours = CausalLM(DecoderConfig.from_hf(model.config.to_dict())).eval()
    ours.load_state_dict(model.state_dict())
    return ours


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Return random token ids (rows, count)."""
    return torch.randint(0, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def save(
    folder: Path, shards: dict | None = None, dtype: torch.dtype = torch.float32, **fields
) -> nn.Module:
    """Write a random checkpoint with transformers and return its model."""
    reference = oracle(**fields).to(dtype)
    reference.save_pretrained(folder, **(shards or {}))
    return reference


def python(code: str, *arguments, **env: str) -> str:
    """Run `code` in a new Python process and return its stdout."""
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    kept = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=kept | {"PYTHONPATH": roots} | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
