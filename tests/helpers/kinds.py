"""Models with every kind of layer that can have an adapter, and their outputs for the tests."""

from typing import Any

import torch
from torch import Tensor, nn

from helpers.tiny import oracle, tokens

TOKENS = tokens(2, 9)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)


class Images(nn.Module):
    """Model with 1d, 2d and 3d convolutions, a linear layer and an embedding with padding_idx."""

    def __init__(self, groups: int = 1):
        super().__init__()
        self.flat = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.one = nn.Conv2d(8, 6, 1, bias=False)
        self.long = nn.Conv1d(6, 4, 5, padding="same", groups=groups)
        self.deep = nn.Conv3d(1, 2, (1, 3, 2), dilation=(2, 1, 1))
        self.words = nn.Embedding(11, 8, padding_idx=3)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.flat(x).tanh())  # (N, 6, 4, 4)
        h = self.long(h.flatten(2)).tanh()  # (N, 4, 16)
        h = self.deep(h[:, None, :, :4, None].expand(-1, -1, -1, -1, 2)).flatten(1)  # (N, 16)
        return self.head(h[:, :8] + self.words(torch.arange(4) % 4).sum(0))  # (N, 5)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=97, bos_token_id=0, eos_token_id=0
    )
    return shake(GPT2LMHeadModel(config).eval())


MODELS = {
    "llama": oracle,
    "tied": lambda: oracle(tie_word_embeddings=True),
    "gemma": lambda: oracle(
        "gemma3_text", pad_token_id=None, head_dim=16, tie_word_embeddings=False
    ),
    "gpt2": gpt2,
    "phi3": lambda: oracle("phi3", pad_token_id=0),
    "images": Images,
}


def build(kind: str) -> Any:
    """Return the model with the same random weights every time, in eval mode."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def shake(model: nn.Module, seed: int = 0) -> Any:
    """Add noise to all trainable parameters, as if the model had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def output(model: Any) -> Tensor:
    """Return the output for a fixed input: logits, or the output of `Images`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        out = model(IMAGES if isinstance(base, Images) else TOKENS)
    return out if isinstance(out, Tensor) else out.logits


def close(found: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """Assert that the largest error is at most `relative` times the largest expected value."""
    assert (found - expected).abs().max() <= relative * expected.abs().max()
