"""Tests, in Triton's interpreter, of the product of a few tokens with a 4-bit weight.

The kernel multiplies from the codes. Its results are compared with the dense W.
"""

import pytest
import torch
from torch import nn

from helpers.kernel_parts import Guarded, dense, few_fast, normal, parts_of
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import FEW_ON_A_GPU
from minilora_kernels.triton import launch, nf4_matmul
from minilora_kernels.triton.nf4_matmul import MOST

SHAPES = [
    ((5, 32), 2, 32),
    ((70, 96), 16, 64),
    ((33, 1056), 17, 64),
    ((64, 512), 64, 256),
    ((3, 2080), 5, 4096),
]


@pytest.mark.parametrize("sizes, nested, dtype", few_fast(SHAPES, [False, True], [*MOST]))
def test_matmul_of_few_tokens_equals_the_dense_product(sizes, nested, dtype):
    """Compare with the dense W in x's dtype. A one-hot x gives a column of W exactly."""
    shape, tokens, blocksize = sizes
    tokens = min(tokens, MOST[dtype])
    parts, bias = parts_of(normal(*shape), blocksize, nested), normal(shape[0])
    x = normal(tokens, shape[1], dtype=dtype)
    W = dense(parts, blocksize, shape, dtype)
    got = nf4_matmul.matmul(x, *parts, shape, blocksize, bias)
    exact = x.double() @ W.double().T + bias.double()
    terms = x.double().abs() @ W.double().abs().T + bias.double().abs()
    # Each term is rounded in its product (not for 16-bit inputs) and in each addition: those of the
    # inner size and of the bias, in any order and in any number of parts. n roundings by factors of
    # at most 1 + u give a factor of at most 1 + n u / (1 - n u). The sum is rounded once to x's
    # dtype, for a subnormal result by half of the smallest subnormal number.
    n_u = (shape[1] + 1) * 2**-24
    info = torch.finfo(dtype)
    bound = n_u / (1 - n_u) * terms
    bound += info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps / 2
    assert got.dtype == dtype and ((got.double() - exact).abs() <= bound).all()
    columns = torch.arange(tokens) * (shape[1] - 1) // (tokens - 1)
    one = torch.zeros_like(x).scatter_(1, columns[:, None], 1)
    assert torch.equal(nf4_matmul.matmul(one, *parts, shape, blocksize), W[:, columns].T)


@pytest.mark.parametrize("enough", [1, 2**15])
@pytest.mark.parametrize("shape, tokens", [((1, 64), 3), ((65, 1056), 17)])
def test_matmul_of_few_tokens_writes_only_its_result(shape, tokens, enough, monkeypatch):
    """Test sums in one part and in several."""
    monkeypatch.setattr(nf4_matmul, "ENOUGH", enough)
    parts, x = parts_of(normal(*shape), 64, True), normal(tokens, shape[1], dtype=torch.float16)
    with Guarded() as guarded:
        nf4_matmul.matmul(x, *parts, shape, 64)
    guarded.check()


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(
    "tile",
    [
        launch.tile(8, ROWS=128, CHUNKS=4),
        launch.tile(4, ROWS=64, CHUNKS=4),
        launch.tile(2, ROWS=32, CHUNKS=1),
    ],
)
def test_other_tiles_give_the_same_columns(tile, few):
    """Read columns at each position in a word and in a chunk of codes."""
    shape = (70, 352)
    parts = parts_of(normal(*shape), 32, True)
    step = 23 if few else 6  # for 15 tokens or 58
    ones = torch.eye(352, dtype=torch.float16)[5::step].contiguous()
    with launch.overridden("matmul_nf4" if few else "matmul_nf4_many", tile):
        assert torch.equal(
            nf4_matmul.matmul(ones, *parts, shape, 32),
            dense(parts, 32, shape, ones.dtype)[:, 5::step].T,
        )


def test_fits_accepts_supported_dtypes_shapes_and_token_counts():
    assert max(MOST.values()) == FEW_ON_A_GPU
    cpu = torch.device("cpu")
    for dtype, most in MOST.items():
        assert nf4_matmul.fits(dtype, cpu, (576, 1536), most) and nf4_matmul.fits(
            dtype, cpu, (1, 32), 2
        )
        assert not nf4_matmul.fits(dtype, cpu, (576, 1536), most + 1) and not nf4_matmul.fits(
            dtype, cpu, (4, 33), 2
        )
        assert not nf4_matmul.fits(dtype, cpu, (0, 64), 2) and not nf4_matmul.fits(
            dtype, cpu, (2**20, 2**16), 2
        )
        assert not nf4_matmul.fits(dtype, cpu, (576, 1536), 0)
    assert not nf4_matmul.fits(torch.float64, cpu, (576, 1536), 2)


@pytest.mark.parametrize(
    "where, capability, hip, old, fits",
    [
        ("cuda:1", (8, 0), None, False, True),
        ("cuda:1", (12, 0), None, False, True),
        ("cuda:1", (7, 5), None, False, False),
        ("cuda:1", (9, 0), "6.2", False, False),  # AMD: compiled but never counted
        ("cuda:1", (9, 0), None, True, False),
        ("cpu", (9, 0), None, False, False),
    ],
)
def test_fits_accepts_nvidia_gpus_from_capability_8_0(
    where, capability, hip, old, fits, monkeypatch
):
    def of(device: torch.device) -> tuple[int, int]:
        assert device == torch.device("cuda:1")  # x's own device, never a CPU
        return capability

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(nf4_matmul, "OLD", old)
    assert nf4_matmul.fits(torch.bfloat16, torch.device(where), (576, 1536), 16) == fits


def test_a_layer_without_gradients_uses_the_kernel_for_few_tokens(monkeypatch):
    """With one token, with too many tokens, and with gradients, it uses other code."""
    ran = []
    right = nf4_matmul.matmul
    monkeypatch.setattr(nf4_matmul, "matmul", lambda *a: ran.append(len(a[0])) or right(*a))
    layer = NF4Linear.from_linear(nn.Linear(64, 24))
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = normal(2, 4, 64, dtype=dtype)
        with torch.no_grad():
            got = layer(x)
        expected = nn.functional.linear(
            x.double(), layer.dequantize(dtype).double(), layer.bias.double()
        )
        torch.testing.assert_close(got.double(), expected, rtol=2**-9, atol=2**-9)
    assert ran == [8, 8]  # not for fp64
    with torch.no_grad():
        layer(x[:, :1].expand(2, 33, 64)), layer(x[0, 0])
    layer(x)
    assert ran == [8, 8]
