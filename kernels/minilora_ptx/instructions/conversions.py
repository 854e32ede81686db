"""Conversions between types: cvt (PTX ISA manual, section 9.7.9.21)."""

from collections.abc import Callable

import numpy as np

from minilora_ptx.instructions.arithmetic import Operation
from minilora_ptx.numbers import KINDS, Array, canonical, from_bf16, joined, to_bf16, to_f16

ROUNDINGS = {"rn", "rni", "rzi", "rmi", "rpi"}
INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}


def conversion(opcode: str) -> Operation | None:
    """Return the operation of a cvt opcode, or None if it is not known.

    Args:
        opcode: Opcode such as "cvt.rn.bf16.f32": the kind of the result, then of the source.
    """
    _, *modifiers, to, source = opcode.split(".")
    if not set(modifiers) <= ROUNDINGS:
        return None
    function = _function(to, source, modifiers)
    if function is None:
        return None
    sources = (source, source) if to.endswith("x2") else (source,)
    return Operation(function, sources, to)


def _function(to: str, source: str, modifiers: list[str]) -> Callable[..., Array] | None:
    """Return the numpy function of a conversion."""
    if to in INTEGERS and source in INTEGERS:
        return lambda x: x.astype(KINDS[to])  # cuts off, or repeats the sign
    if to in ("bf16x2", "f16x2") and source == "f32":
        narrow = _to_bits(to.removesuffix("x2"))
        return lambda high, low: joined(narrow(low), narrow(high))
    if to in INTEGERS and source in ("f32", "f64", "f16", "bf16"):
        return _to_integer(to, source, modifiers)
    if source in INTEGERS and to in ("f32", "f64"):
        return lambda x: x.astype(KINDS[to])
    if source in INTEGERS and to in ("f16", "bf16"):
        narrow = to_f16 if to == "f16" else to_bf16
        return lambda x: narrow(x.astype(np.float64))
    if source == "bf16":
        return from_bf16 if to == "f32" else None
    if to == "bf16":
        return to_bf16 if source == "f32" else None
    if {to, source} <= {"f16", "f32", "f64"}:
        return lambda x: canonical(x.astype(KINDS[to]))
    return None


def _to_bits(kind: str) -> Callable[[Array], Array]:
    """Return the function from fp32 to the bits of a 16-bit kind."""
    if kind == "bf16":
        return to_bf16
    return lambda x: to_f16(x).view(np.uint16)


def _to_integer(to: str, source: str, modifiers: list[str]) -> Callable[[Array], Array] | None:
    """Return the conversion to an integer, which saturates; NaN gives 0."""
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    known = [rounding[name] for name in modifiers if name in rounding]
    if not known:
        return None
    limits = np.iinfo(KINDS[to])

    def convert(x: Array) -> Array:
        wide = from_bf16(x) if source == "bf16" else x
        whole = known[0](wide.astype(np.float64))
        low = whole <= float(limits.min)
        high = whole >= float(limits.max)
        inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(KINDS[to])
        result = np.where(high, KINDS[to](limits.max), inside)
        return np.where(low, KINDS[to](limits.min), result)

    return convert
