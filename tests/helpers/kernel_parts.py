"""Shared parts of the tests of the kernels.

The textbook and fast kernel of each operation, weights quantised by the reference, a check for
writes past the end, and the choice of fast cases.
"""

import random
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch.overrides import TorchFunctionMode

from minilora_kernels.nf4 import reference
from minilora_kernels.triton import nf4_dequantize, nf4_gemv, nf4_quantize

QUANTIZE = [nf4_quantize.quantize, nf4_quantize.quantize_textbook]
DEQUANTIZE = [nf4_dequantize.dequantize, nf4_dequantize.dequantize_textbook]
GEMV = [nf4_gemv.gemv, nf4_gemv.gemv_textbook]


def few_fast(*axes: Sequence) -> list:
    """Return every combination of values as a case of parametrize.

    The number of fast cases is the number of values of the longest axis; the others are slow. Each
    value of each axis is in a fast case. A fixed seed chooses the combinations.
    """
    longest = max(len(axis) for axis in axes)
    chosen = random.Random(0)
    columns = []
    for axis in axes:
        column = [number % len(axis) for number in range(longest)]
        chosen.shuffle(column)
        columns.append(column)
    fast = set(zip(*columns, strict=True))
    cases = []
    for numbers in product(*(range(len(axis)) for axis in axes)):
        values = [axis[number] for axis, number in zip(axes, numbers, strict=True)]
        name = "-".join(getattr(value, "__name__", str(value)) for value in values)
        marks = () if numbers in fast else pytest.mark.slow
        cases.append(pytest.param(*values, id=name, marks=marks))
    return cases


def normal(*shape, dtype=torch.float32, scale=0.02):
    return (torch.randn(shape) * scale).to(dtype)


def parts_of(x, blocksize, nested):
    """Return (packed, scales, nested_absmax, offset), computed by the reference."""
    packed, absmax = reference.quantize(x, blocksize)
    return (packed, *reference.double_quantize(absmax)) if nested else (packed, absmax, None, None)


def dense(parts, blocksize, shape, dtype=torch.float32):
    packed, scales, nested, offset = parts
    absmax = scales if nested is None else reference.double_dequantize(scales, nested, offset)
    reference.dequantize(packed, absmax, blocksize, out := torch.empty(shape, dtype=dtype))
    return out


class Guarded(TorchFunctionMode):
    """Context in which torch.empty, empty_like and new_empty allocate 64 marked values more.

    `check` asserts that the marked values have not changed.
    """

    def __init__(self):
        super().__init__()
        self.memory: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, torch.Tensor.new_empty):
            return made
        with torch._C.DisableTorchFunction():
            memory = torch.full((made.numel() + 64,), 77, dtype=made.dtype)
        self.memory.append((memory, made.numel()))
        return memory[: made.numel()].view(made.shape)

    def check(self) -> None:
        assert self.memory and all((memory[n:] == 77).all() for memory, n in self.memory), (
            "written past the end"
        )
