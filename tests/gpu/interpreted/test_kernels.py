"""Tests, in Triton's interpreter, of the NF4 kernels: they have the bits of reference.py.

Each kernel has a textbook version and a fast version. tests/gpu/test_interpreter.py runs this file
and the ordinary NF4 tests in a separate process with TRITON_INTERPRET=1, on the pinned Triton and,
in `make test-all`, on others. The interpreter does not show machine code:
tests/bench/test_kernel_report.py compiles the kernels and counts their instructions.
"""

import pytest
import torch

from helpers.kernel_parts import (
    DEQUANTIZE,
    GEMV,
    QUANTIZE,
    Guarded,
    dense,
    few_fast,
    normal,
    parts_of,
)
from minilora_kernels import dynamic_map, nf4_thresholds
from minilora_kernels.nf4 import reference
from minilora_kernels.nf4.codebook import midpoints
from minilora_kernels.nf4.weight import BLOCKSIZES
from minilora_kernels.triton import (
    adamw_8bit,
    cross_entropy,
    launch,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Some sizes have no complete word of codes, others end in an incomplete word, block or program.
SIZES = [
    0,
    1,
    2,
    7,
    8,
    9,
    63,
    64,
    65,
    1003 * 8,
    4096 * 3 + 5,
]


def test_these_tests_run_in_the_interpreter():
    assert launch.interpreted(), (
        "run through tests/gpu/test_interpreter.py, or with TRITON_INTERPRET=1"
    )


# ---- oracle: the reference


@pytest.mark.parametrize("blocksize, dtype, quantize", few_fast(BLOCKSIZES, DTYPES, QUANTIZE))
def test_quantize_has_the_bits_of_the_reference(blocksize, dtype, quantize):
    for n in SIZES:
        x = normal(n, dtype=dtype)
        x[: n // 3] = 0  # whole blocks of zeros, and blocks that begin with them
        for got, expected in zip(
            quantize(x, blocksize), reference.quantize(x, blocksize), strict=True
        ):
            assert torch.equal(got, expected), n


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_quantize_of_ties_and_their_neighbours(quantize):
    """Test each threshold, one ulp below and one above, with both signs.

    The reciprocals of some scales are exact, those of others are not.
    """
    t = nf4_thresholds()
    up = torch.full_like(t, torch.inf)
    near = torch.cat([t, torch.nextafter(t, up), torch.nextafter(t, -up)])  # (45,)
    for scale in (1.0, 0.75, 3.1e-5, 1.7e38, 2.0**-126):
        # (91,): blocks of 64 and 27 values
        x = torch.cat([torch.tensor([scale]), near * scale, -near * scale])
        for got, expected in zip(quantize(x, 64), reference.quantize(x, 64), strict=True):
            assert torch.equal(got, expected), scale


def test_quantize_at_every_bin_edge():
    """Test both sides of every edge of the fast kernel's 32 bins."""
    edges = torch.arange(-15.5, 16) / 15.5  # (32,)
    steps = [edges, *(torch.nextafter(edges, torch.full_like(edges, s)) for s in (-2.0, 2.0))]
    x = torch.cat([torch.ones(1), *steps]).clamp(-1, 1)
    assert torch.equal(nf4_quantize.quantize(x, 128)[0], reference.quantize(x, 128)[0])
    bins = nf4_quantize._bin_table()[:32]
    # 15 bins have a threshold, so no threshold is missing
    assert (bins != torch.tensor(torch.inf).view(torch.int32)).sum() == 15


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_quantize_gives_zeros_for_a_block_below_the_smallest_normal(quantize):
    for tiny in (2.0**-126, 2.0**-127, 1e-44, 0.0):
        x = torch.full((64,), -tiny)
        for got, expected in zip(quantize(x, 64), reference.quantize(x, 64), strict=True):
            assert torch.equal(got, expected), tiny


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_reaches_absmax(bad, quantize):
    x = normal(200)
    x[70] = bad
    assert torch.isfinite(quantize(x, 64)[1]).tolist() == [True, False, True, True]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 4 * 256 * 3 + 9])
def test_double_quantize_has_the_bits_of_the_reference(count):
    for absmax in (normal(count).abs(), torch.full((count,), 0.3), torch.zeros(count)):
        got, expected = nf4_quantize.double_quantize(absmax), reference.double_quantize(absmax)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_double_quantize_of_ties():
    """Test every midpoint of the 8-bit map, with its negative, so that the mean is exactly 0."""
    half = torch.cat([torch.ones(1), midpoints(dynamic_map())])  # (256,)
    got, expected = (
        double(torch.cat([half, -half]))
        for double in (nf4_quantize.double_quantize, reference.double_quantize)
    )
    assert got[2].item() == 0 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "blocksize, dtype, nested, dequantize", few_fast(BLOCKSIZES, DTYPES, [False, True], DEQUANTIZE)
)
def test_dequantize_has_the_bits_of_the_reference(blocksize, dtype, nested, dequantize):
    for n in SIZES:
        parts = parts_of(normal(n), blocksize, nested)
        memory = torch.full((n + 64,), 7.0, dtype=dtype)
        dequantize(*parts, blocksize, memory[:n])
        assert torch.equal(memory[:n], dense(parts, blocksize, (n,), dtype)), n
        assert (memory[n:] == 7).all(), "written past the end"


# ---- no writes past the end: results are slices of larger memory with marked values


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("n", [1, 9, 64, 65, 2048, 4096 + 200])
def test_quantize_writes_only_its_results(n, quantize):
    with Guarded() as guarded:
        _, absmax = quantize(normal(n), 64)
        nf4_quantize.double_quantize(absmax)
    guarded.check()


@pytest.mark.parametrize("gemv", GEMV)
@pytest.mark.parametrize("shape", [(1, 64), (3, 2048), (17, 576)])
def test_gemv_writes_only_its_result(shape, gemv):
    parts, x = parts_of(normal(*shape), 64, True), normal(shape[1])
    with Guarded() as guarded:
        gemv(x, *parts, shape, 64)
    guarded.check()


# ---- one token


# Short and long rows, and sizes that are no multiple of a tile in either dimension.
SHAPES = [
    (5, 64),
    (33, 576),
    (3, 1056),
    (7, 2048),
    (2, 4128),
]


@pytest.mark.parametrize("shape, nested, gemv", few_fast(SHAPES, [False, True], GEMV))
def test_gemv_of_a_one_hot_x_gives_a_column(shape, nested, gemv):
    """The result is exact, because every other product is zero."""
    parts = parts_of(normal(*shape), 64, nested)
    W = dense(parts, 64, shape)
    for k in (0, 31, 32, shape[1] - 1):
        x = torch.zeros(shape[1])
        x[k] = 1
        assert torch.equal(gemv(x, *parts, shape, 64), W[:, k])


@pytest.mark.parametrize("blocksize, dtype, gemv", few_fast([32, 64, 256, 4096], DTYPES[:3], GEMV))
def test_gemv_of_a_token_is_within_its_error_bound(blocksize, dtype, gemv):
    for shape in SHAPES:
        parts, x, bias = (
            parts_of(normal(*shape), blocksize, True),
            normal(shape[1], dtype=dtype, scale=1),
            normal(shape[0]),
        )
        W = dense(parts, blocksize, shape, torch.float64)
        exact = W @ x.double() + bias.double()
        got = gemv(x, *parts, shape, blocksize, bias)
        assert got.dtype == dtype and got.shape == shape[:1]
        # The error of a sum of n products in any order is at most n eps sum |w x|. The sum is
        # rounded once to x's dtype.
        sizes = W.abs() @ x.double().abs() + bias.double().abs()
        bound = (shape[1] + 1) * 2**-24 * sizes + torch.finfo(dtype).eps * exact.abs()
        assert ((got.double() - exact).abs() <= bound).all(), shape


def test_gemv_fits_accepts_supported_shapes():
    assert nf4_gemv.fits((576, 1536)) and nf4_gemv.fits((1, 32))
    assert (
        not nf4_gemv.fits((4, 33))
        and not nf4_gemv.fits((0, 64))
        and not nf4_gemv.fits((2**20, 2**16))
    )


# ---- launches


@pytest.mark.parametrize("words, warps", [(32, 1), (64, 2), (256, 8)])
def test_other_tiles_have_the_same_bits(words, warps):
    parts = parts_of(normal(20001), 32, True)
    out = torch.empty(20001)
    with launch.overridden("dequantize_nf4", launch.tile(warps, WORDS=words)):
        nf4_dequantize.dequantize(*parts, 32, out)
    assert torch.equal(out, dense(parts, 32, (20001,)))


def test_every_kernel_has_a_tile():
    for name, tiles in launch.TILES.items():
        assert "default" in tiles, name
        for tile in tiles.values():
            assert all(size & (size - 1) == 0 for _, size in tile.constants), name


def test_a_launch_never_fuses_multiply_and_add(monkeypatch):
    options = []
    for module, name in [
        (nf4_dequantize, "_dequantize_fast"),
        (nf4_dequantize, "_dequantize_textbook"),
        (nf4_quantize, "_quantize_fast"),
        (nf4_quantize, "_quantize_textbook"),
        (nf4_quantize, "_double_quantize"),
        (nf4_gemv, "_gemv_fast"),
        (nf4_gemv, "_gemv_small"),
        (nf4_gemv, "_gemv_textbook"),
        (adamw_8bit, "_adamw_8bit"),
        (cross_entropy, "_cross_entropy"),
        (rms_norm, "_rms_norm"),
        (rms_norm, "_rms_norm_backward"),
        (rms_norm, "_rms_norm_weight"),
        (rope, "_rotate"),
        (swiglu, "_gated"),
        (swiglu, "_gated_backward"),
        (nf4_matmul, "_matmul"),
    ]:
        monkeypatch.setattr(
            module, name, {(1,): lambda *a, **k: options.append(k["enable_fp_fusion"])}
        )
    parts, x = parts_of(normal(1, 64), 64, True), normal(64)
    for quantize in QUANTIZE:
        quantize(x, 64)
    nf4_quantize.double_quantize(x[:1])
    for dequantize in DEQUANTIZE:
        dequantize(*parts, 64, torch.empty(64))
    for gemv in GEMV:
        gemv(x, *parts, (1, 64), 64)
    adamw_8bit.step(x, x, [parts[0].expand(8, -1).reshape(1, 256), x[:1]] * 2, (0.5,) * 8)
    cross_entropy.cross_entropy(x[None], torch.zeros(1, dtype=torch.int64), x[:1], True, 1.0)
    x = x[None]
    rms_norm.rms_norm_backward(x, x[0], rms_norm.rms_norm(x, x[0], 1e-5, False)[1], x, False)
    rms_norm.rms_norm_weight(x, x[:, :1], x)
    rope.rotate(x[None, None], x[None, None], x[None, None], 1.0)
    swiglu.gated(x, x, False)
    swiglu.gated_backward(x, x, x, False)
    nf4_matmul.matmul(x.half().expand(2, -1).contiguous(), *parts, (1, 64), 64)
    assert options == [False] * 16
