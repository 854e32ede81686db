"""The variants of LoRA, and a helper that they share.

LoRAConfig selects a variant by `use_dora` or `init_lora_weights`:

    DoRA     W' = m ∘ (W + s B A) / ‖W + s B A‖      row lengths m, A and B train         dora.py
    PiSSA    W' = W + s (B A − B₀ A₀)                s B₀ A₀ ≈ W at the start             pissa.py
    LoftQ    W' = Q + s B A                          Q is W in 4 bits, s B A ≈ W − Q      loftq.py

Each variant is an adapter like LoRAAdapter (layer.py): it is called with the input of a layer, its
output so far and its base. All variants are for linear layers, dense or in 4 bits; LoftQ, which
makes the 4 bits itself, is for dense layers only. DoRA is also for embeddings and convolutions
(dora_embedding_conv.py). docs/variants.md shows their cost.
"""

from dataclasses import replace
from typing import Any

from minilora.lora.config import LoRAConfig


def as_plain(config: LoRAConfig, adapters: dict[str, Any]) -> tuple[LoRAConfig, dict[str, Any]]:
    """Return a PiSSA or LoftQ adapter as a plain LoRA for the base in the model.

    A PiSSA adapter becomes a LoRA of twice the rank with the same s: α/r, or α/√r if it is
    rank-stabilised. A LoftQ adapter is a plain LoRA already.

    Args:
        config: The config of the adapter.
        adapters: Its adapters by layer name.

    Returns:
        The config and the adapters of the plain LoRA.
    """
    if config.init_lora_weights == "loftq":
        return replace(config, init_lora_weights=True, loftq_config={}), adapters
    alpha_factor = 2**0.5 if config.use_rslora else 2
    plain_config = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=alpha_factor * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: alpha_factor * alpha for key, alpha in config.alpha_pattern.items()},
    )
    plain_adapters = {path: adapter.plain() for path, adapter in adapters.items()}
    return plain_config, plain_adapters
