"""The inverse of a plan: what fits a card.

Memory grows with length, batch and rank nearly in a straight line, so two plans tell about where the limit lies, and a
few more find the last number that fits. Of single changes that make a plan fit, the smallest comes first:

    smaller micro-batches, as many more of them      the same gradients, in more passes
    gradient_checkpointing                           the same gradients, the forward pass computed twice
    optim="adamw_8bit"                               moments rounded to 8 bits
    quantize="nf4"                                   the base rounded to 4 bits
    a shorter max_length                             longer rows are cut
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from minilora.common import unknown
from minilora.lora.registry import lora_layers

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WIDTH = 8  # lengths are padded to multiples of it
Plan = Any  # a MemoryPlan, whose module imports this one


def parse_bytes(size: int | str) -> int:
    """24_000_000_000, "24GB" (10⁹) or "24 GiB" (2³⁰) in bytes; ValueError for anything else."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"card: expected a size such as 24GB or 16GiB, got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def largest(total: Callable[[int], int], limit: int, start: int, most: int) -> int:
    """The largest n in 1 … most with total(n) <= limit, 0 if there is none; `total` never falls. `start`: any n."""
    low, high = (1, total(1)), (start, total(start))
    if low[1] > limit:
        return 0
    if start == 1:
        high = min(2, most), total(min(2, most))
    while high[1] <= limit:
        if high[0] == most:
            return most
        # one beyond where the straight line through both meets the limit
        slope = max((high[1] - low[1]) / max(high[0] - low[0], 1), 1)
        n = min(high[0] + int((limit - high[1]) / slope) + 1, 64 * high[0], most)
        low, high = high, (n, total(n))
    turn = 0
    while high[0] - low[0] > 1:
        turn += 1  # a straight line says where, and whether it is the next one; every third time the middle, if not
        share = (limit - low[1]) / (high[1] - low[1]) if turn % 3 else 0.5
        n = min(max(low[0] + int(share * (high[0] - low[0])), low[0] + 1), high[0] - 1)
        point = (n, total(n))
        low, high = (point, high) if point[1] <= limit else (low, point)
    return low[0]


def most(plan: Plan, name: str, limit: int) -> int:
    """The largest value of `name` with which the plan takes at most `limit` bytes, 0 if none."""
    unit, now = 1, getattr(plan.config, name, 1)
    if name == "max_length":
        unit, now, highest = WIDTH, -(-now // WIDTH), plan.shapes.config.max_position_embeddings // WIDTH
    elif name == "per_device_train_batch_size":
        highest = 2**16
    elif name == "r" and plan.lora is not None:
        now = plan.lora.r
        highest = min(min(layer.in_features, layer.out_features) for layer in lora_layers(plan.shapes).values())
    else:
        raise unknown("most", name, ("max_length", "per_device_train_batch_size", *(["r"] if plan.lora else [])))
    total = cache(lambda n: plan.total if n == now else plan.changed(**{name: unit * n}).total)
    return unit * largest(total, limit, min(max(now, 1), highest), highest)


def fixes(plan: Plan, limit: int) -> Iterator[tuple[str, Plan]]:
    """Single changes with which the plan fits, in words, each with its plan; the smallest first.

    Each is planned when it is asked for: who needs the first waits for no other.
    """
    config = plan.config
    batch = config.per_device_train_batch_size
    for n in (n for n in range(batch - 1, 0, -1) if batch % n == 0):
        steps = config.gradient_accumulation_steps * batch // n
        other = plan.changed(per_device_train_batch_size=n, gradient_accumulation_steps=steps)
        if other.total <= limit:
            yield f"per_device_train_batch_size={n}, gradient_accumulation_steps={steps}", other
            break
    changes = []
    if not config.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if config.optim == "adamw_torch":
        changes.append({"optim": "adamw_8bit"})
    if plan.method == "lora":
        changes.append({"quantize": "nf4"})
    for change in changes:
        other = plan.changed(**change)
        if other.total <= limit:
            (words,) = (f"{name}={value!r}" for name, value in change.items())
            yield words, other
    length = most(plan, "max_length", limit)
    if 0 < length < config.max_length:
        yield f"max_length={length}", plan.changed(max_length=length)


def verdict(plan: Plan, limit: int) -> str:
    """Whether the plan fits, and how far it would go; or what would make it fit."""
    size, spare = f"{limit / 1e9:,.1f} GB", limit - plan.total
    if spare >= 0:
        names = ["max_length", "per_device_train_batch_size", *(["r"] if plan.lora else [])]
        far = ", ".join(f"{name} {most(plan, name, limit):,}" for name in names)
        return f"fits {size}, {spare / 1e9:,.1f} GB to spare; one of these at most: {far}"
    lines = [f"does not fit {size}: {-spare / 1e9:,.1f} GB too much"]
    lines += [f"  fits with {words}: {other.total / 1e9:,.1f} GB" for words, other in fixes(plan, limit)]
    return "\n".join(lines if len(lines) > 1 else [*lines, "  no single change makes it fit"])
