"""Switch between the fast operations and their reference implementations.

Each operation of a model is one file: the reference implementation first, then the fast one that
runs. The fast one computes the same with fewer passes over memory, and keeps less for backward: it
keeps no tensor that backward can compute again from other tensors that are kept (recompute.py).
`reference_ops` switches all operations to their references, to read, debug and compare a model as
it is written.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_fast = True


@contextmanager
def reference_ops() -> Iterator[None]:
    """Run models on the reference implementations inside a `with` block.

    The backward pass of a checkpointed layer must be inside as well, because it runs the forward
    pass a second time.
    """
    global _fast
    before = _fast
    _fast = False
    try:
        yield
    finally:
        _fast = before


def fast() -> bool:
    """Return True if the fast implementations run.

    torch.compile gets the reference implementations, because it fuses them without help.
    """
    return _fast and not torch.compiler.is_compiling()


def plain_now() -> bool:
    """Return True inside `reference_ops`."""
    return not _fast
