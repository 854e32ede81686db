"""What a piece of code holds while it runs, byte by byte, without running it.

Inside a `FakeTensorMode` tensors have shapes and no storage, and autograd keeps and drops them as ever. The meter sees
each operation, adds the bytes of every new storage, and takes them off when its last user lets go: the graph that the
code builds is what is counted, so that there is no formula here to fall behind the code. Values are never known. Where
code asks for one it is told 1, and of a search for what is not zero that all is: every token is learned.
What a kernel takes for itself is not seen (a few MB on a CPU), but for logsumexp's, which is as large as its input.
"""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_device = torch.ops.prim.device.default


class Stretch(NamedTuple):
    """A part of a step, in bytes: the most that it holds above what there was before, and what it leaves behind."""

    rise: int
    change: int
    gradients: int  # of the change
    freed: Mapping[int, int]  # of what other parts of the step had made, by their sort


class Meter(TorchDispatchMode):
    """`live` bytes of the storages made inside, by the operations that the mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self._peak = self._before = self._gradients = 0
        self.sort = -1  # of the stretch that goes on
        self._storages: dict[int, tuple[int, int]] = {}  # size and sort
        self._freed: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device and isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # what the mode below would say; most of what a step asks is this
        if func is _aten._local_scalar_dense.default:
            return 1
        if func is _aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        found = func(*args, **(kwargs or {}))
        self.count(found)
        self.inside(func, args)
        return found

    def inside(self, func: Any, args: Any) -> None:
        """Add what is known of a kernel's own buffers, for as long as it runs."""
        if func is _aten.logsumexp.default:  # exp(x - max)
            self._peak = max(self._peak, self.live + args[0].nbytes)

    def count(self, made: Any) -> None:
        """Add the storages that an operation made; each takes itself off when it is freed."""
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._storages:
                self._storages[storage._cdata] = storage.nbytes(), self.sort
                self.live += storage.nbytes()
                self._peak = max(self._peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, storage: int) -> None:
        size, sort = self._storages.pop(storage)
        self.live -= size
        self._freed[sort] += size

    def stretch(self, gradients: int) -> Stretch:
        """What happened since the last call; `gradients`: the bytes of all .grad now."""
        change = self.live - self._before
        found = Stretch(self._peak - self._before, change, gradients - self._gradients, self._freed)
        self._freed = Counter()
        self._peak = self._before = self.live
        self._gradients = gradients
        return found


class Unfilled(TorchDispatchMode):
    """Inside, random numbers are not drawn: of weights that have no storage only the shapes matter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.normal_.default, _aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))
