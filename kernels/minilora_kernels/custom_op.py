"""Registration of custom operators in the namespace torch.ops.minilora."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("minilora", "FRAGMENT")


def register(name: str, function: Callable, fake: Callable, schema: str) -> None:
    """Register an operator that torch.compile treats as opaque.

    `torch.library.custom_op` does the same, but its first call imports torch's compiler, which
    would delay the start of every program.

    Args:
        name: Name of the operator: it becomes `torch.ops.minilora.<name>`.
        function: Implementation for tensors with values, on any device.
        fake: Implementation that returns empty tensors of the right shapes, for tracing.
        schema: Types of arguments and results, "(Tensor x, int n) -> Tensor".
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minilora::{name}", fake, lib=_LIBRARY)
