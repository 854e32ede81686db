"""Tensors that backward computes again instead of keeping them.

A LoRA layer needs its input y in backward. If y is the output of a norm or of a gate, backward can
compute y again from the inputs of that operation, which the operation keeps anyway. The operation
attaches a `Recipe` to y; the layer calls `recipe_of(y)` and keeps these inputs instead of y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class Recipe:
    """A function that computes a tensor again, with one copy for all readers.

    Attributes:
        compute: Function from the kept inputs to the tensor.
        readers: Number of readers that have not read yet.
        value: The tensor between the first and the last reading, otherwise None.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute = compute
        self.readers = 0
        self.value: Tensor | None = None

    def read(self, *inputs: Tensor) -> Tensor:
        """Return the tensor; the first reader computes it, and the last one frees it.

        Args:
            *inputs: Inputs of the operation, as `recipe_of` returned them.

        Returns:
            The tensor. Readers must not write to it.
        """
        if self.value is None:
            self.value = self.compute(*inputs)
        value = self.value
        self.readers -= 1
        if self.readers <= 0:
            self.value = None
        return value


@dataclass(frozen=True)
class _Note:
    """The attribute of a tensor that has a recipe."""

    recipe: Recipe
    inputs: list[Tensor]
    version: int  # number of writes to the tensor when the note was made


def attach_recipe(y: Tensor, recipe: Recipe, *inputs: Tensor) -> Tensor:
    """Attach to a tensor the recipe that computes it again.

    Args:
        y: Result of an operation.
        recipe: Function that computes y again.
        *inputs: Arguments of the function, which the operation keeps for backward.

    Returns:
        y itself.
    """
    if torch.is_grad_enabled():
        detached = [x.detach() for x in inputs]
        note = _Note(recipe, detached, y._version)
        y.recompute_note = note  # pyright: ignore[reportAttributeAccessIssue] an extra attribute
    return y


def recipe_of(y: Tensor) -> tuple[Recipe | None, list[Tensor]]:
    """Return the tensors to keep for backward in place of y.

    A caller that receives a recipe counts as a reader, and must call `read` once.

    Args:
        y: Tensor that backward will need.

    Returns:
        A recipe and its inputs; or None and [y], if y has no recipe or was written to since.
    """
    note: _Note | None = getattr(y, "recompute_note", None)
    if note is None or y._version != note.version:
        return None, [y]
    note.recipe.readers += 1
    return note.recipe, note.inputs
