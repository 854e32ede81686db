"""A model, a tokenizer and a dataset for the tests of training; a step takes milliseconds."""

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from minilora.lora.config import LoRAConfig
from minilora.lora.inject import inject
from minilora.losses.sft import SFT
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.training.distributed import process_on
from minilora.training.process import Process

VOCABULARY = 128 + 3
FAST = {"learning_rate": 1e-2, "max_steps": 5, "save_steps": None}  # fields of a TrainConfig


class Letters:
    """Tokenizer with one token per letter: 0 is padding, 1 is BOS, 2 is EOS, the rest is ASCII."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None
    eos_token, chat_template = "</s>", None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [byte + 3 for byte in text.encode("ascii")]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(i - 3 for i in ids if i > 2).decode("ascii")

    def __len__(self) -> int:
        return VOCABULARY


def llama(seed: int = 0, **fields: Any) -> CausalLM:
    """Return a random two-layer Llama in eval mode, with logits of a useful size."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
    config = DecoderConfig(VOCABULARY, **(sizes | fields))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def lora(model: Any = None, dropout: float = 0.0, targets: Any = "all-linear") -> Any:
    """Inject an adapter into the model and return it."""
    model = llama() if model is None else model
    inject(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    return model


def alone(model: Any, objective: Any = None) -> Process:
    """Return the Process that the training loop uses without distributed training."""
    process = process_on(next(model.parameters()).device)
    process.wrap(model, objective or SFT(), torch.optim.SGD(model.parameters()))
    return process


def rows(count: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Return rows that ask to repeat a word, of many lengths. A model can learn this."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdef", k=rng.randint(1, 12))) for _ in range(count)]
    return [{"prompt": f"{word}=", "completion": word} for word in words]


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of a tensor, in 2-norm."""
    assert found.keys() == expected.keys()
    return max(
        ((found[k] - expected[k]).norm() / expected[k].norm().clamp_min(1e-30)).item()
        for k in expected
    )


class Wrapped(nn.Module):
    """minilora's decoder with the interface of a transformers model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.seen = model, set()

    def forward(self, **inputs):
        self.seen |= inputs.keys()
        return SimpleNamespace(logits=self.inner(inputs["input_ids"]))


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return normally distributed values that require a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def kept(function) -> int:
    """Return the bytes that a forward pass saves for backward, each storage counted once."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())
