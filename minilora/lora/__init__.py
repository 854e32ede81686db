"""The method LoRA: the layer, its configuration, injection into models, and adapter files."""
