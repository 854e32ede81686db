"""LoRA, the method: the layer, its configuration, injection, and adapters as objects."""
