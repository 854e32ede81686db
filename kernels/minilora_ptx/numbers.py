"""Exact rounding: the number formats of PTX, and sums and products that are rounded once.

Most fp32 operations of numpy round as PTX asks for (.rn: to nearest, ties to even). Two things need
care:

    fma     a b + c with one rounding. In fp64 the product of two fp32 values is exact (48 of 53
            bits), but the sum is rounded, and rounding a second time to fp32 may give a neighbour.
            Rounding the sum *to odd* prevents that: of the two fp64 numbers next to the exact sum,
            take the one whose last bit is 1. It is never a tie of the second rounding, and it is on
            the correct side of each tie.
    bf16    numpy has no bf16. Its bits are the upper half of an fp32, so that rounding is integer
            arithmetic.

A result that is NaN has the bits 0x7fffffff (bf16 and fp16: 0x7fff), as the manual states.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
# Fundamental types of PTX (manual, section 5.2.1). bf16 and packed types are kept as their bits.
KINDS: dict[str, type] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "f32x2": np.uint64,
}  # fmt: skip
NAN = {
    np.dtype(np.float16): np.uint16(0x7FFF).view(np.float16),
    np.dtype(np.float32): np.uint32(0x7FFFFFFF).view(np.float32),
    np.dtype(np.float64): np.uint64(0x7FFFFFFFFFFFFFFF).view(np.float64),
}


def canonical(x: Array) -> Array:
    """Give every NaN the bits that PTX states for a result.

    Args:
        x: Result in fp16, fp32 or fp64.
    """
    bad = x != x
    return np.where(bad, NAN[x.dtype], x) if np.any(bad) else x


def flush(x: Array) -> Array:
    """Replace subnormal fp32 values by zero of the same sign, as .ftz does.

    Args:
        x: Values in fp32.
    """
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x)


def to_odd(total: Array, error: Array) -> Array:
    """Return `total` + `error` rounded to odd.

    Args:
        total: Sum, rounded to nearest.
        error: Exact sum minus `total`.
    """
    bits = total.view(UNSIGNED[total.itemsize])
    even = (bits & 1) == 0
    wrong = (error != 0) & even & np.isfinite(total)
    toward = np.where(error > 0, np.inf, -np.inf).astype(total.dtype)
    return np.where(wrong, np.nextafter(total, toward), total)


def sum_to_odd(a: Array, b: Array) -> Array:
    """Return a + b of fp64 values, rounded to odd.

    The error of the rounded sum is found by Knuth's TwoSum, which is exact without overflow.

    Args:
        a: Values in fp64, below 2^1000.
        b: Values in fp64, below 2^1000.
    """
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return to_odd(total, error)


def to_f32(x: Array) -> Array:
    """Round fp64 to fp32.

    Args:
        x: Values in fp64.
    """
    return canonical(x.astype(np.float32))


def to_f16(x: Array) -> Array:
    """Round fp64 or fp32 to fp16.

    Args:
        x: Values in fp64 or fp32.
    """
    return canonical(x.astype(np.float16))


def to_bf16(x: Array) -> Array:
    """Round fp64 or fp32 to bf16.

    Args:
        x: Values in fp64 or fp32.

    Returns:
        The bits, uint16.
    """
    if x.dtype == np.float64:  # first to fp32, to odd, so that the second rounding is right
        single = x.astype(np.float32)
        x = to_odd(single, x - single)
    bits = x.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), rounded)


def from_bf16(bits: Array) -> Array:
    """Return the fp32 values of bf16 bits.

    Args:
        bits: uint16.
    """
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c in fp32, rounded once.

    Args:
        a: Values in fp32.
        b: Values in fp32.
        c: Values in fp32.
    """
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    return to_f32(sum_to_odd(product, c.astype(np.float64)))


def halves(x: Array) -> tuple[Array, Array]:
    """Return the lower and the upper half of packed bits.

    Args:
        x: uint32 or uint64.
    """
    half = UNSIGNED[x.itemsize // 2]
    return x.astype(half), (x >> x.dtype.type(x.itemsize * 4)).astype(half)


def joined(low: Array, high: Array) -> Array:
    """Return packed bits of two halves.

    Args:
        low: Lower half, uint16 or uint32.
        high: Upper half, of the same type.
    """
    bits = UNSIGNED[low.itemsize * 2]
    shift = np.dtype(bits).type(low.itemsize * 8)
    return low.astype(bits) | (high.astype(bits) << shift)


def packed(function: Callable[..., Array], half: str) -> Callable[..., Array]:
    """Return the function that applies another one to both halves of packed operands.

    Args:
        function: Function on values of one half.
        half: Kind of a half: "f32", "f16" or "bf16".
    """
    kind = KINDS[half]

    def both(*operands: Array) -> Array:
        parts = [halves(x) for x in operands]
        low = function(*(part[0].view(kind) for part in parts))
        high = function(*(part[1].view(kind) for part in parts))
        bits = UNSIGNED[low.itemsize]
        return joined(low.view(bits), high.view(bits))

    return both
