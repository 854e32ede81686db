"""The steps inside a model, each in one file: its plain form on top, and the fast form that runs.

A fast form computes the same with fewer passes over memory, and keeps less for backward: not what can be made again
from what others keep (`Recipe`). `reference_ops` switches all of them off, to read, step through and compare the model
as it is written.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_fast = True


@contextmanager
def reference_ops() -> Iterator[None]:
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
    """Whether the caller is inside `reference_ops`."""
    return not _fast
