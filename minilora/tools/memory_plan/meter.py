"""Measurement of the memory that code holds, without running it on data.

Inside a `FakeTensorMode` tensors have shapes but no storage, and autograd keeps and frees them as
usual. The meter sees each operation, adds the bytes of every new storage, and subtracts them when
the last reference is dropped. It measures the graph that the code builds, so there is no formula
that could become outdated.

Simplified: values are never known. Code that asks for a value receives 1, and a search for nonzero
elements finds all of them, so every token is supervised. The buffers that a kernel allocates for
its own use are not seen (a few MB on a CPU), except those of logsumexp, which are as large as its
input.
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
    """Memory of one part of a training step, in bytes.

    Attributes:
        rise: Peak above the memory at the beginning of the part.
        change: Difference between the end and the beginning of the part.
        gradients: Share of `change` that is gradients.
        freed: Bytes that this part freed, by the kind of layer that allocated them.
    """

    rise: int
    change: int
    gradients: int
    freed: Mapping[int, int]


class Meter(TorchDispatchMode):
    """Counter of the live bytes of all storages that are made inside the mode.

    Attributes:
        live: Bytes that are alive.
        layer_kind: Kind of layer that runs, for `Stretch.freed`; -1 outside all layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.layer_kind = -1
        self._peak = 0
        self._before = 0  # `live` at the beginning of the part
        self._gradients = 0  # bytes of gradients at the beginning of the part
        self._storages: dict[int, tuple[int, int]] = {}  # address -> size, kind of layer
        self._freed: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device and isinstance(args[0], FakeTensor):
            if not args[0].fake_mode.in_kernel_invocation:
                # The most frequent call by far. FakeTensorMode would return the same, but slower.
                return args[0].fake_device
        if func is _aten._local_scalar_dense.default:
            return 1
        if func is _aten.nonzero.default:
            tensor = args[0]
            return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        self.count(result)
        self.inside(func, args)
        return result

    def inside(self, func: Any, args: Any) -> None:
        """Add the known buffers of a kernel to the peak.

        Args:
            func: The operation.
            args: Its positional arguments.
        """
        if func is _aten.logsumexp.default:  # exp(x - max), as large as x
            self._peak = max(self._peak, self.live + args[0].nbytes)

    def count(self, made: Any) -> None:
        """Add the storages of new tensors; each subtracts its bytes when it is freed.

        Args:
            made: Result of an operation: a tensor, or a nested structure that contains tensors.
        """
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._storages:
                continue
            self._storages[address] = (storage.nbytes(), self.layer_kind)
            self.live += storage.nbytes()
            self._peak = max(self._peak, self.live)
            weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        """Subtract the bytes of a storage that was freed."""
        size, layer_kind = self._storages.pop(address)
        self.live -= size
        self._freed[layer_kind] += size

    def stretch(self, gradients: int) -> Stretch:
        """Return the memory of the part of the step since the last call, and begin a new part.

        Args:
            gradients: Bytes of all `.grad` at this moment.
        """
        change = self.live - self._before
        result = Stretch(
            self._peak - self._before, change, gradients - self._gradients, self._freed
        )
        self._freed = Counter()
        self._peak = self.live
        self._before = self.live
        self._gradients = gradients
        return result


class Unfilled(TorchDispatchMode):
    """Mode in which random initialisation does nothing, for weights that have shapes only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.normal_.default, _aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))
