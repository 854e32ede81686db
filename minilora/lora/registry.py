"""The registry of a model's adapters, stored on the model itself."""

from typing import Any

from torch import nn

from minilora.common import named_modules, unwrap_model
from minilora.lora.config import LoRAConfig
from minilora.lora.layer import LoRALayer
from minilora.lora.trained_parts.modules_to_save import TrainedParts
from minilora.quant.storage import Storage


class AdapterRegistry(dict[str, LoRAConfig]):
    """The config of each adapter by name, and the other facts that belong to an adapter.

    Attributes:
        seeds: Seed of each adapter's initial values; None if it was loaded from a file without it.
        tokenizers: Hashes of the tokenizer that each adapter was trained with, and its
            "chat_template_kwargs".
        storages: Storage of the base that each adapter was trained on (quant/storage.py).
        labels: Label names of each classifier, in the order of the head's outputs.
        parts: Modules and biases that train together with an adapter.
        vocabulary: Number of tokens when the first adapter was added; None without an embedding.
        with_vocabulary: Names of the adapters whose files store the embedding and output layer.
    """

    def __init__(self):
        super().__init__()
        self.seeds: dict[str, int | None] = {}
        self.tokenizers: dict[str, dict[str, Any] | None] = {}
        self.storages: dict[str, Storage | None] = {}
        self.labels: dict[str, list[Any]] = {}
        self.parts = TrainedParts()
        self.vocabulary: int | None = None
        self.with_vocabulary: set[str] = set()


def lora_configs(model: nn.Module) -> AdapterRegistry:
    """Return the registry of a model's adapters, which is created at the first call.

    Args:
        model: Any model.
    """
    return unwrap_model(model).__dict__.setdefault("_lora_configs", AdapterRegistry())


def lora_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, LoRALayer]:
    """Return the LoRALayers of a model by name, in model order.

    Args:
        model: Any model.
        remove_duplicate: List a layer that has several names in the model only once.
    """
    layers = {}
    for path, module in named_modules(model, remove_duplicate):
        if isinstance(module, LoRALayer):
            layers[path] = module
    return layers
