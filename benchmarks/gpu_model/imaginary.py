"""An imaginary GPU: launches compile for it to real machine code and do not run.

    with imaginary_gpu("sm_86") as launches:
        dequantize(packed, ..., out)            # the library's own launcher, on CPU tensors
    launches[0].name, launches[0].grid, launches[0].binary

Triton asks its driver for three things: the card to compile for, a way to load the result, and a
way to start it. The driver below answers the first with any card and does nothing for the other
two. The compiled code is therefore that of a real launch: same constants, same alignment of
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
    """One recorded launch that did not run."""

    name: str  # name of the kernel's function
    grid: tuple[int, int, int]  # programs
    metadata: Any  # from Triton's compiler: num_warps, shared (bytes of dynamic shared memory) ...
    binary: bytes  # the machine code: a cubin, or AMD's hsaco


@contextmanager
def imaginary_gpu(name: str) -> Iterator[list[Launch]]:
    """Compile every Triton launch inside for `name` and record it instead of running it."""
    launches: list[Launch] = []
    before = dict(vars(driver))
    driver.set_active(cast(Any, _Driver(_target(name), launches)))
    try:
        yield launches
    finally:
        # reset_active would ask for the driver of a GPU, which may be absent.
        vars(driver).update(before)


def _target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    lanes = 64 if name.startswith("gfx9") else 32  # CDNA has 64, RDNA 32
    return GPUTarget("hip", name, lanes)


class _Driver:
    """The part of a driver that Triton's runtime uses, without a device."""

    def __init__(self, target: GPUTarget, launches: list[Launch]):
        self.target, self.launches = target, launches
        self.utils = SimpleNamespace(
            # name, binary, shared, device -> module, function, registers, spills, and from Triton
            # 3.4 on threads
            load_binary=lambda name, binary, *rest: (True, binary, 0, 0, 1024)[: 4 if OLD else 5],
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"imaginary {self.target.arch}"  # Triton keeps one cache of kernels for each device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return the function that Triton calls to start a kernel.

        Its first five arguments are the grid, the stream and load_binary's second result.
        """

        def launch(x: int, y: int, z: int, stream: int, function: bytes, *rest: object) -> None:
            # Triton keeps this function with the compiled kernel, so the active driver, not the
            # one that created it, records the launch.
            launches = cast(_Driver, driver.active).launches
            launches.append(Launch(source.fn.__name__, (x, y, z), metadata, function))

        return launch
