"""Proves that quantising equals bitsandbytes bit for bit, and the fast path the reference.

It also proves a bound on the error. All comparisons are exact. Results are compared with
bitsandbytes on the CPU only where it is right: codes and absmax always (its quantiser is plain
torch), dequantised values only where rows are whole blocks (otherwise its AVX-512 code takes wrong
scales) and blocks are smaller than 2048 (from there on it compiles). The 8-bit scale codes may
differ by one (its table is coarse).
"""

import math

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora_kernels import dequantize_nf4, dynamic_map, nf4_codebook, nf4_thresholds, quantize_nf4
from minilora_kernels.nf4 import reference, torch_cpu
from minilora_kernels.nf4.codebook import midpoints

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def restored(
    path, packed: torch.Tensor, absmax: torch.Tensor, x: torch.Tensor, blocksize: int
) -> torch.Tensor:
    path.dequantize(packed, absmax, blocksize, out := torch.empty(x.shape, dtype=x.dtype))
    return out


# ---- oracle: bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_codes_scales_and_values_are_bitsandbytes(dtype, blocksize):
    x = normal(24, 4096, dtype=dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    weight = quantize_nf4(x, blocksize, double_quant=False)
    assert torch.equal(weight.packed, packed.view(-1))
    assert torch.equal(weight.absmax, state.absmax)
    if blocksize < 2048:
        assert torch.equal(dequantize_nf4(weight), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (63,), (65,), (129,), (7, 13), (33, 31), (3, 5, 7), (64, 48), (1, 4097)]
)
def test_any_size_is_bitsandbytes(shape, dtype):
    x = normal(*shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    weight = quantize_nf4(x, 64, double_quant=False)
    assert torch.equal(weight.packed, packed.view(-1))
    assert torch.equal(weight.absmax, state.absmax)


@pytest.mark.parametrize("shape", [(64, 32), (64, 16), (128, 96), (256, 304), (1000,)], ids=str)
def test_values_are_right_where_bitsandbytes_returns_others(shape):
    """Compare with the definition, applied to bitsandbytes' codes and scales.

    Where a block crosses rows, bitsandbytes' AVX-512 code takes the scale of another block (an
    error of 0.18 to 0.25 instead of 0.1). It returns a vector as a matrix of one row.
    """
    x = normal(*shape)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    codes = (
        torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).flatten()[: x.numel()].long()
    )
    expected = state.code[codes] * state.absmax.repeat_interleave(64)[: x.numel()]
    found = dequantize_nf4(quantize_nf4(x, 64, double_quant=False))
    assert torch.equal(found, expected.view(shape))
    assert (found - x).norm() < 0.11 * x.norm()
    # only the shape is asserted: the scales are wrong on AVX-512 alone
    assert len(shape) > 1 or bnb.dequantize_4bit(packed, state).shape == (1, *shape)


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_ties_and_their_neighbours(ulps):
    """Check each threshold and one ulp on each side; a 1.0 in each block makes scaling exact."""
    t = nf4_thresholds()
    x = t if ulps == 0 else torch.nextafter(t, torch.full_like(t, ulps * torch.inf))
    block = torch.cat([torch.ones(1), x, -torch.ones(1), torch.zeros(47)])  # (64,)
    # a tie takes the lower code
    expected = [15, *(code + (ulps > 0) for code in range(15)), 0, *[7] * 47]
    for path in (reference, torch_cpu):
        packed, absmax = path.quantize(block, 64)
        assert reference.unpack(packed).tolist() == expected and absmax.tolist() == [1.0], (
            path.__name__
        )
    assert torch.equal(packed, bnb.quantize_4bit(block, blocksize=64, quant_type="nf4")[0].view(-1))


def test_the_first_element_is_in_the_high_nibble():
    assert quantize_nf4(torch.tensor([1.0, -1.0, 0.5]), double_quant=False).packed.tolist() == [
        0xF0,
        0xC7,
    ]


def test_every_value_of_bf16_in_a_block_is_bitsandbytes():
    """Compare all 2^15 finite bf16 values of magnitude 2^-100 to 2^100, in bit order and shuffled.

    In bit order each block has a scale close to its values.
    """
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = bits[
        bits.isfinite() & (bits.abs().float() > 2.0**-100) & (bits.abs().float() < 2.0**100)
    ].contiguous()
    x = x[: len(x) // 64 * 64]
    for order in (
        torch.arange(len(x)),
        torch.randperm(len(x), generator=torch.Generator().manual_seed(1)),
    ):
        packed, state = bnb.quantize_4bit(x[order], blocksize=64, quant_type="nf4")
        weight = quantize_nf4(x[order], double_quant=False)
        assert torch.equal(weight.packed, packed.view(-1)) and torch.equal(
            weight.absmax, state.absmax
        )


# ---- oracle: double quantisation


def numpy_double_quantize(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Double-quantise in numpy's fp32, with an exact mean (math.fsum) and a search of the table."""
    offset = np.float32(math.fsum(absmax.tolist()) / len(absmax))
    d, bounds = absmax - offset, midpoints(dynamic_map()).numpy()
    nested = np.array([np.abs(d[i : i + 256]).max() for i in range(0, len(d), 256)], np.float32)
    inverse = np.divide(np.float32(1), nested, out=np.zeros_like(nested), where=nested > 0)
    return (
        np.searchsorted(bounds, d * np.repeat(inverse, 256)[: len(d)], side="left"),
        nested,
        offset,
    )


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 1000, 5120])
def test_double_quantisation_follows_its_rule(blocks):
    absmax = normal(blocks).abs() + 0.05
    codes, nested, offset = reference.double_quantize(absmax)
    expected = numpy_double_quantize(absmax.numpy())
    assert offset.item() == expected[2] and nested.tolist() == expected[1].tolist()
    assert codes.tolist() == expected[0].tolist()
    decoded = dynamic_map()[codes.int()] * nested.repeat_interleave(256)[:blocks] + offset
    assert all(map(torch.equal, torch_cpu.double_quantize(absmax), (codes, nested, offset)))
    assert torch.equal(reference.double_dequantize(codes, nested, offset), decoded)
    assert torch.equal(torch_cpu.double_dequantize(codes, nested, offset), decoded)


def test_equal_scales_have_the_code_of_zero():
    """With d = 0 everywhere, a2 is 0, and 1/a2 must not produce NaN."""
    weight = quantize_nf4(torch.ones(640))
    assert weight.scales.tolist() == [127] * 10 and weight.absmax.tolist() == [1.0] * 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_scales_are_bitsandbytes_give_or_take_a_code(dtype):
    """Allow one code of difference, since bitsandbytes' table is coarse.

    The table has 65,536 entries over [-1, 1]. It is off by at most half a step, so by one code
    where codes are wider than a step. Near 0, codes are finer than the table; there the value
    differs by less than two steps. Its mean is torch's in fp32, within an ulp or two of ours, and d
    moves by as much.
    """
    x = normal(512, 1024, dtype=dtype)
    weight = quantize_nf4(x)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(weight.packed, packed.view(-1))
    ulp = torch.finfo(torch.float32).eps * state.offset.abs()
    assert (weight.offset - state.offset).abs() <= 2 * ulp
    assert ((weight.nested_absmax - state.state2.absmax).abs() <= 4 * ulp).all()
    ours, theirs = weight.scales.int(), state.absmax.int()
    near_zero = (dynamic_map()[ours] - dynamic_map()[theirs]).abs() < 2 * 2 / 65535
    assert (((ours - theirs).abs() <= 1) | near_zero).all()
    assert (ours != theirs).float().mean() < 0.02


def test_the_offset_is_the_same_for_any_number_of_threads():
    absmax = torch.rand(10**7, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        means = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            means.append(reference.stable_mean(absmax).item())
    finally:
        torch.set_num_threads(threads)
    exact = math.fsum(absmax.tolist()) / len(absmax)
    assert means == [torch.tensor(exact, dtype=torch.float64).float().item()] * 3


# ---- property: fast path = reference, for any input


@st.composite
def tensors(draw) -> torch.Tensor:
    """Draw a tensor of any rank up to 3, with any dtype, stride and scale.

    Sizes may be odd or zero. Some tensors hold zeros or values on thresholds.
    """
    shape = draw(st.lists(st.integers(0, 40), max_size=2)) + draw(
        st.lists(st.integers(0, 300), max_size=1)
    )
    x = normal(*shape, seed=draw(st.integers(0, 2**16)))
    x = x * draw(st.sampled_from([1.0, 1e-30, 1e-37, 1e30, 50.0]))
    kind = draw(st.sampled_from(["normal", "zeros", "thresholds", "sparse"]))
    if kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "thresholds" and x.numel() > 16:
        x.view(-1)[: x.numel() // 16 * 16] = torch.cat([nf4_thresholds(), torch.ones(1)]).repeat(
            x.numel() // 16
        )
    elif kind == "sparse":
        x = x * (x > 0.03)
    x = x.to(draw(st.sampled_from([*DTYPES, torch.float64]))).nan_to_num()  # fp16 cannot hold 1e30
    stride = draw(st.sampled_from(["plain", "transposed", "every other", "expanded"]))
    if stride == "transposed":
        return x.mT if x.ndim > 1 else x
    if stride == "every other":
        return x[..., ::2] if x.ndim else x
    return x[:1].expand(3, *x.shape[1:]) if stride == "expanded" and x.ndim and len(x) else x


@given(tensors(), st.sampled_from(BLOCKSIZES))
def test_cpu_is_the_reference(x, blocksize):
    packed, absmax = reference.quantize(x, blocksize)
    fast = torch_cpu.quantize(x, blocksize)
    assert torch.equal(fast[0], packed) and torch.equal(fast[1], absmax)
    for dtype in (*DTYPES, torch.float64):
        expected = restored(reference, packed, absmax, x.to(dtype), blocksize)
        assert torch.equal(restored(torch_cpu, packed, absmax, x.to(dtype), blocksize), expected)
    assert expected.shape == x.shape


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_cpu_is_the_reference_over_many_chunks(blocksize):
    x = normal(3, torch_cpu.CHUNK // 2 + 4097)  # one and a half chunks and a tail
    packed, absmax = reference.quantize(x, blocksize)
    fast = torch_cpu.quantize(x, blocksize)
    assert torch.equal(fast[0], packed) and torch.equal(fast[1], absmax)
    assert torch.equal(
        restored(torch_cpu, *fast, x, blocksize), restored(reference, packed, absmax, x, blocksize)
    )


@given(tensors(), st.sampled_from(BLOCKSIZES))
def test_quantising_again_changes_nothing(x, blocksize):
    """In fp32 each block keeps its absmax as level +-1, and levels * absmax round to themselves."""
    x = x.float().clamp(-1e37, 1e37)
    once = quantize_nf4(x, blocksize, double_quant=False)
    twice = quantize_nf4(dequantize_nf4(once), blocksize, double_quant=False)
    tiny = once.absmax < 2.0**-126  # such a block becomes zeros, and its absmax becomes 0
    assert torch.equal(once.packed, twice.packed)
    assert torch.equal(once.absmax.masked_fill(tiny, 0), twice.absmax)


@given(tensors(), st.sampled_from(BLOCKSIZES))
def test_the_error_is_at_most_half_the_widest_gap(x, blocksize):
    """|x - x'| <= absmax * (widest gap between levels) / 2, plus two fp32 roundings; per block."""
    x = x.float().clamp(-1e37, 1e37)
    weight = quantize_nf4(x, blocksize, double_quant=False)
    bound = (
        weight.absmax * (nf4_codebook().diff().max() / 2 + 4 * torch.finfo(torch.float32).eps)
        + 2.0**-126
    )
    error = (x - dequantize_nf4(weight)).abs().reshape(-1)
    assert (error <= bound.repeat_interleave(blocksize)[: len(error)]).all()


@given(st.lists(st.integers(0, 15), max_size=60).filter(lambda codes: len(codes) % 2 == 0))
def test_packing_is_undone_by_unpacking(codes):
    packed = reference.pack(torch.tensor(codes, dtype=torch.uint8))
    assert reference.unpack(packed).tolist() == codes
    assert packed.tolist() == [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]


@pytest.mark.parametrize("path", [reference, torch_cpu])
@pytest.mark.parametrize("absmax", [0.0, 2.0**-149, 2.0**-127, 2.0**-126])
def test_blocks_of_subnormal_values_are_zeros(path, absmax):
    packed, scales = path.quantize(torch.tensor([absmax, -absmax] * 32), 64)
    assert packed.tolist() == [0xF0 if absmax == 2.0**-126 else 0x77] * 32
    assert scales.tolist() == [absmax]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (5, 0, 3)])
def test_no_dimension_and_no_elements(shape, double_quant, dtype):
    weight = quantize_nf4(torch.full(shape, -0.5, dtype=dtype), double_quant=double_quant)
    assert torch.equal(dequantize_nf4(weight), torch.full(shape, -0.5, dtype=dtype))


# ---- errors


@pytest.mark.parametrize("path", [reference, torch_cpu])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("index", [(0, 0), (3, 17), (299, 1001)])
def test_a_value_that_is_not_finite_is_named_with_its_index(path, bad, index):
    x = normal(300, 1002)  # more than one chunk, and a last block that is short
    x[index] = x[299, 1001] = bad
    with pytest.raises(ValueError, match=rf"got {bad} at index \({index[0]}, {index[1]}\)"):
        path.quantize(x, 64)


def test_a_value_too_large_for_fp32_is_named_with_its_index():
    with pytest.raises(ValueError, match=r"finite in fp32, got 1e\+300 at index \(1,\)"):
        quantize_nf4(torch.tensor([1.0, 1e300], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got nan at index \(\)"):
        quantize_nf4(torch.tensor(torch.nan))


@pytest.mark.parametrize("blocksize", [0, 16, 48, 8192, -64, 64.0, "64"])
def test_a_wrong_blocksize_raises(blocksize):
    with pytest.raises(ValueError, match="blocksize"):
        quantize_nf4(torch.ones(64), blocksize)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_a_wrong_dtype_raises(dtype):
    with pytest.raises(ValueError, match="expected a dtype of"):
        quantize_nf4(torch.ones(64).to(dtype))
