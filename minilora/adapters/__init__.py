"""Adapters as things one keeps: files in PEFT's format, switching by name, merging into the base."""

from minilora.adapters.files import adapter_state_dict, base_state_dict, load_adapter, save_adapter
from minilora.adapters.merge import dequantized, merge, merged_weight
from minilora.adapters.switch import delete_adapter, disabled_adapters, list_adapters, use_adapter

__all__ = [
    "adapter_state_dict",
    "base_state_dict",
    "delete_adapter",
    "dequantized",
    "disabled_adapters",
    "list_adapters",
    "load_adapter",
    "merge",
    "merged_weight",
    "save_adapter",
    "use_adapter",
]
