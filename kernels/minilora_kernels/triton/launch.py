"""Launch of the kernels: the tile for the card, the device of the tensors, and exact arithmetic.

The *tile* of a kernel states how much work one program does: the constants of the kernel (powers of
two, which Triton's arange asks for) and the number of warps. Triton's tutorials call the constant
BLOCK_SIZE; here each has a name with its unit, because "block size" is a term of NF4.

The entries of TILES were chosen by counting the machine code to which they compile:
`python benchmarks/gpu_model/kernel_report.py` prints the counts. On a GPU,
`python benchmarks/gpu_kernels/kernel_bench.py --tune` measures them, and prints a better entry
where it finds one. No entry has been timed on a GPU yet.

Every launch passes enable_fp_fusion=False. With fusion, the second level of scales,
`map[code] * a2 + offset`, would become one multiply-add that rounds once instead of twice, and the
last bit would differ from bitsandbytes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_MAJOR, _MINOR = triton.__version__.split(".")[:2]
TRITON_VERSION = (int(_MAJOR), int(_MINOR))


@dataclass(frozen=True)
class Tile:
    """The work of one program.

    Attributes:
        constants: Name and value of each constant of the kernel.
        num_warps: Number of warps that run the program.
    """

    constants: tuple[tuple[str, int], ...]
    num_warps: int


def tile(num_warps: int, **constants: int) -> Tile:
    """Return a tile.

    Args:
        num_warps: Number of warps that run one program.
        **constants: Constants of the kernel by name.

    Returns:
        The tile.
    """
    return Tile(tuple(constants.items()), num_warps)


# kernel -> architecture -> tile. "gfx9" are the CDNA cards of AMD. Their warps have 64 lanes
# instead of 32, so half as many warps do the same work.
TILES: dict[str, dict[str, Tile]] = {
    "dequantize_nf4": {
        # one word a thread is one 128-bit store; 4 words in flight hide the latency of memory, in
        # 40 registers
        "default": tile(4, WORDS=128),
        "gfx9": tile(2, WORDS=128),
    },
    "dequantize_nf4_textbook": {
        # 4 bytes a thread: a 32-bit load, a 128-bit store
        "default": tile(4, BYTES=512),
    },
    "quantize_nf4": {
        # 16 values a thread share one division; 32 would need 56 registers, and reach an occupancy
        # of 56 % on sm_80 and sm_90
        "default": tile(4, VALUES=2048),
        "gfx9": tile(2, VALUES=2048),
    },
    "quantize_nf4_textbook": {
        "default": tile(4, VALUES=1024),
    },
    "double_quantize_nf4": {
        # 8 values a thread, whose 8 look-ups run at the same time
        "default": tile(4, ROWS=4),
    },
    "gemv_nf4": {
        # all lanes are along a row, so that x arrives where it is used; two rows share each value.
        # Four would take fewer cycles of the load and store unit (1.81 instead of 1.95), and 96
        # registers instead of 64
        "default": tile(2, ROWS=2, CHUNKS=64),
        "gfx9": tile(1, ROWS=2, CHUNKS=64),
    },
    "gemv_nf4_small": {
        # 2 lanes a row: no lane is idle, and one warp needs no barrier
        "default": tile(1, ROWS=16, CHUNKS=2),
        "gfx9": tile(1, ROWS=32, CHUNKS=2),
    },
    "gemv_nf4_textbook": {
        "default": tile(4, BYTES=512),
    },
    "matmul_nf4": {
        # 4 lanes have the 4 chunks of a row, and 8 lanes 8 rows, as on the tensor cores. 128 rows
        # share a load of x: 1.99 cycles of the load and store unit for 32 weights, and 64 rows
        # 2.41. They take 144 to 168 registers, a quarter of the occupancy, and keep 64 bytes of
        # codes a thread on the way, more than enough for the latency of memory
        "default": tile(4, ROWS=128, CHUNKS=4),
        "gfx9": tile(2, ROWS=64, CHUNKS=2),
    },
    "matmul_nf4_many": {
        # a warp has 16 rows, the smallest tile of the tensor cores, and a thread one chunk of a row
        "default": tile(4, ROWS=64, CHUNKS=2),
        "gfx9": tile(2, ROWS=64, CHUNKS=2),
    },
    "cross_entropy": {
        # 8 logits a thread, one 128-bit load; more would take registers that other rows need
        "default": tile(8, WIDTH=2048),
        "gfx9": tile(4, WIDTH=2048),
    },
    "adamw_8bit": {
        # 8 values a thread share two divisions and the time to fill the look-up tables; 4 values
        # would take 11 instructions more each
        "default": tile(4, ROWS=4),
        "gfx9": tile(2, ROWS=4),
    },
    # read once and written once: 8 or 16 values of bf16 a thread, in accesses of 128 bits
    "rms_norm": {
        "default": tile(8, VALUES=4096),
        "gfx9": tile(4, VALUES=4096),
    },
    "rms_norm_backward": {
        "default": tile(8, VALUES=4096),
        "gfx9": tile(4, VALUES=4096),
    },
    "rms_norm_weight": {
        "default": tile(4, ROWS=16, COLUMNS=128),
        "gfx9": tile(2, ROWS=16, COLUMNS=128),
    },
    "rotate": {
        "default": tile(4, VALUES=1024),
        "gfx9": tile(2, VALUES=1024),
    },
    "gated": {
        "default": tile(4, VALUES=1024),
        "gfx9": tile(2, VALUES=1024),
    },
    "gated_backward": {
        "default": tile(4, VALUES=1024),
        "gfx9": tile(2, VALUES=1024),
    },
}

_overridden: dict[str, Tile] = {}


def cdiv(n: int, size: int) -> int:
    """Return n / size, rounded up.

    Args:
        n: Number of elements.
        size: Number of elements of a program, or of a block.

    Returns:
        The number of programs or blocks.
    """
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n.

    Args:
        n: Number, 1 or more.

    Returns:
        The power of two.
    """
    return 1 << (n - 1).bit_length()


def run(
    name: str,
    kernel: Any,
    programs: int | Callable[..., int],
    *arguments: Any,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its first argument.

    Args:
        name: Key of the kernel in TILES.
        kernel: Function with @triton.jit.
        programs: Number of programs, or a function of the tile's constants that returns it. With 0
            programs nothing is launched.
        *arguments: Arguments of the kernel in its order; the first one is a tensor.
        **constants: Constants of the kernel that are not in its tile.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        chosen = tile_for(name)
        sizes = dict(chosen.constants)
        count = programs
        if callable(count):
            count = count(**sizes)
        if count == 0:
            return
        kernel[(count,)](
            *arguments,
            **sizes,
            **constants,
            num_warps=chosen.num_warps,
            enable_fp_fusion=False,
        )


@lru_cache
def table(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Return a constant table, cached on each device.

    nf4/functional.py:prepare makes the tables that a CUDA graph needs.

    Args:
        make: Function that returns the table on the CPU.
        device: Device on which a kernel reads it.

    Returns:
        The table on the device.

    Raises:
        RuntimeError: If the table would have to be made while a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a table is missing on {device} while a CUDA graph is captured: run the model once "
            "before"
        )
    return make().to(device)


def tile_for(name: str) -> Tile:
    """Return the tile of a kernel on the current device.

    Args:
        name: Key of the kernel in TILES.

    Returns:
        The tile for the architecture of the device, or the default one.
    """
    if name in _overridden:
        return _overridden[name]
    tiles = TILES[name]
    return tiles.get(architecture(), tiles["default"])


@contextmanager
def overridden(name: str, chosen: Tile) -> Iterator[None]:
    """Run a kernel with another tile inside a `with` block, for tuning.

    Args:
        name: Key of the kernel in TILES.
        chosen: Tile to use.
    """
    _overridden[name] = chosen
    try:
        yield
    finally:
        del _overridden[name]


def architecture() -> str:
    """Return the architecture of the current device.

    Returns:
        A key of TILES such as "sm_86" or "gfx9"; "interpreter" in Triton's interpreter.
    """
    if interpreted():
        return "interpreter"
    return _architecture(cast(Any, driver.active).get_current_device())


@lru_cache
def _architecture(device: object) -> str:
    """Return the architecture of the current device; `device` is the key of the cache."""
    target = cast(Any, driver.active).get_current_target()
    if target.backend == "cuda":
        return f"sm_{target.arch}"
    return str(target.arch)[:4]


def interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 has this effect if it is set when the kernels are imported.
    """
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    """Do nothing; its type shows whether Triton interprets kernels."""
    pass


@contextmanager
def rounded(out: Tensor) -> Iterator[Tensor]:
    """Yield the tensor to which a kernel writes, so that `out` gets values rounded to nearest.

    On a GPU that is `out`. The interpreter's cast from fp32 to bf16 cuts off instead of rounding.
    There the kernel writes to an fp32 tensor, which torch rounds into `out`.

    Args:
        out: Tensor that receives the result.
    """
    if not (interpreted() and out.dtype == torch.bfloat16):
        yield out
        return
    exact = torch.empty_like(out, dtype=torch.float32)
    yield exact
    out.copy_(exact)


BY_HAND = tl.constexpr(interpreted())


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """Round fp32 to `dtype`, to nearest, in a kernel that continues with the rounded value.

    The interpreter's cast to bf16 cuts off; there the rounding is done on the bits, ties to even.

    Args:
        x: fp32 values of any shape.
        dtype: The dtype of the result.
    """
    if BY_HAND:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = bits & -0x10000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
