"""Memory on the CPU for large tensors that come and go in every step: what is freed is taken again.

A page that is new to a process costs more than filling it. malloc gives back what backward frees, and the next
step's activations fault it in again; and what it does not give back, it cuts into pieces that fit little. Here each
tensor has a block of its own, in large pages where Linux gives them. The block of one that is gone waits for the next of about
its size; where none fits, waiting blocks of as many bytes are given up, so there are never more than a step needs at
its peak. `release` gives up all that wait (PyTorch's allocator for CUDA does the same, and calls it empty_cache).
"""

import mmap
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 19  # bytes below which malloc is as good
SPARE = 1 << 25  # that wait although no tensor ever needed them at once: sizes change places within a step
SLACK = 1.25  # how much larger a block may be than its tensor

_waiting: dict[int, deque[mmap.mmap]] = {}  # by their size


class _Sum:
    all = 0  # bytes of all blocks
    most = 0  # that tensors ever had at once


class _Bytes(np.ndarray):
    """What a tensor's storage holds: its end is the tensor's."""

    block: mmap.mmap

    def __del__(self) -> None:
        _waiting.setdefault(len(self.block), deque()).append(self.block)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < SMALL or device.type != "cpu" or torch._C._len_torch_dispatch_stack():  # somebody counts, or fakes
        return torch.empty(shape, dtype=dtype, device=device)
    block = _take(size)
    found = np.ndarray.__new__(_Bytes, size, np.uint8, block)
    found.block = block
    return torch.from_numpy(found).view(dtype).view(torch.Size(shape))


def empty_like(x: Tensor) -> Tensor:
    """Contiguous."""
    return empty(x.shape, x.dtype, x.device)


def release() -> None:
    """Give up the blocks that wait."""
    while _waiting:
        size, blocks = _waiting.popitem()
        _Sum.all -= size * len(blocks)
    _Sum.most = 0


def _take(size: int) -> mmap.mmap:
    fitting = sorted(found for found in list(_waiting) if size <= found <= SLACK * size)
    for found in fitting:
        try:
            return _waiting[found].pop()
        except IndexError:  # none of that size waits
            continue
    waiting = sum(found * len(blocks) for found, blocks in _waiting.items())
    _Sum.most = max(_Sum.most, _Sum.all - waiting + size)
    for found in sorted(_waiting, reverse=True):
        while _Sum.all + size > _Sum.most + SPARE and _waiting[found]:
            _waiting[found].popleft()
            _Sum.all -= found
    _Sum.all += size
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them
            pass
    return block
