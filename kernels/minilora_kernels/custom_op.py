"""Registration of custom operators."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("minilora", "FRAGMENT")


def register(name: str, function: Callable, fake: Callable, schema: str) -> None:
    """What torch.library.custom_op does, but its first call imports torch's compiler, which a start would wait for."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minilora::{name}", fake, lib=_LIBRARY)
