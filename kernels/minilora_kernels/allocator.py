"""Memory on the CPU for large tensors that come and go in every step: what is freed is taken again.

A page that is new to a process costs more than filling it. malloc gives back what backward frees, and the next step's
activations fault it in again; what it keeps, it cuts into pieces that fit little. Here each tensor has a block of its
own, in pages of 2 MiB where Linux gives them (16 faults for 4096 x 4096 in bf16 instead of 8,192). The block of one
that is gone waits for the next of about its size. Where none fits, waiting blocks are given up, so that there are
never many more than tensors had at once. `release` gives up all that wait, as torch.cuda.empty_cache does on a GPU.
"""

import mmap
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 19  # bytes below which malloc is as good
SLACK = 1.25  # how much larger a block may be than its tensor
SPARE = 1 << 24  # bytes that wait beyond what tensors ever had at once: sizes change places within a step

_waiting: dict[int, deque[mmap.mmap]] = {}  # by their size


class _Bytes:
    """Of all blocks, and the most that tensors had at once."""

    all = most = 0


class _Storage(np.ndarray):
    """What a tensor's storage holds on to; its end is the tensor's."""

    block: mmap.mmap

    def __del__(self, waiting: dict = _waiting, new: type = deque) -> None:  # bound: at exit globals go first
        waiting.setdefault(len(self.block), new()).append(self.block)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, once: bool = False) -> Tensor:
    """torch.empty; `once`: what comes next is of other sizes, so that its block would wait for nothing."""
    size = torch.Size(shape).numel() * dtype.itemsize
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()  # a mode counts, or fakes, tensors
    if followed or size < SMALL or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        block = _block(size) if once else _take(size)
    except OSError:  # no memory: torch says so as ever, unless what waits is enough
        release()
        return torch.empty(shape, dtype=dtype, device=device)
    storage = np.ndarray.__new__(np.ndarray if once else _Storage, size, np.uint8, block)
    if isinstance(storage, _Storage):
        storage.block = block
    return torch.from_numpy(storage).view(dtype).view(torch.Size(shape))


def empty_like(x: Tensor) -> Tensor:
    """Contiguous, of x's shape, dtype and device."""
    return empty(x.shape, x.dtype, x.device)


def release() -> None:
    """Give up the blocks that wait."""
    while _waiting:
        size, blocks = _waiting.popitem()
        _Bytes.all -= size * len(blocks)
    _Bytes.most = 0


def _take(size: int) -> mmap.mmap:
    for found in sorted(found for found in list(_waiting) if size <= found <= SLACK * size):
        try:
            return _waiting[found].pop()
        except (IndexError, KeyError):  # none of that size waits
            continue
    waiting = sum(found * len(blocks) for found, blocks in list(_waiting.items()))
    _Bytes.most = max(_Bytes.most, _Bytes.all - waiting + size)
    for found in sorted(list(_waiting), reverse=True):
        while _Bytes.all + size > _Bytes.most + SPARE and _waiting[found]:
            _waiting[found].popleft()
            _Bytes.all -= found
    _Bytes.all += size
    return _block(size)


def _block(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them
            pass
    return block


def row_blocks(rows: int, width: int, device: torch.device, elements: int = 2**17) -> Iterator[slice]:
    """Slices over the rows of a matrix: on a CPU as many at a time as stay in its cache, elsewhere all of them."""
    size = max(1, elements // width) if device.type == "cpu" else max(1, rows)  # 0.5 MB in fp32
    return (slice(start, start + size) for start in range(0, rows, size))
