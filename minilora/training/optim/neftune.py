"""NEFTune: noise on the input embeddings, in training mode only (arXiv 2310.05914, algorithm 1).

    x = embed(tokens) + α / √(T·D) · ε,    ε ~ U(−1, 1) of shape (B, T, D)

T is the width of the batch, padding included, as in transformers. The noise therefore depends on
how a step is split into micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """Add noise to the model's input embeddings inside the block, while the model is training.

    Args:
        model: A model with `get_input_embeddings()`.
        alpha: Strength α of the noise; 0 changes nothing.

    Yields:
        Nothing.

    Source:
        Jain et al. 2023, arXiv 2310.05914, algorithm 1.
    """
    if alpha == 0:
        yield
        return

    def add_noise(module: Any, inputs: Any, x: Tensor) -> Tensor:
        if not module.training:
            return x
        scale = alpha / (x.shape[-2] * x.shape[-1]) ** 0.5
        noise = torch.empty_like(x).uniform_(-1, 1)  # (B, T, D)
        # x + α / √(T·D) · ε
        return x + noise * scale  # (B, T, D)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
