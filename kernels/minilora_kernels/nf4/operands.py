"""The checks of the tensors that an op of NF4 takes, before a kernel reads them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE

# packed, scales, nested_absmax, offset, as NF4Weight.parts() gives them
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def check_parts(parts: Parts, shape: Sequence[int], blocksize: int) -> None:
    """Raise ValueError unless the parts are a weight of this shape.

    Args:
        parts: Packed codes, scales, second-level scales and offset, as NF4Weight.parts() gives them.
        shape: Shape of the dense weight.
        blocksize: Number of values that share one scale.
    """
    n = torch.Size(shape).numel()
    blocks = -(-n // blocksize)
    nested = parts[2] is not None
    expected_parts: dict[str, tuple[torch.dtype, int] | None] = {
        "packed": (torch.uint8, (n + 1) // 2),
        "scales": (torch.uint8 if nested else torch.float32, blocks),
        "nested_absmax": None,
        "offset": None,
    }
    if nested:
        nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
        expected_parts["nested_absmax"] = (torch.float32, nested_blocks)
        expected_parts["offset"] = (torch.float32, 1)
    for (name, expected), part in zip(expected_parts.items(), parts, strict=True):
        actual = None
        if part is not None:
            actual = (part.dtype, part.numel())
        if actual != expected:
            raise ValueError(
                f"NF4 weight of shape {tuple(shape)} in blocks of {blocksize}: expected {name} to "
                f"be (dtype, size) {expected}, got {actual}; pass fp32 scales alone, or uint8 "
                "scales with nested_absmax and offset, as NF4Weight.parts() gives them"
            )


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors, each contiguous or None.

    Args:
        tensors: The tensors, in the order of the result.
    """
    result: list[Any] = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.contiguous()
        result.append(tensor)
    return result


def for_a_kernel(packed: Tensor, *others: Tensor | None) -> list[Any]:
    """Return the tensors, each contiguous or None, and check their device and their alignment.

    On a tensor of another device, or at an address that is not aligned, a kernel would fault or
    read wrong values.

    Args:
        packed: The packed codes, uint8; a kernel reads them as 32-bit words.
        others: Further tensors or None, in the order of the result.

    Raises:
        ValueError: If the tensors are on several devices, or one is not aligned.
    """
    tensors = contiguous(packed, *others)
    present = [tensor for tensor in tensors if tensor is not None]
    devices = [str(tensor.device) for tensor in present]
    if len(set(devices)) > 1:
        raise ValueError(f"NF4: expected all tensors on one device, got {devices}; move them")
    for i, tensor in enumerate(present):
        alignment = tensor.element_size()
        if i == 0:
            alignment = 4  # packed is read as 32-bit words
        if tensor.data_ptr() % alignment != 0:
            raise ValueError(
                f"NF4: expected memory that begins at a multiple of {alignment} bytes, got a "
                f"{tensor.dtype} tensor at {tensor.data_ptr():#x}; clone it"
            )
    return tensors
