"""Tests of the arithmetic of the machine: results equal exact arithmetic, rounded once."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from minilora_ptx.instructions.arithmetic import TABLE
from minilora_ptx.instructions.conversions import conversion
from minilora_ptx.numbers import fma_f32, from_bf16, to_bf16, to_f16


def floats(count: int, seed: int = 0) -> np.ndarray:
    """Return fp32 values of random bits."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    x = bits.view(np.float32)
    return x[np.isfinite(x)]


def apply(opcode: str, *operands):
    with np.errstate(all="ignore"):
        return TABLE[opcode].function(*operands)


def neighbours(x: np.float32) -> list[np.float32]:
    return [np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))]


def test_fma_is_rounded_once():
    """Compare with exact fractions: no neighbour is nearer, and a tie goes to the even one."""
    rng = np.random.default_rng(1)
    count = 2000
    a, b = (rng.integers(2**23, 2**24, count).astype(np.float32) for _ in range(2))
    # c puts the sum next to a tie of two fp32 numbers, which rounding twice gets wrong
    c = (rng.integers(-(2**10), 2**10, count) * 2.0 ** rng.integers(-30, 30, count)).astype("f4")
    c[::2] = (2.0 ** rng.integers(-40, 23, len(c[::2]))).astype(np.float32)
    for x, y, z, found in zip(a, b, c, fma_f32(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        errors = [abs(Fraction(float(n)) - exact) for n in neighbours(found)]
        assert errors[1] <= min(errors)
        if errors[1] in (errors[0], errors[2]):
            assert found.view(np.uint32) % 2 == 0


def test_fma_where_rounding_twice_is_wrong():
    a, b = np.float32([1 + 2**-12]), np.float32([1 + 2**-12])
    c = np.float32([2.0**-60])  # the product ends in a tie, which c decides
    product = a.astype(np.float64) * b
    twice = (product + c).astype(np.float32)
    assert fma_f32(a, b, c)[0] == np.nextafter(twice, np.float32(2))[0]


def test_bf16_rounds_as_torch_does():
    x = floats(100_000)
    ours = to_bf16(x)
    theirs = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (ours == theirs).all()
    assert to_bf16(np.float32([np.nan]))[0] == 0x7FFF


def test_rounding_fp64_to_bf16_is_one_rounding():
    tie = 1 + 2.0**-8  # between 1 and 1 + 2^-7
    x = np.array([tie, tie + 2.0**-40, tie - 2.0**-40])
    assert from_bf16(to_bf16(x)).tolist() == [1.0, 1 + 2.0**-7, 1.0]


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_half_precision_has_the_bits_of_torch(name):
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**16, (2, 50_000), dtype=np.uint16)
    function = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[name]
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        operands = [x if kind == "bf16" else x.view(np.float16) for x in bits]
        found = apply(f"{name}.rn.{kind}", *operands).view(np.uint16)
        # torch computes in fp32 and rounds again, which is exact enough for two operands
        tensors = [torch.from_numpy(x.view(np.int16)).view(dtype) for x in bits]
        expected = function(*tensors)
        same = torch.from_numpy(found.view(np.int16)).view(dtype)
        number = ~expected.isnan()
        assert torch.equal(same[number], expected[number])
        assert (found[~number.numpy()] == 0x7FFF).all()


def test_minimum_and_maximum_of_nan_and_zero():
    nan = np.float32(np.nan)
    a, b = np.float32([nan, 1, 0, -0.0, nan]), np.float32([2, nan, -0.0, 0, nan])
    high, low = apply("max.f32", a, b), apply("min.f32", a, b)
    assert high[:4].tolist() == [2, 1, 0, 0] and low[:4].tolist() == [2, 1, 0, 0]
    assert not np.signbit(high[2:4]).any() and np.signbit(low[2:4]).all()
    assert high[4:].view(np.uint32)[0] == 0x7FFFFFFF


def test_a_result_that_is_nan_has_the_bits_of_the_manual():
    a = np.uint32([0xFFC00001]).view(np.float32)
    assert apply("add.rn.f32", a, a).view(np.uint32)[0] == 0x7FFFFFFF
    assert apply("sqrt.rn.f32", np.float32([-1])).view(np.uint32)[0] == 0x7FFFFFFF


@pytest.mark.parametrize(
    "opcode, operands, expected",
    [
        ("mul.hi.u32", (np.uint32([0xFFFFFFFF]), np.uint32([0xFFFFFFFF])), 0xFFFFFFFE),
        ("mul.wide.s16", (np.int16([-3]), np.int16([2**15 - 1])), -3 * (2**15 - 1)),
        ("mad.wide.u16", (*2 * [np.uint16([0xFFFF])], np.uint32([1])), 0xFFFE0002),
        ("mul.wide.u16", (np.uint16([0xFFFF]), np.uint16([0xFFFF])), 0xFFFE0001),
        ("mul.wide.s32", (np.int32([-3]), np.int32([2**31 - 1])), -3 * (2**31 - 1)),
        ("div.s32", (np.int32([-7]), np.int32([2])), -3),
        ("rem.s32", (np.int32([-7]), np.int32([2])), -1),
        ("div.u32", (np.uint32([7]), np.uint32([0])), 0xFFFFFFFF),
        ("shl.b32", (np.uint32([1]), np.uint32([32])), 0),
        ("shr.u32", (np.uint32([2**31]), np.uint32([40])), 0),
        ("shr.s32", (np.int32([-8]), np.uint32([40])), -1),
        ("bfe.u32", (np.uint32([0x12345678]), np.uint32([8]), np.uint32([12])), 0x456),
        ("bfe.s32", (np.int32([0x0000F000]), np.uint32([12]), np.uint32([4])), -1),
        ("bfe.u32", (np.uint32([0xFFFFFFFF]), np.uint32([4]), np.uint32([0])), 0),
        ("prmt.b32", tuple(np.uint32([v]) for v in (0x33221100, 0x77665544, 0x7632)), 0x77663322),
        ("prmt.b32", tuple(np.uint32([v]) for v in (0x80, 0, 0x8888)), 0xFFFFFFFF),
        ("popc.b32", (np.uint32([0xF0F0]),), 8),
        ("lop3.b32", tuple(np.uint32([v]) for v in (12, 10, 6, 0x96)), 12 ^ 10 ^ 6),
    ],
)
def test_integer_instructions(opcode, operands, expected):
    assert apply(opcode, *operands)[0] == expected


@pytest.mark.parametrize(
    "opcode, value, expected",
    [
        ("cvt.rzi.s32.f32", np.float32([-2.9]), -2),
        ("cvt.rni.s32.f32", np.float32([2.5]), 2),
        ("cvt.rzi.s32.f32", np.float32([3e9]), 2**31 - 1),
        ("cvt.rzi.u32.f32", np.float32([-1]), 0),
        ("cvt.rzi.s32.f32", np.float32([np.nan]), 0),
        ("cvt.s64.s32", np.int32([-5]), -5),
        ("cvt.u16.u32", np.uint32([0x12345]), 0x2345),
        ("cvt.rn.f32.s32", np.int32([2**24 + 1]), 2.0**24),
        ("cvt.rn.f16.f32", np.float32([65520]), np.inf),
    ],
)
def test_conversions(opcode, value, expected):
    operation = conversion(opcode)
    assert operation
    with np.errstate(all="ignore"):
        assert operation.function(value)[0] == expected


def test_a_packed_conversion_puts_its_first_operand_into_the_upper_half():
    operation = conversion("cvt.rn.f16x2.f32")
    assert operation
    both = operation.function(np.float32([1.5]), np.float32([-2]))
    halves = both.view(np.float16)
    assert halves.tolist() == [-2.0, 1.5]
    assert to_f16(np.float32([1.5]))[0] == 1.5


def test_flush_to_zero_keeps_the_sign():
    tiny = np.float32([-1e-40])
    assert np.signbit(apply("mul.rn.ftz.f32", tiny, np.float32([1])))[0]
    assert apply("mul.rn.ftz.f32", tiny, np.float32([1]))[0] == 0
    assert apply("mul.rn.f32", tiny, np.float32([1]))[0] == tiny[0]
