"""Every intermediate of LoRA and QLoRA by name, while a model runs."""
