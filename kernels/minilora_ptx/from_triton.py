"""Triton launches that run on the machine: the library's own launchers, on CPU tensors.

    with ptx_machine("sm_86") as launches:
        dequantize(packed, ..., out)
    launches[0].machine.findings.all()

Triton asks its driver which card to compile for, and lets it start the result. The driver below
answers with any NVIDIA card. To start a kernel it parses the PTX that Triton compiled, and runs it
on the memory of the tensors. The compiled code is that of a real launch: the same constants,
alignment and warps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from minilora_ptx.machine import Machine, Observer
from minilora_ptx.memory import GlobalMemory
from minilora_ptx.parse import Kernel, parse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Launch:
    """One launch that ran.

    Attributes:
        name: Name of the kernel's function.
        text: The PTX.
        machine: The machine that ran it, with its findings and counts.
        grid: Number of CTAs.
        seconds: Time of the run, without compiling.
    """

    name: str
    text: str
    machine: Machine
    grid: tuple[int, int, int]
    seconds: float


@dataclass
class Settings:
    """Options of a run.

    Attributes:
        races: Search for races.
        counting: Count sectors, lines and bank passes.
        alter: Function that changes the PTX before it runs, for mutation tests.
        observer: Function called after each instruction, see `Machine`.
        ctas: Numbers of the CTAs to run, None for all.
    """

    races: bool = True
    counting: bool = False
    alter: Callable[[str], str] | None = None
    observer: Observer | None = None
    ctas: list[int] | None = None
    launches: list[Launch] = field(default_factory=list)


@contextmanager
def ptx_machine(target: str, **options: Any) -> Iterator[list[Launch]]:
    """Run every Triton launch inside on the machine.

    Args:
        target: NVIDIA target, such as "sm_86".
        **options: Fields of `Settings`.

    Yields:
        The launches that ran, in order.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    settings = Settings(**options)
    before = dict(vars(driver))
    card = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    driver.set_active(cast(Any, _Driver(card, settings)))
    try:
        yield settings.launches
    finally:
        vars(driver).update(before)  # reset_active would look for a real GPU


class _Driver:
    """The part of a driver that Triton's runtime uses."""

    def __init__(self, target: Any, settings: Settings):
        self.target = target
        self.settings = settings
        # load_binary returns module, function, registers, spills and threads
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, *rest: (True, binary, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"ptx machine {self.target.arch}"  # the key of Triton's cache of kernels

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that Triton calls to start a kernel."""
        text = _ptx_of(metadata)
        types = list(source.signature.values())

        def start(x: int, y: int, z: int, stream: int, function: bytes, *rest: Any) -> None:
            from triton.runtime import driver

            # Triton keeps this function with the kernel, so the driver of today runs it
            settings = cast(_Driver, driver.active).settings
            _, _, _, _, *arguments = rest  # packed metadata, launch metadata, two hooks
            values, memory = _bind(types, arguments)
            launch = _run(source.fn.__name__, text, (x, y, z), metadata, values, memory, settings)
            settings.launches.append(launch)

        return start


def _ptx_of(metadata: Any) -> str:
    """Return the PTX that Triton stored in its cache when it compiled a kernel."""
    from triton.runtime.cache import get_cache_manager

    files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
    paths = [path for name, path in files.items() if name.endswith(".ptx")]
    return Path(paths[0]).read_text()


@lru_cache(maxsize=256)
def _parsed(text: str) -> Kernel:
    """Return the kernel of a text."""
    return parse(text)


def _run(
    name: str,
    text: str,
    grid: tuple[int, int, int],
    metadata: Any,
    values: list[int | float],
    memory: GlobalMemory,
    settings: Settings,
) -> Launch:
    """Run one launch."""
    if settings.alter:
        text = settings.alter(text)
    kernel = _parsed(text)
    machine = Machine(
        kernel,
        grid,
        metadata.num_warps * 32,
        metadata.shared,
        settings.races,
        settings.counting,
        settings.observer,
    )
    # the last parameters are pointers to scratch memory, which these kernels do not use
    values = values + [0] * (len(kernel.parameters) - len(values))
    started = perf_counter()
    machine.run(values, memory, settings.ctas)
    return Launch(name, text, machine, grid, perf_counter() - started)


def _bind(types: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[int | float], GlobalMemory]:
    """Return the value of each parameter, and the memory of the tensors among the arguments."""
    values: list[int | float] = []
    memory = GlobalMemory()
    for kind, argument in zip(types, arguments, strict=True):
        if kind == "constexpr":
            continue  # compiled into the code
        if hasattr(argument, "data_ptr"):
            origin = argument.untyped_storage().data_ptr()
            memory.add(argument.data_ptr(), _span(argument), origin)
            values.append(argument.data_ptr())
        elif kind in ("fp16", "bf16", "fp32", "fp64"):
            values.append(float(argument))
        else:
            values.append(int(argument))
    return values, memory


def _span(tensor: "Tensor") -> int:
    """Return the bytes from the first to the last value of a tensor."""
    if not tensor.numel():
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.element_size()
