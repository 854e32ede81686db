"""NEFTune (Jain et al. 2023, arXiv:2310.05914, alg. 1): noise on the embeddings while training, and only then.

    x = embed(tokens) + α/√(T·D) · ε,    ε ~ U(−1, 1) of shape (B, T, D)

A row's T is the width of its batch, padding included, as in transformers: the noise depends on how a step is split.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """Inside, the model's input embeddings are noisy wherever the model is in training mode; 0 changes nothing."""

    def add_noise(module: Any, inputs: Any, x: Tensor) -> Tensor:
        if not module.training:
            return x
        return x + torch.empty_like(x).uniform_(-1, 1) * (alpha / (x.shape[-2] * x.shape[-1]) ** 0.5)

    hook = model.get_input_embeddings().register_forward_hook(add_noise) if alpha else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
