"""What training says where memory runs out: the plan, what the process had, and the smallest change that fits."""

import torch
from torch import nn

from minilora.tools.memory_plan import fit
from minilora.tools.memory_plan.plan import plan_memory, table
from minilora.training.config import TrainConfig
from minilora.training.runtime import peak_memory


def explain(model: nn.Module, config: TrainConfig, before: int) -> str:
    """A note for the error. before: `peak_memory` as it was when the model was there and training began.

    Changes are held against what was there for tensors: on a GPU what is free or torch's own, on a CPU what this
    process came to, less what it held beside the model at the start.
    """
    device = next(model.parameters()).device
    reached = peak_memory(device)
    own = sum(p.nbytes for p in model.parameters())
    limit = reached - max(before - own, 0)
    had = f"memory ran out: the process had come to {reached / 1e9:,.3f} GB"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = free + torch.cuda.memory_reserved(device)
        had = (
            f"memory ran out: {reached / 1e9:,.3f} GB were allocated at the most and {free / 1e9:,.3f} of "
            f"{total / 1e9:,.3f} GB are free"
        )
    try:
        plan = plan_memory(model, config=config)
    except ValueError as error:  # a model or an adapter that is not ours to plan
        return f"{had}. No plan: {error}"
    smallest = next(fit.fixes(plan, limit), None)
    advice = "no single change fits"
    if smallest is not None:
        advice = f"smallest change that fits {limit / 1e9:,.3f} GB: {smallest[0]}"
    return "\n".join([f"{had}; planned, with full rows:", table([plan]), advice])
