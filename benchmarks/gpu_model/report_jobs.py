"""The jobs of kernel_report.py and executed.py: launchers of our kernels on tensors of a layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_model.roofline import HALF, WEIGHT, WEIGHT_DOUBLE_QUANT
from minilora_kernels.triton import (
    adamw_8bit,
    cross_entropy,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)
from minilora_kernels.triton.launch import tile_for

BLOCKSIZE = 64
# Bytes of DRAM for one scale: absmax, its 8-bit code, its share of the second level.
SCALES_BYTES = 4 + 1 + 4 / 256
# Bytes of DRAM for one parameter: the parameter read and written, its gradient, two codes and their
# share of the scales read and written.
ADAMW_BYTES = 2 * 4 + 4 + 2 * (2 + 2 * 4 / 256)


@dataclass(frozen=True)
class Job:
    """One of our kernels and the call that compiles it."""

    launch: Callable[[], object]
    # Weights that the launch handles, or scales (double_quantize_nf4), logits, parameters.
    elements: int
    bytes: float  # of DRAM for one element
    # Elements that a program handles in one trip of its loop; 0: no loop. If the assembler unrolls
    # the loop, the figures are too high, never too low.
    trip: Callable[[], int] = int


Make = Callable[..., Tensor]  # sizes, dtype -> tensor


DRAWN = 2**20  # random values; longer tensors repeat them


def drawn(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random values: all codes of an integer dtype, normal values of another."""
    generator = torch.Generator().manual_seed(sum(sizes))
    n = math.prod(sizes)
    first = min(n, DRAWN)
    if dtype.is_floating_point:
        values = torch.randn(first, generator=generator).to(dtype)
    else:
        values = torch.randint(0, 256, (first,), dtype=dtype, generator=generator)
    return values.repeat(math.ceil(n / first))[:n].view(sizes)


def jobs(make: Make = torch.empty) -> dict[str, Job]:
    """Return a job for each of our kernels, by name.

    `make` returns a tensor. kernel_report.py reads no values; executed.py needs those of `drawn`.
    """
    shape, small = (4096, 4096), (1536, 576)
    n = math.prod(shape)
    dense, absmax = make(*shape, dtype=torch.bfloat16), make(n // BLOCKSIZE).abs_()
    p = make(n)
    moments = [make(n // 256, 256, dtype=torch.uint8), make(n // 256).abs_()] * 2

    def dequantize(run: Callable[..., object], double: bool) -> Job:
        bytes = HALF + (WEIGHT_DOUBLE_QUANT if double else WEIGHT)
        return Job(lambda: run(*_parts(n, double, make), BLOCKSIZE, dense), n, bytes)

    def multiply(
        run: Callable[..., object],
        shape: tuple[int, int],
        tile: str,
        weights: int,
        *tokens: int,
        double: bool = True,
    ) -> Job:
        def trip() -> int:
            return weights * math.prod(size for _, size in tile_for(tile).constants)

        n, x = math.prod(shape), make(*tokens, shape[1], dtype=torch.bfloat16)
        bytes = WEIGHT_DOUBLE_QUANT if double else WEIGHT
        return Job(lambda: run(x, *_parts(n, double, make), shape, BLOCKSIZE), n, bytes, trip)

    def head(logits: Tensor, labels: Tensor) -> Job:
        def trip() -> int:
            return tile_for("cross_entropy").constants[0][1]

        start = partial(cross_entropy.cross_entropy, logits, labels, absmax, True, 1.0)
        return Job(start, logits.numel(), 3 * HALF, trip)

    return {
        "dequantize_nf4": dequantize(nf4_dequantize.dequantize, False),
        "dequantize_nf4_textbook": dequantize(nf4_dequantize.dequantize_textbook, False),
        "dequantize_nf4_double_quant": dequantize(nf4_dequantize.dequantize, True),
        "dequantize_nf4_double_quant_textbook": dequantize(
            nf4_dequantize.dequantize_textbook, True
        ),
        "quantize_nf4": Job(lambda: nf4_quantize.quantize(dense, BLOCKSIZE), n, HALF + WEIGHT),
        "quantize_nf4_textbook": Job(
            lambda: nf4_quantize.quantize_textbook(dense, BLOCKSIZE), n, HALF + WEIGHT
        ),
        "double_quantize_nf4": Job(
            lambda: nf4_quantize.double_quantize(absmax), len(absmax), SCALES_BYTES
        ),
        "gemv_nf4": multiply(nf4_gemv.gemv, shape, "gemv_nf4", nf4_gemv.CHUNK, double=False),
        "gemv_nf4_double_quant": multiply(nf4_gemv.gemv, shape, "gemv_nf4", nf4_gemv.CHUNK),
        "gemv_nf4_double_quant_small": multiply(
            nf4_gemv.gemv, small, "gemv_nf4_small", nf4_gemv.CHUNK
        ),
        # The unit of the textbook kernel is a byte: 2 weights.
        "gemv_nf4_double_quant_textbook": multiply(
            nf4_gemv.gemv_textbook, shape, "gemv_nf4_textbook", 2
        ),
        "matmul_nf4": multiply(nf4_matmul.matmul, shape, "matmul_nf4", nf4_gemv.CHUNK, 16),
        "matmul_nf4_64_tokens": multiply(
            nf4_matmul.matmul, shape, "matmul_nf4_many", nf4_gemv.CHUNK, 64
        ),
        "cross_entropy": head(make(512, 2**17, dtype=dense.dtype), make(512, dtype=torch.int64)),
        "adamw_8bit": Job(lambda: adamw_8bit.step(p, p, moments, (0.5,) * 8), n, ADAMW_BYTES),
        **_steps(dense, make),
    }


def _steps(x: Tensor, make: Make) -> dict[str, Job]:
    """Return the jobs of a layer's steps on x (tokens, D) in bf16.

    Each tensor of x's size is read or written once.
    """
    w = x[0]  # (D,)
    r = make(len(x), 1)  # (tokens, 1)
    n = x.numel()
    q = x.view(1, len(x), -1, 128).transpose(1, 2)  # (1, heads, tokens, 128)
    angle = make(1, 1, len(x), 128, dtype=x.dtype)  # (1, 1, tokens, 128)

    def strip() -> int:
        return math.prod(size for _, size in tile_for("rms_norm_weight").constants)

    return {
        "rms_norm": Job(lambda: rms_norm.rms_norm(x, w, 1e-5, False), n, 2 * HALF),
        "rms_norm_backward": Job(
            lambda: rms_norm.rms_norm_backward(x, w, r, x, False), n, 3 * HALF
        ),
        "rms_norm_weight": Job(lambda: rms_norm.rms_norm_weight(x, r, x), n, 2 * HALF, strip),
        "rotate": Job(lambda: rope.rotate(q, angle, angle, 1.0), n, 2 * HALF),
        "gated": Job(lambda: swiglu.gated(x, x, False), n, 3 * HALF),
        "gated_backward": Job(lambda: swiglu.gated_backward(x, x, x, False), n, 5 * HALF),
        "gated_gelu": Job(lambda: swiglu.gated(x, x, True), n, 3 * HALF),
        "gated_gelu_backward": Job(lambda: swiglu.gated_backward(x, x, x, True), n, 5 * HALF),
    }


def _parts(n: int, double: bool, make: Make) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return packed, scales, nested_absmax and offset of n weights.

    The codes of scales are uniform: with real scales, fewer lines of their map are read.
    """
    packed, blocks = make(n // 2, dtype=torch.uint8), n // BLOCKSIZE
    if not double:
        return packed, make(blocks), None, None
    return packed, make(blocks, dtype=torch.uint8), make(math.ceil(blocks / 256)), make(1)
