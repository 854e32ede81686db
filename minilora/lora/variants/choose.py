"""The adapter of the variant that a LoRAConfig asks for."""

from typing import Any

from torch import nn

from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import unwrapped
from minilora.lora.layer import LoRAAdapter
from minilora.lora.variants import dora, loftq, pissa


def vary(adapter: nn.Module, layer: nn.Module, config: LoRAConfig, seed: int) -> Any:
    """The adapter that `config` asks for on `layer`, made of the plain one. ValueError: the layer is not linear."""
    name = "dora" if config.use_dora else str(config.init_lora_weights).partition("_")[0]
    if type(adapter) is not LoRAAdapter:
        raise ValueError(f"{name} is for linear layers, and this is {type(unwrapped(layer)).__name__}: leave it out.")
    begin = {"dora": dora, "pissa": pissa, "loftq": loftq}[name].begin
    return begin(adapter, layer, config, seed)
