"""Tests of the compiled NF4 code for CPUs.

Dequantisation has the bits of the reference implementation. Products from the codes are summed in
fp32. Without a compiler everything works in torch.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from helpers.tiny import python
from minilora.generation.single_token import matrix_vector
from minilora.quant.nf4_linear import NF4Linear
from minilora_kernels import FEW, NF4Weight, dequantize_nf4, quantize_nf4
from minilora_kernels.c import nf4
from minilora_kernels.nf4 import functional
from minilora_kernels.nf4.reference import dequantize, double_dequantize

compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): dequantisation stays in torch"
)


def expected(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    packed, scales, nested, offset, shape, blocksize = weight.parts()
    if nested is not None and offset is not None:
        scales = double_dequantize(scales, nested, offset)
    out = torch.empty(shape, dtype=dtype)
    dequantize(packed, scales, blocksize, out)
    return out


def weights(blocksize: int = 64, double_quant: bool = True, rows: int = 70) -> NF4Weight:
    """Return weights from 1e-30 to 1e30 with a block of zeros.

    Some products are ties of the rounding to bf16.
    """
    generator = torch.Generator().manual_seed(rows + blocksize)
    x = torch.randn(rows, 4096, generator=generator) * torch.logspace(-30, 30, rows)[:, None]
    x[3] = 0
    return quantize_nf4(x, blocksize, double_quant)


@compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_has_the_bits_of_the_reference(dtype, blocksize, double_quant):
    assert nf4.ready()
    weight = weights(blocksize, double_quant)
    out = torch.full(weight.shape, torch.nan, dtype=dtype)
    assert nf4.dequantize(*weight.parts()[:4], blocksize, out)
    assert torch.equal(out.view(torch.uint8), expected(weight, dtype).view(torch.uint8))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Library with the portable loops, which processors without wide registers use."""
    library = tmp_path_factory.mktemp("plain") / "nf4.so"
    options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC"]  # no -march: no wide registers
    subprocess.run(["cc", *options, "-o", library, *nf4.LIBRARY.sources], check=True)
    return ctypes.CDLL(str(library))


@compiler
def test_dequantize_without_wide_registers_has_the_bits_of_the_reference(plain):
    weight = weights()
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    nf4.call(plain, *weight.parts()[:4], 64, out)
    assert torch.equal(out, expected(weight, torch.bfloat16))


@compiler
def test_dequantize_nf4_runs_the_compiled_code(monkeypatch):
    assert nf4.ready()
    weight, seen, call = weights(), [], nf4.call
    monkeypatch.setattr(nf4, "call", lambda *a: seen.append(a[1].shape) or call(*a))
    assert torch.equal(dequantize_nf4(weight, torch.bfloat16), expected(weight, torch.bfloat16))
    assert seen == [weight.packed.shape]
    monkeypatch.setenv("MINILORA_NF4", "cpu")  # forces torch
    assert torch.equal(dequantize_nf4(weight, torch.bfloat16), expected(weight, torch.bfloat16))
    assert len(seen) == 1


@compiler
@pytest.mark.parametrize("rows,dtype", [(65, torch.float64), (65, torch.float16)])
def test_other_dtypes_are_left_to_torch(rows, dtype):
    assert nf4.ready()
    weight = weights(rows=rows)
    out = torch.zeros(weight.shape, dtype=dtype)
    assert not nf4.dequantize(*weight.parts()[:4], 64, out) and not out.any()
    assert torch.equal(dequantize_nf4(weight, dtype), expected(weight, dtype))


@compiler
def test_an_incomplete_last_block_is_left_to_torch():
    weight = quantize_nf4(torch.randn(7, 9))
    assert not nf4.dequantize(*weight.parts()[:4], 64, torch.zeros(7, 9))
    assert torch.equal(dequantize_nf4(weight, torch.float32), expected(weight, torch.float32))


# ---- products without a dense W


def assert_near(y, x, weight, bias):
    """Compare y with a product in fp64.

    n products and a bias are summed in fp32 in any order, and the oracle rounds scale times level
    to a weight. So the error in fp32 is at most (n + 2) 2^-24 of the sum of magnitudes. bf16 adds
    one rounding of at most 2^-8 of the result.
    """
    W, b = dequantize_nf4(weight, torch.float64), None if bias is None else bias.double()
    exact = F.linear(x.double(), W, b)
    sizes = F.linear(x.double().abs(), W.abs(), None if b is None else b.abs())
    bound = (x.shape[-1] + 2) * 2**-24 * sizes
    if y.dtype == torch.bfloat16:
        bound += 2**-8 * (exact.abs() + bound)
    assert (
        y.dtype == x.dtype
        and y.shape == exact.shape
        and ((y.double() - exact).abs() <= bound).all()
    )


@compiler
@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 70),
    blocks=st.integers(1, 9),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    count=st.integers(1, 11),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
    dtype=st.sampled_from(nf4.DTYPES),
)
@pytest.mark.parametrize("wide", [True, False])
def test_a_product_is_summed_in_fp32(
    plain, wide, out, blocks, blocksize, count, double_quant, with_bias, dtype
):
    """Test all shapes that are multiplied from the codes, with both forms of the loop."""
    assert nf4.ready()
    generator = torch.Generator().manual_seed(out * 100 + blocks)
    W, x = (torch.randn(n, blocks * blocksize, generator=generator) for n in (out, count))
    weight = quantize_nf4(W, blocksize, double_quant)
    bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        if not wide:
            patch.setattr(nf4.LIBRARY, "loaded", lambda wait: plain)
        multiply = nf4.multiplier(*weight.parts())
    assert_near(multiply(x.to(dtype), bias), x.to(dtype), weight, bias)


@pytest.fixture
def products(monkeypatch):
    """List of the shapes of all weights that are multiplied from their codes."""
    seen, multiplier = [], nf4.multiplier
    monkeypatch.setattr(
        nf4, "multiplier", lambda *a, **k: seen.append(tuple(k["shape"])) or multiplier(*a, **k)
    )
    assert nf4.ready()
    return seen


@compiler
@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_few_rows_from_the_codes(dtype, bias, products):
    layer = NF4Linear.from_linear(nn.Linear(192, 40, bias=bias)).to(dtype)
    x = torch.randn(FEW, 2, 192, dtype=dtype).transpose(0, 1)  # not contiguous
    with torch.no_grad():
        for few in (x[0], x[1, :1], x[:, 3], x[:1, :5]):
            assert_near(layer(few), few, layer.weight, layer.bias)
        assert products == [(40, 192)] * 4
        # too many rows, and none
        assert layer(x).shape == (2, FEW, 40) and layer(x[:, :0]).shape == (2, 0, 40)
        layer(x[0].double()), layer(x[0].half())
    layer(x[0])  # gradients are enabled: backward needs the dense W
    assert len(products) == 4


@compiler
def test_reference_ops_and_other_paths_use_the_dense_weight(products, monkeypatch):
    layer, x = NF4Linear.from_linear(nn.Linear(128, 32)), torch.randn(1, 128)
    odd = NF4Linear.from_linear(nn.Linear(96, 32))  # a block of 64 values spans two rows
    with torch.no_grad():
        assert_near(odd(x[:, :96]), x[:, :96], odd.weight, odd.bias)
        with ml.reference_ops():
            plain = layer(x)
        assert products == [(32, 96)] and torch.equal(
            plain, F.linear(x, layer.dequantize(), layer.bias)
        )
        for path in ("cpu", "reference"):
            monkeypatch.setenv(functional.ENVIRONMENT, path)
            assert torch.equal(layer(x), plain)
            with matrix_vector(layer):
                assert torch.equal(layer(x), plain)
    assert len(products) == 1


@compiler
@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_matrix_vector_has_the_bits_of_the_layer(dtype, products):
    """matrix_vector looks up each layer's parts once, also under an adapter and with a bias.

    A wrong width of x raises the usual error.
    """
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32, bias=False)).to(dtype)
    ml.quantize_model(model)
    ml.inject(model, ml.LoRAConfig(target_modules=["1"]))
    nn.init.normal_(model[1].adapters["default"].lora_B)
    x = torch.randn(1, 3, 128, dtype=dtype)
    with torch.no_grad():
        before, many = model(x), model(x.expand(FEW, 3, 128))
        products.clear()
        with matrix_vector(model):
            assert torch.equal(model(x), before) and torch.equal(model(x), before)
            assert products == [(64, 128), (32, 64)]
            assert torch.equal(model(x.expand(FEW, 3, 128)), many)
            with pytest.raises(ValueError, match="expected x of"):
                model(x[..., :64])
        assert "forward" not in vars(model[0])


# ---- without a compiler


@pytest.mark.parametrize("cc", ["nowhere", "false"], ids=["no compiler", "a compiler that fails"])
def test_without_a_compiler_torch_is_used(cc):
    """The torch path runs without a message."""
    code = """
import torch
from minilora_kernels import dequantize_nf4, multiplier, quantize_nf4
from minilora_kernels.c import nf4
weight = quantize_nf4(torch.ones(64, 64, dtype=torch.bfloat16))
print(nf4.ready(), dequantize_nf4(weight).sum().item(), nf4.ready(), multiplier(weight))
"""
    assert python(code, CC=cc).split() == ["False", "4096.0", "False", "None"]
