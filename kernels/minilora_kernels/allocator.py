"""Reuse of memory for large CPU tensors that every training step creates and frees.

The first write to a page that is new to a process costs more than filling the page. malloc returns
the memory that backward frees to the system, and the activations of the next step fault it in
again. Memory that malloc keeps is cut into pieces, which fit few tensors. Here each large tensor
has a separate block, in pages of 2 MiB where Linux offers them: 16 page faults for 4096 x 4096
values in bf16 instead of 8,192.

When a tensor is freed, its block waits for the next tensor of about the same size. If no waiting
block fits, the pool releases waiting blocks, so that the total is never much more than tensors
needed at the same time. `release` frees all waiting blocks, as torch.cuda.empty_cache does on a
GPU.
"""

import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 19  # bytes below which malloc is as fast
SLACK = 1.25  # largest ratio of a reused block to its tensor
SPARE = 1 << 24  # bytes that may wait beyond the peak, because sizes alternate within a step

_waiting: dict[int, deque[mmap.mmap]] = {}  # size in bytes -> blocks without a tensor


@dataclass
class _Totals:
    """Sizes in bytes of all blocks together."""

    allocated: int = 0  # of all blocks, with a tensor or waiting
    peak: int = 0  # largest size of the blocks that tensors used at the same time


_totals = _Totals()


class _Storage(np.ndarray):
    """The memory of a tensor. Its block waits for another tensor when the tensor is freed."""

    block: mmap.mmap

    # the globals are bound as defaults: when Python exits, it clears them first
    def __del__(self, waiting: dict = _waiting, new_queue: type = deque) -> None:
        waiting.setdefault(len(self.block), new_queue()).append(self.block)


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, once: bool = False
) -> Tensor:
    """Return an uninitialised tensor, as torch.empty does.

    Small tensors, and tensors on other devices, are those of torch.empty.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        device: Device of the tensor.
        once: Do not keep the block when the tensor is freed, because the next tensors have other
            sizes.

    Returns:
        A contiguous tensor with any values.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    # inside a compiler or a dispatch mode, which counts or fakes tensors, torch must allocate
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or size < SMALL or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        block = _new_block(size) if once else _reused_block(size)
    except OSError:  # no memory: torch raises its own error, unless the waiting blocks are enough
        release()
        return torch.empty(shape, dtype=dtype, device=device)
    if once:
        storage = np.ndarray.__new__(np.ndarray, size, np.uint8, block)
    else:
        storage = np.ndarray.__new__(_Storage, size, np.uint8, block)
        storage.block = block
    return torch.from_numpy(storage).view(dtype).view(torch.Size(shape))


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor with the shape, dtype and device of another.

    Args:
        x: Tensor to imitate.

    Returns:
        A contiguous tensor with any values.
    """
    return empty(x.shape, x.dtype, x.device)


def release() -> None:
    """Free all waiting blocks."""
    while _waiting:
        size, blocks = _waiting.popitem()
        _totals.allocated -= size * len(blocks)
    _totals.peak = 0


def row_blocks(
    rows: int, width: int, device: torch.device, elements: int = 2**17
) -> Iterator[slice]:
    """Yield slices over the rows of a matrix, for work that should stay in the cache.

    Args:
        rows: Number of rows.
        width: Number of values in a row.
        device: Device of the matrix. On a CPU a slice has about `elements` values; elsewhere one
            slice has all rows.
        elements: Number of values in a slice. The default is 0.5 MB in fp32.

    Yields:
        Consecutive slices that cover all rows.
    """
    if device.type == "cpu":
        size = max(1, elements // width)
    else:
        size = max(1, rows)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _reused_block(size: int) -> mmap.mmap:
    """Return a waiting block of about this size, or a new one."""
    for block_size in sorted(list(_waiting)):  # a copy: other threads may add blocks
        if not size <= block_size <= SLACK * size:
            continue
        try:
            return _waiting[block_size].pop()
        except (IndexError, KeyError):  # no block of this size, or another thread took it
            continue
    _release_excess(size)
    _totals.allocated += size
    return _new_block(size)


def _release_excess(size: int) -> None:
    """Free waiting blocks, the largest first, until `size` more bytes stay near the peak."""
    waiting = 0
    for block_size, blocks in list(_waiting.items()):
        waiting += block_size * len(blocks)
    _totals.peak = max(_totals.peak, _totals.allocated - waiting + size)
    limit = _totals.peak + SPARE
    for block_size in sorted(list(_waiting), reverse=True):
        while _totals.allocated + size > limit and _waiting[block_size]:
            _waiting[block_size].popleft()
            _totals.allocated -= block_size


def _new_block(size: int) -> mmap.mmap:
    """Return new memory of the system, in large pages where it has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a Linux kernel that was built without large pages
            pass
    return block
