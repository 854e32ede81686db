"""The parts of a memory plan, and how tables and plots name them."""

from typing import Any

PARTS = {  # of a plan, and how the table and the picture name them
    "packed": "4-bit codes",
    "scales": "their scales",
    "dense": "dense weights",
    "adapters": "adapters (fp32)",
    "optimizer": "optimiser",
    "gradients": "gradients",
    "activations": "activations kept",
    "workspace": "workspace",
    "logits": "logits",
}


def about(plan: Any) -> str:
    """What is planned, in a line."""
    config = plan.config
    rank = f"r {plan.lora.r}, " if plan.lora else ""
    return (
        f"{rank}{config.per_device_train_batch_size} x {config.max_length} tokens, {config.optim}"
        f"{', gradient checkpointing' * config.gradient_checkpointing}"
    )
