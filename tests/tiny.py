"""Tiny random models of transformers, the oracle of the model's tests, and ours with the same weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from source import ROOT

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}


def oracle(family: str = "llama", seed: int = 0, **fields: Any) -> nn.Module:
    """A transformers model whose every parameter is random and large enough for all of them to matter."""
    config = AutoConfig.for_model(family, **SIZES | {"tie_word_embeddings": False} | fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and "gemma" not in family else 0.0  # norms stay near one (Gemma's are 1 + w)
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def twin(model: nn.Module) -> CausalLM:
    """Our decoder with the config and the weights of a transformers model."""
    ours = CausalLM(DecoderConfig.from_hf(model.config.to_dict())).eval()
    ours.load_state_dict(model.state_dict())
    return ours


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Random token ids (rows, count)."""
    return torch.randint(0, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def save(folder: Path, shards: dict | None = None, dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    """A random checkpoint written by transformers; returns its model."""
    reference = oracle(**fields).to(dtype)
    reference.save_pretrained(folder, **(shards or {}))
    return reference


def python(code: str, *arguments, **env: str) -> str:
    """What `code` prints in a fresh interpreter."""
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": roots} | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
