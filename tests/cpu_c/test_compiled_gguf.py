"""Tests of the compiled code for the quantised types of GGUF.

Dequantisation has the bits of the reference. Products from the codes are summed in fp32. Without a
compiler everything works in torch.
"""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from helpers.gguf_blocks import random_blocks, random_weight
from minilora.generation.single_token import matrix_vector
from minilora.quant.gguf_linear import GGUFLinear
from minilora_kernels.c.gguf import call
from minilora_kernels.gguf import FORMATS, GGUFWeight
from minilora_kernels.gguf.functional import FEW, multiplier
from minilora_kernels.gguf.weight import decode_rows, row_order

DTYPES = [torch.float32, torch.bfloat16]

compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): dequantisation stays in torch"
)


def expected(weight: GGUFWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight by the reference, (out, in)."""
    order = row_order(weight.shape[0], weight.heads, weight.device)
    blocks = weight.blocks if order is None else weight.blocks[order]
    return decode_rows(blocks, weight.type_name).to(dtype)


def all_scales(type_name: str, rows: int = 64) -> GGUFWeight:
    """Return a weight in whose blocks every finite fp16 number is a first scale."""
    numbers = np.arange(2**16, dtype=np.uint16)
    finite = numbers[np.isfinite(numbers.view(np.float16))]
    blocks = random_blocks(type_name, len(finite), 1)
    offset = FORMATS[type_name].scale_offsets[0]
    blocks[:, offset : offset + 2] = torch.from_numpy(finite.view(np.uint8).reshape(-1, 2))
    shape = torch.Size((rows, len(finite) // rows * FORMATS[type_name].values))
    return GGUFWeight(blocks.view(rows, -1), shape, torch.float32, type_name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Libraries with the portable loops, which processors without wide registers use."""
    libraries = {}
    for dtype, flags in ((torch.float32, []), (torch.bfloat16, ["-DBF16"])):
        path = tmp_path_factory.mktemp("plain") / "gguf.so"
        options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", *flags]  # no -march
        sources = call.LIBRARIES[dtype].sources
        subprocess.run(["cc", *options, "-o", path, *sources, "-lm"], check=True)
        libraries[dtype] = ctypes.CDLL(str(path))
    return libraries


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_has_the_bits_of_the_reference(name, dtype):
    assert call.ready(dtype)
    weight = all_scales(name)
    out = torch.full(weight.shape, torch.nan, dtype=dtype)
    assert call.dequantize(weight.blocks, name, 0, out)
    assert torch.equal(out.view(torch.uint8), expected(weight, dtype).view(torch.uint8))


@compiler
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K"])
@pytest.mark.parametrize(("rows", "heads"), [(24, 1), (24, 3), (24, 12), (192, 3)])
def test_dequantize_puts_permuted_rows_in_the_models_order(name, rows, heads):
    assert call.ready(torch.bfloat16)
    weight = random_weight(name, rows, 2, heads)
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    assert call.dequantize(weight.blocks, name, heads, out)
    assert torch.equal(out, expected(weight, torch.bfloat16))


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_without_wide_registers_has_the_same_bits(name, dtype, plain, monkeypatch):
    monkeypatch.setattr(call.LIBRARIES[dtype], "loaded", lambda wait=False: plain[dtype])
    weight = random_weight(name, 24, 2, heads=3)
    out = torch.empty(weight.shape, dtype=dtype)
    assert call.dequantize(weight.blocks, name, 3, out)
    assert torch.equal(out, expected(weight, dtype))


@compiler
def test_the_operator_runs_the_compiled_code(monkeypatch):
    assert call.ready(torch.bfloat16)
    weight, seen, dequantize = random_weight("Q5_K"), [], call.dequantize
    monkeypatch.setattr(call, "dequantize", lambda *a: seen.append(a[1]) or dequantize(*a))
    wanted = expected(weight, torch.bfloat16)
    assert torch.equal(weight.dequantize(torch.bfloat16), wanted) and seen == ["Q5_K"]
    monkeypatch.setenv("MINILORA_NF4", "cpu")  # forces torch
    assert torch.equal(weight.dequantize(torch.bfloat16), wanted) and seen == ["Q5_K"]


@compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype):
    weight = random_weight("Q8_0")
    out = torch.zeros(weight.shape, dtype=dtype)
    assert not call.dequantize(weight.blocks, "Q8_0", 0, out) and not out.any()
    assert multiplier(weight, dtype) is None
    assert torch.equal(weight.dequantize(dtype), expected(weight, dtype))


# ---- products without a dense W


def assert_near(y, x, weight, bias):
    """Compare y with a product in fp64.

    n products and a bias are summed in fp32 in any order. So the error in fp32 is at most
    (n + 1) 2^-24 of the sum of magnitudes. bf16 adds one rounding of at most 2^-8 of the result.
    """
    W = expected(weight, torch.float32).double()
    b = None if bias is None else bias.double()
    exact = F.linear(x.double(), W, b)
    sizes = F.linear(x.double().abs(), W.abs(), None if b is None else b.abs())
    bound = (x.shape[-1] + 1) * 2**-24 * sizes
    if y.dtype == torch.bfloat16:
        bound += 2**-8 * (exact.abs() + bound)
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@compiler
@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    heads=st.sampled_from([0, 1, 3]),
    rows=st.sampled_from([6, 66, 300]),
    blocks=st.integers(1, 9),
    count=st.integers(1, FEW),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("wide", [True, False])
def test_a_product_is_summed_in_fp32(
    plain, wide, name, heads, rows, blocks, count, with_bias, dtype
):
    assert call.ready(dtype)
    weight = random_weight(name, rows, blocks, heads, seed=rows)
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        if not wide:
            patch.setattr(call.LIBRARIES[dtype], "loaded", lambda wait: plain[dtype])
        multiply = multiplier(weight, dtype)
        assert multiply is not None
        assert_near(multiply(x, bias), x, weight, bias)


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_multiplies_few_rows_from_the_codes(dtype, monkeypatch):
    assert call.ready(dtype)
    seen, function = [], call.multiplier
    monkeypatch.setattr(call, "multiplier", lambda *a: seen.append(tuple(a[1])) or function(*a))
    layer = GGUFLinear(random_weight("Q4_1", 40, 6, heads=5), torch.ones(40)).to(dtype)
    x = torch.randn(FEW, 2, 192, dtype=dtype).transpose(0, 1)  # not contiguous
    with torch.no_grad():
        for few in (x[0], x[1, :1], x[:, 3], x[:1, :5]):
            assert_near(layer(few), few, layer.weight, layer.bias)
        assert seen == [(40, 192)] * 4
        # too many rows, and none
        assert layer(x).shape == (2, FEW, 40) and layer(x[:, :0]).shape == (2, 0, 40)
        with ml.reference_ops():
            dense = layer(x[0])
        assert torch.equal(dense, F.linear(x[0], layer.dequantize(dtype), layer.bias))
        assert len(seen) == 4
        monkeypatch.setenv("MINILORA_NF4", "cpu")
        assert torch.equal(layer(x[0]), dense) and len(seen) == 4
    layer(x[0])  # gradients are enabled: backward needs the dense W
    assert len(seen) == 4


@compiler
def test_generation_uses_a_product_that_is_looked_up_once(monkeypatch):
    layer = GGUFLinear(random_weight("Q4_K", 40, 2), torch.ones(40))
    x = torch.randn(1, 1, 512)
    with torch.no_grad():
        wanted = layer(x)
        with matrix_vector(layer):
            assert "forward" in vars(layer) and torch.equal(layer(x), wanted)
            many = torch.randn(FEW + 1, 512)
            assert torch.equal(layer(many), F.linear(many, layer.dequantize(), layer.bias))
            assert layer(x.half()).dtype == torch.float16
    assert "forward" not in vars(layer)


def test_operator_refuses_sizes_that_do_not_fit():
    weight = random_weight("Q4_0")
    gemv = torch.ops.minilora.gemv_gguf
    with pytest.raises(ValueError, match=r"expected x of \(…, 32\)"):
        gemv(torch.ones(1, 31), *weight.parts(), None)
    with pytest.raises(ValueError, match=r"a bias of \(12,\)"):
        gemv(torch.ones(1, 32), *weight.parts(), torch.ones(3))
    torch.library.opcheck(gemv, (torch.ones(2, 32), *weight.parts(), None))
