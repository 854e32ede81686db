"""A search for the fastest tile of each kernel on this GPU.

    tune(torch.device("cuda"), clock, rounds=21, grid=tiles(lanes=32))

`python benchmarks/gpu_kernels/kernel_bench.py --tune` prints an entry for launch.TILES.

Each tile must first pass kernel_check.py. Then all tiles of a kernel, the present one included, are
timed in turns on one large layer (the small GEMV on a layer of SmolLM2). A tile that is wrong or
does not fit on the GPU is left out, and the reason is printed. A tile that is hardly faster than
the present one is not proposed.
"""

import math
import statistics
from textwrap import shorten
from typing import Any

import torch
from triton.errors import TritonError
from triton.runtime import driver

from benchmarks._lib.bench_timing import Call, Clock, measure
from benchmarks.gpu_kernels.check_parts import Mismatch
from benchmarks.gpu_kernels.kernel_check import CHECKS
from benchmarks.gpu_kernels.kernel_jobs import (
    BLOCKSIZE,
    DEQUANTISE,
    GEMV,
    OURS,
    QUANTISE,
    jobs,
    quantize_twice,
)
from minilora.training.optim.adamw_8bit import zero_moments
from minilora_kernels.triton import (
    adamw_8bit,
    cross_entropy,
    launch,
    nf4_matmul,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)
from minilora_kernels.triton.launch import Tile, tile

MARGIN = 1.03  # a gain below 3 % may be noise
LARGE, SMALL = (14336, 4096), (1536, 576)  # layers to tune on


def tiles(lanes: int) -> dict[str, list[Tile]]:
    """Return the tiles to try for each kernel, for warps of this many lanes.

    Constants are powers of two, as Triton's arange requires. Dequantising: one word a lane.
    Quantisers and head: 4 to 32 values a lane, AdamW 4 to 16. GEMV: one chunk of each row a lane;
    the small GEMV: one chunk of one row. Steps of a layer: 4 to 32 values a lane.
    """
    warps = (1, 2, 4, 8)
    wide = [
        tile(w, VALUES=n)
        for n in (512, 1024, 2048, 4096, 8192)
        for w in warps
        if 4 <= n // (w * lanes) <= 32
    ]
    return {
        "dequantize_nf4": [tile(max(1, n // lanes), WORDS=n) for n in (32, 64, 128, 256)],
        "quantize_nf4": wide,
        "double_quantize_nf4": [
            tile(w, ROWS=n)
            for n in (1, 2, 4, 8)
            for w in warps
            if 4 <= n * 256 // (w * lanes) <= 32
        ],
        "gemv_nf4": [
            tile(max(1, n // lanes), ROWS=r, CHUNKS=n)
            for r in (1, 2, 4)
            for n in (32, 64, 128, 256)
        ],
        "gemv_nf4_small": [
            tile(max(1, r * n // lanes), ROWS=r, CHUNKS=n) for r in (8, 16, 32) for n in (1, 2, 4)
        ],
        "matmul_nf4": [
            tile(w, ROWS=16 * w * r, CHUNKS=n) for w in (4, 8) for r in (1, 2) for n in (2, 4)
        ],
        "matmul_nf4_many": [
            tile(w, ROWS=16 * w * r, CHUNKS=n) for w in (2, 4, 8) for r in (1, 2) for n in (1, 2, 4)
        ],
        "cross_entropy": [
            tile(w, WIDTH=n)
            for n in (1024, 2048, 4096, 8192)
            for w in warps
            if 4 <= n // (w * lanes) <= 32
        ],
        "adamw_8bit": [
            tile(w, ROWS=n)
            for n in (1, 2, 4, 8)
            for w in warps
            if 4 <= n * 256 // (w * lanes) <= 16
        ],
        **dict.fromkeys(
            ("rms_norm", "rms_norm_backward", "rotate", "gated", "gated_backward"), wide
        ),
        "rms_norm_weight": [
            tile(w, ROWS=r, COLUMNS=n)
            for r in (4, 8, 16, 32)
            for n in (64, 128, 256)
            for w in (2, 4, 8)
            if 4 <= r * n // (w * lanes) <= 32
        ],
    }


def tune(
    device: torch.device, clock: Clock, rounds: int, grid: dict[str, list[Tile]] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each kernel: median microseconds of its tiles, the fastest tile first."""
    architecture = launch.architecture()
    if not grid:
        gpu: Any = driver.active
        grid = tiles(gpu.get_current_target().warp_size)
    calls = calls_of(device, clock)
    found: list[dict[str, Any]] = []
    for name, candidates in grid.items():
        present = launch.tile_for(name)
        timed: dict[str, Call] = {}
        for chosen in dict.fromkeys((present, *candidates)):
            try:
                with launch.overridden(name, chosen):
                    CHECKS[name](name, device)
                timed[written(chosen)] = with_tile(name, chosen, calls[name])
            except (Mismatch, TritonError) as error:
                print(f"{name} {written(chosen)} LEFT OUT: {shorten(str(error), 150)}")
        times = measure(clock, timed, rounds)
        medians = {text: statistics.median(values) for text, values in times.items()}
        us = dict(sorted(medians.items(), key=lambda item: item[1]))
        best = next(iter(us))
        now = us.get(written(present), math.inf)
        before = f"now {written(present)}, {now:.2f} us"
        if us[best] > now / MARGIN:
            print(
                f"{name:20} no tile is {MARGIN - 1:.0%} faster; {before}, {best} {us[best]:.2f} us"
            )
        else:
            print(f'{name:20} "{architecture}": {best},  # {us[best]:.2f} us; {before}')
        found.append(
            {"kernel": name, "architecture": architecture, "now": written(present), "us": us}
        )
    return found


def calls_of(device: torch.device, clock: Clock) -> dict[str, Call]:
    """Return a call for each kernel."""
    large = {job.name: job.calls[OURS] for job in jobs(LARGE, device, clock, ())}
    small = {job.name: job.calls[OURS] for job in jobs(SMALL, device, clock, ())}
    scales = [
        torch.rand(LARGE[0] * LARGE[1] // BLOCKSIZE, device=device) for _ in range(clock.turns)
    ]
    offset = scales[0].mean(0, keepdim=True)  # passed in, so that only the kernel is timed
    p = [torch.randn(LARGE[0] * LARGE[1], device=device) for _ in range(2)]
    moments = [zero_moments(values, True) for values in p]
    logits = [values.bfloat16().view(LARGE[0] // 32, -1) for values in p]
    labels = torch.zeros(len(logits[0]), dtype=torch.int64, device=device)
    x = [values.bfloat16().view(LARGE) for values in p]  # (tokens, LARGE[1])
    w = x[0][0].clone()  # (LARGE[1],)
    r = torch.ones(LARGE[0], 1, device=device)
    angle = torch.ones_like(x[0][:, :64])[None, None]  # (1, 1, tokens, 64)
    few = x[0][:16]  # (16, LARGE[1])
    weights = [quantize_twice(values) for values in x]
    q = [values.view(1, LARGE[0], -1, 64).transpose(1, 2) for values in x]  # (1, heads, tokens, 64)
    return {
        "dequantize_nf4": large[DEQUANTISE],
        "quantize_nf4": large[QUANTISE],
        "double_quantize_nf4": lambda turn: nf4_quantize.double_quantize(
            scales[turn % len(scales)], offset
        ),
        "gemv_nf4": large[GEMV],
        "gemv_nf4_small": small[GEMV],
        "matmul_nf4": lambda turn: nf4_matmul.matmul(few, *weights[turn % 2], LARGE, BLOCKSIZE),
        "matmul_nf4_many": lambda turn: nf4_matmul.matmul(
            x[0][:64], *weights[turn % 2], LARGE, BLOCKSIZE
        ),
        "cross_entropy": lambda turn: cross_entropy.cross_entropy(
            logits[turn % 2], labels, scales[0], True, 1.0
        ),
        "adamw_8bit": lambda turn: adamw_8bit.step(
            p[turn % 2], p[turn % 2 - 1], moments[turn % 2], (0.5,) * 8
        ),
        "rms_norm": lambda turn: rms_norm.rms_norm(x[turn % 2], w, 1e-5, False),
        "rms_norm_backward": lambda turn: rms_norm.rms_norm_backward(
            x[turn % 2], w, r, x[turn % 2 - 1], False
        ),
        "rms_norm_weight": lambda turn: rms_norm.rms_norm_weight(x[turn % 2], r, x[turn % 2 - 1]),
        "rotate": lambda turn: rope.rotate(q[turn % 2], angle, angle, 1.0),
        "gated": lambda turn: swiglu.gated(x[turn % 2], x[turn % 2 - 1], False),
        "gated_backward": lambda turn: swiglu.gated_backward(
            x[turn % 2], x[turn % 2 - 1], x[turn % 2], False
        ),
    }


def with_tile(name: str, chosen: Tile, call: Call) -> Call:
    """Return `call` with this tile for the kernel `name`."""

    def tiled(turn: int) -> object:
        with launch.overridden(name, chosen):
            return call(turn)

    return tiled


def written(chosen: Tile) -> str:
    """Return a tile in the notation of launch.TILES."""
    constants = ", ".join(f"{name}={size}" for name, size in chosen.constants)
    return f"tile({chosen.num_warps}, {constants})"
