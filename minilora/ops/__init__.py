"""The steps inside a model, each in one file: its plain form on top, and the fast form that runs.

A fast form computes the same with fewer passes over memory, and keeps less for backward: not what can be made again
from what others keep (`Recipe`). `plain_ops` switches all of them off, to read, step through and compare the model as
it is written.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_fast = True


@contextmanager
def plain_ops() -> Iterator[None]:
    """Inside, models run on the plain forms. (Backward of a checkpointed layer must lie inside too: it runs again.)"""
    global _fast
    before, _fast = _fast, False
    try:
        yield
    finally:
        _fast = before


def fast() -> bool:
    """Whether the fast forms run. torch.compile is given the plain ones, which it fuses by itself."""
    return _fast and not torch.compiler.is_compiling()


def plain_now() -> bool:
    """Whether the caller is inside `plain_ops`."""
    return not _fast


class Recipe:
    """How backward makes a tensor again, from what is kept anyway. Its readers share one copy, gone after the last."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute, self.readers = compute, 0
        self.value: Tensor | None = None

    def read(self, *inputs: Tensor) -> Tensor:
        value = self.compute(*inputs) if self.value is None else self.value
        self.readers -= 1
        self.value = value if self.readers > 0 else None
        return value


def attach(y: Tensor, recipe: Recipe, *inputs: Tensor) -> Tensor:
    """Note on `y` how it came about, for whoever would keep it for backward."""
    if torch.is_grad_enabled():
        y.again = recipe, [x.detach() for x in inputs], y._version  # pyright: ignore[reportAttributeAccessIssue] a note
    return y


def recipe_of(y: Tensor) -> tuple[Recipe | None, list[Tensor]]:
    """(recipe, what to keep) of a tensor; (None, [y]) without a note, or if y was written to since."""
    recipe, inputs, version = getattr(y, "again", (None, [], -1))
    if recipe is None or y._version != version:
        return None, [y]
    recipe.readers += 1
    return recipe, inputs


def row_blocks(rows: int, width: int, device: torch.device, elements: int = 2**17) -> Iterator[slice]:
    """Slices over the rows of a matrix: on a CPU as many at a time as stay in its cache, elsewhere all of them."""
    size = max(1, elements // width) if device.type == "cpu" else max(1, rows)  # 0.5 MB in fp32
    return (slice(start, start + size) for start in range(0, rows, size))
