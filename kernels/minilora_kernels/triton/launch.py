"""How every kernel is started: which tile on which card, on the tensor's own device, with exact arithmetic.

A kernel's tile says how much one program does: its constants (powers of two, which Triton's arange asks for) and its
warps. The table below was chosen by counting the machine code that each entry compiles to; `python
benchmarks/gpu_model/kernel_report.py` prints the counts, and `python benchmarks/gpu_kernels/kernel_bench.py --tune`
measures on a GPU and prints a better entry where it finds one. Nothing here has been timed on a GPU yet.

Every launch passes enable_fp_fusion=False: fused into one multiply-add, the second level's `map[code] * a2 + offset`
would be rounded once instead of twice and differ from bitsandbytes in the last bit.
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


@dataclass(frozen=True)
class Tile:
    """What one program does: the kernel's constants, and the warps that do it."""

    constants: tuple[tuple[str, int], ...]
    num_warps: int


def tile(num_warps: int, **constants: int) -> Tile:
    """Tile(...), with the constants as keywords."""
    return Tile(tuple(constants.items()), num_warps)


# kernel -> architecture -> tile. "gfx9" are AMD's CDNA cards: 64 lanes a warp instead of 32, so half the warps.
TILES: dict[str, dict[str, Tile]] = {
    "dequantize_nf4": {
        # one word a thread is one 128-bit store; 4 words in flight hide the memory's latency in 40 registers
        "default": tile(4, WORDS=128),
        "gfx9": tile(2, WORDS=128),
    },
    "dequantize_nf4_textbook": {"default": tile(4, BYTES=512)},  # 4 bytes a thread: a 32-bit load, a 128-bit store
    "quantize_nf4": {
        # 16 values a thread share one division; 32 would need 56 registers, and fill sm_80 and sm_90 to 56 %
        "default": tile(4, VALUES=2048),
        "gfx9": tile(2, VALUES=2048),
    },
    "quantize_nf4_textbook": {"default": tile(4, VALUES=1024)},
    "double_quantize_nf4": {"default": tile(4, ROWS=4)},  # 8 values a thread: their 8 look-ups run side by side
    "gemv_nf4": {
        # all lanes along a row, so that x arrives where it is used; two rows share each value of x
        "default": tile(2, ROWS=2, CHUNKS=64),
        "gfx9": tile(1, ROWS=2, CHUNKS=64),
    },
    "gemv_nf4_small": {
        # 2 lanes a row: none idle, and no barrier in one warp
        "default": tile(1, ROWS=16, CHUNKS=2),
        "gfx9": tile(1, ROWS=32, CHUNKS=2),
    },
    "gemv_nf4_textbook": {"default": tile(4, BYTES=512)},
    "matmul_nf4": {
        # a warp has 16 rows, the tensor cores' least, and a thread one chunk of one row
        "default": tile(4, ROWS=64, CHUNKS=2),
        "gfx9": tile(2, ROWS=64, CHUNKS=2),
    },
    "cross_entropy": {
        # 8 logits a thread, one 128-bit load; more would take registers that other rows need
        "default": tile(8, WIDTH=2048),
        "gfx9": tile(4, WIDTH=2048),
    },
    "adamw_8bit": {
        # 8 values a thread share the look-up tables' filling and two divisions; 4 would take 11 instructions more each
        "default": tile(4, ROWS=4),
        "gfx9": tile(2, ROWS=4),
    },
    # what is read and written once: 8 or 16 values of bf16 a thread, in accesses of 128 bits
    "rms_norm": {"default": tile(8, VALUES=4096), "gfx9": tile(4, VALUES=4096)},
    "rms_norm_backward": {"default": tile(8, VALUES=4096), "gfx9": tile(4, VALUES=4096)},
    "rms_norm_weight": {"default": tile(4, ROWS=16, COLUMNS=128), "gfx9": tile(2, ROWS=16, COLUMNS=128)},
    "rotate": {"default": tile(4, VALUES=1024), "gfx9": tile(2, VALUES=1024)},
    "gated": {"default": tile(4, VALUES=1024), "gfx9": tile(2, VALUES=1024)},
    "gated_backward": {"default": tile(4, VALUES=1024), "gfx9": tile(2, VALUES=1024)},
}


def run(name: str, kernel: Any, programs: int | Callable[..., int], *arguments: Any, **constants: Any) -> None:
    """Launch `kernel` with the tile of `name` on the device of its first argument, a tensor.

    programs: how many, or how many it takes with the tile's constants.
    """
    with torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else nullcontext():
        chosen = tile_for(name)
        sizes = dict(chosen.constants)
        count = programs(**sizes) if callable(programs) else programs
        if count:
            kernel[(count,)](*arguments, **sizes, **constants, num_warps=chosen.num_warps, enable_fp_fusion=False)


@lru_cache
def table(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """make(), a constant table, once on each device; dispatch.prepare makes those that a CUDA graph will need."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a table is missing on {device} while a CUDA graph is captured: run the model once before")
    return make().to(device)


def tile_for(name: str) -> Tile:
    """The tile of a kernel on the current device."""
    if name in _overridden:
        return _overridden[name]
    return TILES[name].get(architecture(), TILES[name]["default"])


_overridden: dict[str, Tile] = {}


@contextmanager
def overridden(name: str, chosen: Tile) -> Iterator[None]:
    """Inside, the kernel runs with this tile: for tuning."""
    _overridden[name] = chosen
    try:
        yield
    finally:
        del _overridden[name]


def architecture() -> str:
    """The current device's: "sm_86", "gfx9" ..., a key of TILES; "interpreter" in Triton's."""
    return "interpreter" if interpreted() else _architecture(cast(Any, driver.active).get_current_device())


@lru_cache
def _architecture(device: object) -> str:
    """Of the current device, which `device` names, as Triton's driver has it."""
    target = cast(Any, driver.active).get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)[:4]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported), on CPU tensors."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


@contextmanager
def rounded(out: Tensor) -> Iterator[Tensor]:
    """What a kernel should write to so that `out` gets its values rounded to nearest.

    That is `out`, but in the interpreter: its cast from fp32 to bf16 cuts off instead of rounding, so there the
    kernel writes fp32 and torch rounds.
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
    """fp32 -> `dtype`, to nearest, in a kernel that goes on with the rounded value; the interpreter's cast cuts off."""
    if BY_HAND:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # ties to even
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
