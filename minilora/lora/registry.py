"""The registry of a model's adapters, kept on the model itself."""

from torch import nn

from minilora.lora.config import LoRAConfig
from minilora.lora.layer import LoRALayer
from minilora.lora.modules_to_save import TrainedParts


def lora_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, LoRALayer]:
    """The model's LoRALayers by name, in model order."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {path: module for path, module in modules if isinstance(module, LoRALayer)}


class Injected(dict[str, LoRAConfig]):
    """What a model knows about its adapters: config by name; their seeds, tokenizers and what else trains with them."""

    def __init__(self):
        super().__init__()
        self.seeds: dict[str, int | None] = {}  # None where a file did not say
        self.tokenizers: dict[str, dict[str, str] | None] = {}  # hashes of what they were trained with
        self.parts = TrainedParts()


def lora_configs(model: nn.Module) -> Injected:
    """The config of each injected adapter, by name; kept on the model itself."""
    return model.__dict__.setdefault("_lora_configs", Injected())
