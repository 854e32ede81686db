"""Note for an out-of-memory error: plan, memory in use, and smallest change that fits."""

import torch
from torch import nn

from minilora.tools.memory_plan import fit
from minilora.tools.memory_plan.plan import plan_memory, table
from minilora.training.config import TrainConfig
from minilora.training.runtime import peak_memory


def explain(model: nn.Module, config: TrainConfig, before: int) -> str:
    """Return a note for an out-of-memory error of training.

    Args:
        model: The model that was trained.
        config: The run.
        before: `peak_memory` in bytes at the start of training, with the model loaded.

    Returns:
        The memory in use, the plan, and the smallest single change that fits.
    """
    device = next(model.parameters()).device
    usage, limit = _usage_and_limit(model, device, before)
    try:
        plan = plan_memory(model, config=config)
    except ValueError as error:  # not a model of this library, or without an adapter
        return f"{usage}. No plan: {error}"
    smallest = next(fit.fixes(plan, limit), None)
    advice = "no single change fits"
    if smallest is not None:
        change, _ = smallest
        advice = f"smallest change that fits {limit / 1e9:,.3f} GB: {change}"
    return "\n".join([f"{usage}; planned, with full rows:", table([plan]), advice])


def _usage_and_limit(model: nn.Module, device: torch.device, before: int) -> tuple[str, int]:
    """Return a text on the memory in use, and the bytes that tensors may take.

    On a GPU these bytes are free or reserved by torch. On a CPU they are the peak of this process
    without its memory at the start that was not the model's.
    """
    peak = peak_memory(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        usage = (
            f"memory ran out: at most {peak / 1e9:,.3f} GB were allocated, and "
            f"{free / 1e9:,.3f} of {total / 1e9:,.3f} GB are free"
        )
        return usage, free + torch.cuda.memory_reserved(device)
    model_bytes = sum(p.nbytes for p in model.parameters())
    usage = f"memory ran out: the process used {peak / 1e9:,.3f} GB"
    return usage, peak - max(before - model_bytes, 0)
