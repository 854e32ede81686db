"""Parts of a memory plan, with their captions in tables and pictures."""

from typing import Any

# Field of MemoryPlan -> its caption in the table and the picture.
PARTS = {
    "packed": "quantised codes",
    "scales": "block scales",
    "dense": "dense weights",
    "adapters": "adapters (fp32)",
    "optimizer": "optimiser",
    "gradients": "gradients",
    "activations": "activations kept",
    "workspace": "workspace",
    "logits": "logits",
}


def about(plan: Any) -> str:
    """Return one line that describes the planned run: rank, batch, length and optimiser.

    Args:
        plan: A `MemoryPlan`.
    """
    config = plan.config
    words = []
    if plan.lora:
        words.append(f"r {plan.lora.r}")
    words.append(f"{config.per_device_train_batch_size} x {config.max_length} tokens")
    words.append(config.optim)
    if config.gradient_checkpointing:
        words.append("gradient checkpointing")
    return ", ".join(words)
