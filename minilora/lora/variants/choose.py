"""The choice of the adapter for the variant that a LoRAConfig names."""

from typing import Any

from torch import nn

from minilora.lora.base_layers.dense_weight import no_dense_weight
from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import Adapter, unwrapped
from minilora.lora.layer import LoRAAdapter
from minilora.lora.variants import dora_embedding_conv, loftq, pissa


def as_variant(adapter: Adapter, layer: nn.Module, config: LoRAConfig, seed: int) -> Any:
    """Return the adapter of the variant that a config names, made from a plain adapter.

    Args:
        adapter: A new plain adapter. The variant takes its A, B and hyperparameters.
        layer: The layer, or a LoRALayer around it.
        config: A config with `use_dora`, or with `init_lora_weights` of PiSSA or LoftQ.
        seed: Seed of random decompositions.

    Raises:
        ValueError: The layer is not linear and the variant is not DoRA, its dense weight cannot be
            read, or the variant does not fit it.
    """
    method = str(config.init_lora_weights).partition("_")[0]  # "pissa_niter_4" → "pissa"
    if config.use_dora:
        method = "dora"
    problem = no_dense_weight(unwrapped(layer))
    if problem is not None:
        raise ValueError(f"{method} needs the dense weight. {problem}")
    if method == "dora":
        return dora_embedding_conv.begin(adapter, layer)
    if not isinstance(adapter, LoRAAdapter):
        kind = type(unwrapped(layer)).__name__
        raise ValueError(f"{method} is for linear layers, and this is {kind}: leave it out.")
    max_rank = adapter.max_rank
    if adapter.r > max_rank:
        raise ValueError(
            f"r: {method} decomposes W, which has at most rank {max_rank}: got {adapter.r}. "
            "Lower r, or give this layer another rank with rank_pattern."
        )
    if method == "pissa":
        return pissa.begin(adapter, layer, config, seed)
    return loftq.begin(adapter, layer, config)
