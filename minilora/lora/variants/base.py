"""Methods beside plain LoRA, each in one file. LoRAConfig asks for them: `use_dora`, `init_lora_weights`.

    DoRA     W' = m ∘ (W + s B A) / ‖W + s B A‖      rows of length m; m, A and B train          dora.py
    PiSSA    W' = W + s (B A − B₀ A₀)                s B₀ A₀ ≈ W, where A and B begin            pissa.py
    LoftQ    W' = Q + s B A                          s B A ≈ W − Q, where A and B begin; Q in 4 bits, in the place of W

Each is an adapter like LoRAAdapter (layer.py): called with a layer's input, its output so far and its base. All are for
linear layers, dense or (but LoftQ, which makes them) in 4 bits. docs/variants.md says what they cost.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from minilora.common import is_conv1d
from minilora.lora.config import LoRAConfig
from minilora.lora.merging.merge import merged_weight


def as_plain(config: LoRAConfig, adapters: dict[str, Any]) -> tuple[LoRAConfig, dict[str, Any]]:
    """What a file holds of an adapter that began from W: a plain LoRA beside the base that is in the model.

    PiSSA's has twice the rank and the same s: α/r, or α/√r when rank-stabilised. LoftQ's is one already.
    """
    if config.init_lora_weights == "loftq":
        return replace(config, init_lora_weights=True, loftq_config={}), adapters
    stronger = 2**0.5 if config.use_rslora else 2
    plain = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=stronger * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: stronger * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return plain, {path: adapter.plain() for path, adapter in adapters.items()}


def dense_weight(base: nn.Module) -> Tensor:
    """W (out, in) of a linear base, fp32."""
    W = merged_weight(base)
    return W.T if is_conv1d(base) else W
