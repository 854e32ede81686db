"""A GPU that is not there: launches compile for it, to real machine code, and then run nowhere.

    with imaginary_gpu("sm_86") as launches:
        dequantize(packed, ..., out)            # the library's own launcher, on CPU tensors
    launches[0].name, launches[0].grid, launches[0].binary

Triton asks its driver three things: for which card to compile, how to load the result, how to start
it. The driver below answers the first with any card one likes and does nothing for the others, so
that what is compiled is what a real launch would compile: same constants, same alignment of
pointers, same warps. Targets are written "sm_86" (NVIDIA) or "gfx942" (AMD).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4)


@dataclass(frozen=True)
class Launch:
    """One launch that did not take place."""

    name: str  # of the kernel's function
    grid: tuple[int, int, int]  # programs
    metadata: Any  # of Triton's compiler: num_warps, shared (bytes of dynamic shared memory) ...
    binary: bytes  # the machine code: a cubin, or AMD's hsaco


@contextmanager
def imaginary_gpu(name: str) -> Iterator[list[Launch]]:
    """Every Triton launch inside compiles for `name` and is recorded instead of run."""
    launches: list[Launch] = []
    before = dict(vars(driver))
    driver.set_active(cast(Any, _Driver(_target(name), launches)))
    try:
        yield launches
    finally:
        vars(driver).update(
            before
        )  # reset_active would ask for the driver of a GPU that may not be there


def _target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget(
        "hip", name, 64 if name.startswith("gfx9") else 32
    )  # CDNA has 64 lanes, RDNA 32


class _Driver:
    """What Triton's runtime asks of a driver, answered without a device."""

    def __init__(self, target: GPUTarget, launches: list[Launch]):
        self.target, self.launches = target, launches
        self.utils = SimpleNamespace(
            # name, binary, shared, device -> module, function, registers, spills, and since Triton
            # 3.4 threads
            load_binary=lambda name, binary, *rest: (True, binary, 0, 0, 1024)[: 4 if OLD else 5],
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"imaginary {self.target.arch}"  # Triton keeps one cache of kernels a device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What starts a kernel; its first five arguments are the grid, the stream and load_binary's second result."""

        def launch(x: int, y: int, z: int, stream: int, function: bytes, *rest: object) -> None:
            # Triton keeps this function with the compiled kernel: whichever context is open records
            # the launch
            launches = cast(_Driver, driver.active).launches
            launches.append(Launch(source.fn.__name__, (x, y, z), metadata, function))

        return launch
