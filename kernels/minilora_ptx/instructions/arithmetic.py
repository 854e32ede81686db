"""Instructions that compute: one table from opcode to a numpy function.

    TABLE["add.s32"] = Operation(np.add, ("s32", "s32"), "s32")

The function receives an array for each source, with one value a lane, and returns the results. The
kinds state how the bits of a register are read: PTX registers have a size and no type (manual,
section 5.2.2), and the opcode states the type. The comments name sections of the PTX ISA manual,
version 8.7.

Approximate instructions (ex2.approx, div.full and others) are rounded correctly here. A GPU may
differ by the error that the manual states, 2 units in the last place for these two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minilora_ptx.numbers import (
    KINDS,
    Array,
    canonical,
    flush,
    fma_f32,
    from_bf16,
    joined,
    packed,
    sum_to_odd,
    to_bf16,
    to_f16,
)


@dataclass(frozen=True)
class Operation:
    """A function on values.

    Attributes:
        function: Function from the sources to the result.
        sources: Kind of each source.
        result: Kind of the result.
    """

    function: Callable[..., Array]
    sources: tuple[str, ...]
    result: str


TABLE: dict[str, Operation] = {}


def _add(opcode: str, function: Callable[..., Array], sources: str, result: str) -> None:
    """Put an operation into the table; the kinds of its sources are separated by spaces."""
    TABLE[opcode] = Operation(function, tuple(sources.split()), result)


# ---- integers (9.7.1): results wrap around


def _wide(x: Array) -> Array:
    """Return values in 64 bits, with the same sign."""
    return x.astype(np.int64 if x.dtype.kind == "i" else np.uint64)


def _mul_wide(a: Array, b: Array) -> Array:
    """Return all bits of a product."""
    return _wide(a) * _wide(b)


def _mul_hi(a: Array, b: Array) -> Array:
    """Return the upper half of a product of 32-bit values."""
    return (_mul_wide(a, b) >> 32).astype(a.dtype)


def _mad(a: Array, b: Array, c: Array) -> Array:
    """Return the lower half of a product, plus c."""
    return a * b + c


def _mad_wide(a: Array, b: Array, c: Array) -> Array:
    """Return all bits of a product, plus c."""
    return _mul_wide(a, b) + c


def _quotient(a: Array, b: Array) -> Array:
    """Return a / b cut off towards zero; a division by zero gives all bits 1."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    floor = a // divisor
    inexact = floor * divisor != a
    result = np.where(inexact & ((a < 0) != (divisor < 0)), floor + a.dtype.type(1), floor)
    return np.where(b == 0, np.array(-1).astype(a.dtype), result)


def _remainder(a: Array, b: Array) -> Array:
    """Return a - b * (a / b), with the sign of a."""
    return a - b * _quotient(a, b)


def _popc(a: Array) -> Array:
    """Count the bits that are 1."""
    return np.bitwise_count(a).astype(np.uint32)


def _clz(a: Array) -> Array:
    """Count the zero bits above the highest 1, for 32 bits."""
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def _shift_left(a: Array, b: Array) -> Array:
    """Shift left; an amount of the width or more gives 0 (9.7.8.7)."""
    width = a.itemsize * 8
    amount = np.minimum(b, width - 1).astype(a.dtype)
    return np.where(b >= width, a.dtype.type(0), a << amount)


def _shift_right(a: Array, b: Array) -> Array:
    """Shift right; signed values repeat the sign, and large amounts give 0 or -1 (9.7.8.8)."""
    width = a.itemsize * 8
    amount = np.minimum(b, width - 1).astype(a.dtype)
    shifted = a >> amount
    if a.dtype.kind == "i":
        return shifted  # width - 1 leaves only the sign
    return np.where(b >= width, a.dtype.type(0), shifted)


def _field(a: Array, start: Array, length: Array) -> Array:
    """Extract the bits `start` to `start` + `length` (bfe, 9.7.1.19)."""
    width = a.itemsize * 8
    start = np.minimum(start & 255, width)
    length = np.minimum(length & 255, width)
    last = np.minimum(start + length, width)
    up = (width - last).astype(a.dtype)
    kept = _shift_right(a << np.minimum(up, width - 1).astype(a.dtype), width - (last - start))
    return np.where((length == 0) | (start >= width), a.dtype.type(0), kept)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Choose four of the eight bytes of b:a (prmt in its default mode, 9.7.9.7)."""
    eight = joined(a, b)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (eight >> ((choice & 7) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & 255
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        byte = np.where(choice & 8, sign, byte)
        result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
    return result


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Apply a truth table to each bit of three values (9.7.8.6)."""
    result = np.zeros_like(a | b | c)
    for row in range(8):
        wanted = np.where((table >> np.uint32(row)) & 1, ~np.uint32(0), np.uint32(0))
        bit_a = a if row & 4 else ~a
        bit_b = b if row & 2 else ~b
        bit_c = c if row & 1 else ~c
        result = result | (wanted & bit_a & bit_b & bit_c)
    return result


for _bits in ("16", "32", "64"):
    for _sign in "us":
        _kind = _sign + _bits
        for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)):
            _add(f"{_name}.{_kind}", _function, f"{_kind} {_kind}", _kind)
        for _name, _function in (("min", np.minimum), ("max", np.maximum)):
            _add(f"{_name}.{_kind}", _function, f"{_kind} {_kind}", _kind)
        _add(f"div.{_kind}", _quotient, f"{_kind} {_kind}", _kind)
        _add(f"rem.{_kind}", _remainder, f"{_kind} {_kind}", _kind)
        _add(f"mad.lo.{_kind}", _mad, f"{_kind} {_kind} {_kind}", _kind)
        _add(f"shr.{_kind}", _shift_right, f"{_kind} u32", _kind)
        if _bits != "16":
            _add(f"bfe.{_kind}", _field, f"{_kind} u32 u32", _kind)
    _add(f"neg.s{_bits}", np.negative, f"s{_bits}", f"s{_bits}")
    _add(f"abs.s{_bits}", np.abs, f"s{_bits}", f"s{_bits}")
    _add(f"shl.b{_bits}", _shift_left, f"b{_bits} u32", f"b{_bits}")
for _sign in "us":
    _add(f"mul.wide.{_sign}32", _mul_wide, f"{_sign}32 {_sign}32", f"{_sign}64")
    _add(f"mul.wide.{_sign}16", _mul_wide, f"{_sign}16 {_sign}16", f"{_sign}32")
    _add(f"mad.wide.{_sign}16", _mad_wide, f"{_sign}16 {_sign}16 {_sign}32", f"{_sign}32")
    _add(f"mul.hi.{_sign}32", _mul_hi, f"{_sign}32 {_sign}32", f"{_sign}32")
    _add(f"mad.wide.{_sign}32", _mad_wide, f"{_sign}32 {_sign}32 {_sign}64", f"{_sign}64")
_add("popc.b32", _popc, "b32", "u32")
_add("clz.b32", _clz, "b32", "u32")
_add("prmt.b32", _permute, "b32 b32 b32", "b32")
_add("lop3.b32", _lop3, "b32 b32 b32 b32", "b32")

# ---- bits, moves and choices (9.7.8, 9.7.9, 9.7.7)


def _same(a: Array) -> Array:
    """Return the operand."""
    return a


def _choose(a: Array, b: Array, chosen: Array) -> Array:
    """Return a where the predicate is true, else b (selp)."""
    return np.where(chosen, a, b)


for _kind in ("pred", "b16", "b32", "b64"):
    for _name, _function in (
        ("and", np.bitwise_and),
        ("or", np.bitwise_or),
        ("xor", np.bitwise_xor),
    ):
        _add(f"{_name}.{_kind}", _function, f"{_kind} {_kind}", _kind)
    _add(f"not.{_kind}", np.invert, _kind, _kind)
for _kind in KINDS:
    _add(f"mov.{_kind}", _same, _kind, _kind)
    _add(f"selp.{_kind}", _choose, f"{_kind} {_kind} pred", _kind)

# ---- comparisons (9.7.6): the unordered ones, such as neu, are true if an operand is NaN


def _ordered_unequal(a: Array, b: Array) -> Array:
    """Return true where a < b or a > b."""
    return (a < b) | (a > b)


def _either_nan(a: Array, b: Array) -> Array:
    """Return true where an operand is NaN."""
    return (a != a) | (b != b)


def _negated(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the comparison that is true where another one is false."""
    return lambda a, b: ~function(a, b)


_COMPARISONS = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for _kind in ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"):
    for _name, _function in _COMPARISONS.items():
        _add(f"setp.{_name}.{_kind}", _function, f"{_kind} {_kind}", "pred")
    _add(f"setp.ne.{_kind}", np.not_equal, f"{_kind} {_kind}", "pred")
for _kind in ("f32", "f64"):
    _add(f"setp.ne.{_kind}", _ordered_unequal, f"{_kind} {_kind}", "pred")
    _add(f"setp.neu.{_kind}", np.not_equal, f"{_kind} {_kind}", "pred")
    _add(f"setp.equ.{_kind}", _negated(_ordered_unequal), f"{_kind} {_kind}", "pred")
    _add(f"setp.ltu.{_kind}", _negated(np.greater_equal), f"{_kind} {_kind}", "pred")
    _add(f"setp.leu.{_kind}", _negated(np.greater), f"{_kind} {_kind}", "pred")
    _add(f"setp.gtu.{_kind}", _negated(np.less_equal), f"{_kind} {_kind}", "pred")
    _add(f"setp.geu.{_kind}", _negated(np.less), f"{_kind} {_kind}", "pred")
    _add(f"setp.nan.{_kind}", _either_nan, f"{_kind} {_kind}", "pred")
    _add(f"setp.num.{_kind}", _negated(_either_nan), f"{_kind} {_kind}", "pred")

# ---- floats (9.7.3, 9.7.4): every .rn result is rounded once


def _float_sum(a: Array, b: Array) -> Array:
    return canonical(a + b)


def _float_difference(a: Array, b: Array) -> Array:
    return canonical(a - b)


def _float_product(a: Array, b: Array) -> Array:
    return canonical(a * b)


def _float_quotient(a: Array, b: Array) -> Array:
    return canonical(a / b)


def _largest(*values: Array) -> Array:
    """Return the largest number: NaN only if all are NaN, and +0 above -0."""
    result = values[0]
    for x in values[1:]:
        both_zero = (result == 0) & (x == 0)
        zero = (result.view(np.uint32) & x.view(np.uint32)).view(np.float32)
        result = np.where(both_zero, zero, np.fmax(result, x))
    return canonical(result)


def _smallest(*values: Array) -> Array:
    """Return the smallest number: NaN only if all are NaN, and -0 below +0."""
    result = values[0]
    for x in values[1:]:
        both_zero = (result == 0) & (x == 0)
        zero = (result.view(np.uint32) | x.view(np.uint32)).view(np.float32)
        result = np.where(both_zero, zero, np.fmin(result, x))
    return canonical(result)


def _root(a: Array) -> Array:
    return canonical(np.sqrt(a))


def _inverse_root(a: Array) -> Array:
    return canonical((1 / np.sqrt(a.astype(np.float64))).astype(np.float32))


def _inverse(a: Array) -> Array:
    return canonical(np.float32(1) / a)


def _power_of_two(a: Array) -> Array:
    return canonical(np.exp2(a.astype(np.float64)).astype(np.float32))


def _logarithm(a: Array) -> Array:
    return canonical(np.log2(a.astype(np.float64)).astype(np.float32))


def _ftz(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function with subnormal operands and results replaced by zero."""
    return lambda *operands: flush(function(*(flush(x) for x in operands)))


def _absolute(a: Array) -> Array:
    return canonical(np.abs(a))


def _opposite(a: Array) -> Array:
    return canonical(-a)


_FLOAT_FUNCTIONS = {
    "add.rn.f32": (_float_sum, 2),
    "sub.rn.f32": (_float_difference, 2),
    "mul.rn.f32": (_float_product, 2),
    "div.rn.f32": (_float_quotient, 2),
    "fma.rn.f32": (fma_f32, 3),
    "sqrt.rn.f32": (_root, 1),
    "rcp.rn.f32": (_inverse, 1),
    "div.full.f32": (_float_quotient, 2),
    "ex2.approx.f32": (_power_of_two, 1),
    "lg2.approx.f32": (_logarithm, 1),
    "rsqrt.approx.f32": (_inverse_root, 1),
    "sqrt.approx.f32": (_root, 1),
    "rcp.approx.f32": (_inverse, 1),
    "abs.f32": (_absolute, 1),
    "neg.f32": (_opposite, 1),
    "max.f32": (_largest, 2),
    "min.f32": (_smallest, 2),
}
for _name, (_function, _count) in _FLOAT_FUNCTIONS.items():
    _add(_name, _function, " ".join(["f32"] * _count), "f32")
    _flushed = _name.removesuffix(".f32") + ".ftz.f32"
    _add(_flushed, _ftz(_function), " ".join(["f32"] * _count), "f32")
for _name in ("add", "sub", "mul"):
    # without .rn the assembler may fuse a product and a sum; here each rounds
    TABLE[f"{_name}.f32"] = TABLE[f"{_name}.rn.f32"]
    _function, _count = _FLOAT_FUNCTIONS[f"{_name}.rn.f32"]
    _add(f"{_name}.rn.f32x2", packed(_function, "f32"), "f32x2 f32x2", "f32x2")
    _add(f"{_name}.rn.f64", _function, "f64 f64", "f64")
_add("fma.rn.f32x2", packed(fma_f32, "f32"), "f32x2 f32x2 f32x2", "f32x2")
_add("div.rn.f64", _float_quotient, "f64 f64", "f64")

# ---- half precision (9.7.4): computed in fp64, where products are exact, and rounded once


def _half_fma(a: Array, b: Array, c: Array) -> Array:
    return sum_to_odd(a * b, c)


_HALF_FUNCTIONS = {
    "add": (sum_to_odd, 2),
    "sub": (lambda a, b: sum_to_odd(a, -b), 2),
    "mul": (np.multiply, 2),
    "fma": (_half_fma, 3),
}


def _in_f16(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function on fp16 values."""
    return lambda *operands: to_f16(function(*(x.astype(np.float64) for x in operands)))


def _in_bf16(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function on bf16 bits."""

    def rounded(*operands: Array) -> Array:
        return to_bf16(function(*(from_bf16(x).astype(np.float64) for x in operands)))

    return rounded


for _name, (_function, _count) in _HALF_FUNCTIONS.items():
    for _kind, _single in (("f16", _in_f16(_function)), ("bf16", _in_bf16(_function))):
        _add(f"{_name}.rn.{_kind}", _single, " ".join([_kind] * _count), _kind)
        _pairs = " ".join([_kind + "x2"] * _count)
        _add(f"{_name}.rn.{_kind}x2", packed(_single, _kind), _pairs, _kind + "x2")
# Mixed precision (9.7.5, sm_100 and newer): the first operand is widened, the rest is fp32.
for _name, _function in (("add", _float_sum), ("sub", _float_difference)):
    _add(f"{_name}.rn.f32.bf16", lambda a, b, f=_function: f(from_bf16(a), b), "bf16 f32", "f32")
    _add(
        f"{_name}.rn.f32.f16",
        lambda a, b, f=_function: f(a.astype(np.float32), b),
        "f16 f32",
        "f32",
    )
