"""Search for the largest run, or the smallest change to a run, that fits a limit of memory.

Memory grows nearly linearly with length, batch size and rank. Two plans therefore locate the limit,
and a few more find the last number that fits. Single changes that make a plan fit come in this
order, the smallest first:

    smaller micro-batches, and more of them    the same gradients, in more passes
    gradient_checkpointing                     the same gradients, the forward pass computed twice
    optim="adamw_8bit"                         moments rounded to 8 bits
    quantize="nf4"                             the base rounded to 4 bits
    a shorter max_length                       longer rows are truncated
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from minilora.common import unknown_name
from minilora.lora.registry import lora_layers

if TYPE_CHECKING:
    from minilora.tools.memory_plan.plan import MemoryPlan

_BYTES_BY_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_MAX_BATCH_SIZE = 2**16  # upper end of the search
WIDTH = 8  # lengths are padded to multiples of it


class _Point(NamedTuple):
    """A value of a field, and the bytes of the plan with it."""

    value: int
    size: int


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes.

    Args:
        size: Bytes, or a text such as "24GB" (10⁹ bytes) or "24 GiB" (2³⁰ bytes).

    Raises:
        ValueError: If the text is not a size.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if match is None or match[2].upper() not in _BYTES_BY_UNIT:
        raise ValueError(f"card: expected a size such as 24GB or 16GiB, got {size!r}.")
    return int(float(match[1]) * _BYTES_BY_UNIT[match[2].upper()])


def largest(total: Callable[[int], int], limit: int, start: int, most: int) -> int:
    """Return the largest n in 1 … most with total(n) <= limit, or 0 if total(1) exceeds the limit.

    Args:
        total: A function that never decreases. The search is fast if it is nearly linear.
        limit: Largest permitted value of `total`.
        start: First n to try, in 1 … most.
        most: Largest n.
    """
    low = _Point(1, total(1))
    if low.size > limit:
        return 0
    first = start if start > 1 else min(2, most)
    high = _Point(first, total(first))
    while high.size <= limit:
        if high.value == most:
            return most
        # one beyond the point where the straight line through both points meets the limit
        slope = max((high.size - low.size) / max(high.value - low.value, 1), 1)
        n = high.value + int((limit - high.size) / slope) + 1
        n = min(n, 64 * high.value, most)
        low = high
        high = _Point(n, total(n))
    return _last_that_fits(total, limit, low, high)


def _last_that_fits(total: Callable[[int], int], limit: int, low: _Point, high: _Point) -> int:
    """Return the largest n that fits, between a point that fits and one that does not."""
    turn = 0
    while high.value - low.value > 1:
        turn += 1
        # Interpolate linearly. Every third time bisect, in case `total` is not linear.
        share = 0.5
        if turn % 3:
            share = (limit - low.size) / (high.size - low.size)
        n = low.value + int(share * (high.value - low.value))
        n = min(max(n, low.value + 1), high.value - 1)
        point = _Point(n, total(n))
        if point.size <= limit:
            low = point
        else:
            high = point
    return low.value


def most(plan: "MemoryPlan", name: str, limit: int) -> int:
    """Return the largest value of a field with which the plan fits, or 0 if no value fits.

    Args:
        plan: A memory plan.
        name: "max_length", "per_device_train_batch_size" or, with an adapter, "r".
        limit: Memory in bytes.

    Raises:
        ValueError: If memory is not searched by this field.
    """
    unit = 1
    if name == "max_length":
        unit = WIDTH
        current = -(-plan.config.max_length // WIDTH)
        highest = plan.shapes.config.max_position_embeddings // WIDTH
    elif name == "per_device_train_batch_size":
        current = plan.config.per_device_train_batch_size
        highest = _MAX_BATCH_SIZE
    elif name == "r" and plan.lora is not None:
        current = plan.lora.r
        layers = lora_layers(plan.shapes).values()
        highest = min(min(layer.in_features, layer.out_features) for layer in layers)
    else:
        raise unknown_name("most", name, _searchable(plan))

    @cache
    def total(n: int) -> int:
        if n == current:
            return plan.total
        return plan.changed(**{name: unit * n}).total

    start = min(max(current, 1), highest)
    return unit * largest(total, limit, start, highest)


def _searchable(plan: "MemoryPlan") -> list[str]:
    """Return the fields that `most` accepts for a plan."""
    names = ["max_length", "per_device_train_batch_size"]
    if plan.lora:
        names.append("r")
    return names


def fixes(plan: "MemoryPlan", limit: int) -> "Iterator[tuple[str, MemoryPlan]]":
    """Generate single changes with which a plan fits, the smallest first.

    Each change is planned when the iterator reaches it, so a caller that takes only the first one
    waits for no other.

    Args:
        plan: A memory plan.
        limit: Memory in bytes.

    Yields:
        The change as text, and the plan with it.
    """
    for change in _micro_batches(plan):
        other = plan.changed(**change)
        if other.total <= limit:
            yield _as_text(change), other
            break
    for change in _switches(plan):
        other = plan.changed(**change)
        if other.total <= limit:
            yield _as_text(change), other
    length = most(plan, "max_length", limit)
    if 0 < length < plan.config.max_length:
        yield f"max_length={length}", plan.changed(max_length=length)


def _micro_batches(plan: "MemoryPlan") -> Iterator[dict[str, Any]]:
    """Generate changes to smaller micro-batches with the same number of rows a step."""
    batch = plan.config.per_device_train_batch_size
    for size in range(batch - 1, 0, -1):
        if batch % size == 0:
            yield {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": (
                    plan.config.gradient_accumulation_steps * batch // size
                ),
            }


def _switches(plan: "MemoryPlan") -> list[dict[str, Any]]:
    """Return the changes of one option that save memory in this plan."""
    changes: list[dict[str, Any]] = []
    if not plan.config.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if plan.config.optim == "adamw_torch":
        changes.append({"optim": "adamw_8bit"})
    if plan.method == "lora":
        changes.append({"quantize": "nf4"})
    return changes


def _as_text(change: dict[str, Any]) -> str:
    """Return a change in the form of keyword arguments."""
    return ", ".join(f"{name}={value!r}" for name, value in change.items())


def verdict(plan: "MemoryPlan", limit: int) -> str:
    """Return a text that states if a plan fits, and its limits or the changes that make it fit.

    Args:
        plan: A memory plan.
        limit: Memory in bytes.
    """
    card = f"{limit / 1e9:,.1f} GB"
    spare = limit - plan.total
    if spare >= 0:
        limits = [f"{name} {most(plan, name, limit):,}" for name in _searchable(plan)]
        return (
            f"fits {card}, {spare / 1e9:,.1f} GB to spare; one of these at most: "
            f"{', '.join(limits)}"
        )
    lines = [f"does not fit {card}: {-spare / 1e9:,.1f} GB too much"]
    for text, other in fixes(plan, limit):
        lines.append(f"  fits with {text}: {other.total / 1e9:,.1f} GB")
    if len(lines) == 1:
        lines.append("  no single change makes it fit")
    return "\n".join(lines)
