"""Tensors that backward computes again from what others keep."""

from collections.abc import Callable

import torch
from torch import Tensor


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
