"""Proves that the compiled dequantisation gives the reference's bits, and that nothing depends on a compiler."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from minilora_kernels import NF4Weight, dequantize_nf4, native, quantize_nf4
from minilora_kernels.reference import dequantize, double_dequantize
from tiny import python

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc): dequantisation stays in torch")


def expected(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    packed, scales, nested, offset, shape, blocksize = weight.parts()
    if nested is not None and offset is not None:
        scales = double_dequantize(scales, nested, offset)
    out = torch.empty(shape, dtype=dtype)
    dequantize(packed, scales, blocksize, out)
    return out


def weights(blocksize: int = 64, double_quant: bool = True, rows: int = 70) -> NF4Weight:
    """Values of every size, ties of the rounding to bf16 among their products, a block of zeros."""
    generator = torch.Generator().manual_seed(rows + blocksize)
    x = torch.randn(rows, 4096, generator=generator) * torch.logspace(-30, 30, rows)[:, None]
    x[3] = 0
    return quantize_nf4(x, blocksize, double_quant)


@compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_references_bits(dtype, blocksize, double_quant):
    assert native.ready()
    weight = weights(blocksize, double_quant)
    out = torch.full(weight.shape, torch.nan, dtype=dtype)
    assert native.dequantize(*weight.parts()[:4], blocksize, out)
    assert torch.equal(out.view(torch.uint8), expected(weight, dtype).view(torch.uint8))


@compiler
def test_the_references_bits_without_wide_registers(tmp_path):
    """The plain loop, which other processors get."""
    (tmp_path / "nf4.c").write_text(native.SOURCE)
    subprocess.run(
        ["cc", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", "nf4.so", "nf4.c"], cwd=tmp_path, check=True
    )
    weight = weights()
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    native.call(ctypes.CDLL(str(tmp_path / "nf4.so")), *weight.parts()[:4], 64, out)
    assert torch.equal(out, expected(weight, torch.bfloat16))


@compiler
def test_the_public_function_runs_it(monkeypatch):
    assert native.ready()
    weight, seen, call = weights(), [], native.call
    monkeypatch.setattr(native, "call", lambda *a: seen.append(a[1].shape) or call(*a))
    assert torch.equal(dequantize_nf4(weight, torch.bfloat16), expected(weight, torch.bfloat16))
    assert seen == [weight.packed.shape]
    monkeypatch.setenv("MINILORA_NF4", "cpu")  # which insists on torch
    assert torch.equal(dequantize_nf4(weight, torch.bfloat16), expected(weight, torch.bfloat16))
    assert len(seen) == 1


@compiler
@pytest.mark.parametrize("rows,dtype", [(65, torch.float64), (65, torch.float16)])
def test_what_it_leaves_to_torch(rows, dtype):
    assert native.ready()
    weight = weights(rows=rows)
    out = torch.zeros(weight.shape, dtype=dtype)
    assert not native.dequantize(*weight.parts()[:4], 64, out) and not out.any()
    assert torch.equal(dequantize_nf4(weight, dtype), expected(weight, dtype))


@compiler
def test_a_last_block_that_is_not_whole_is_torchs():
    weight = quantize_nf4(torch.randn(7, 9))
    assert not native.dequantize(*weight.parts()[:4], 64, torch.zeros(7, 9))
    assert torch.equal(dequantize_nf4(weight, torch.float32), expected(weight, torch.float32))


@pytest.mark.parametrize("cc", ["nowhere", "false"], ids=["no compiler", "a compiler that fails"])
def test_without_a_compiler(cc):
    """The torch path goes on, and says nothing."""
    code = """
import torch
from minilora_kernels import dequantize_nf4, native, quantize_nf4
weight = quantize_nf4(torch.ones(64, 64, dtype=torch.bfloat16))
print(native.ready(), dequantize_nf4(weight).sum().item(), native.ready())
"""
    assert python(code, CC=cc).split() == ["False", "4096.0", "False"]
