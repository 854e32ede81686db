"""NF4Weight: a quantised tensor in memory, and its file format, which is that of bitsandbytes.

All stored tensors are uint8; the fp32 scales are stored as the bytes of their values. `.half()`,
`.to(dtype)`, autocast and sharding with mixed precision cast every fp32 tensor that they meet, and
would silently destroy an fp32 scale. The scales are viewed as fp32 where they are used. With n
values, K = ceil(n / blocksize) and J = ceil(K / 256):

                   single quantisation        double quantisation      bits a value (blocksize 64)
    packed         ceil(n/2) bytes            ceil(n/2) bytes          4
    absmax_bytes   4 K: fp32 absmax           K: one 8-bit code each   0.5    or  0.125
    nested_bytes   None                       4 J: fp32 second level   -      or  0.00195
    offset_bytes   None                       4: fp32 mean of absmax   -      or  32/n

In a state dict a weight with the name "w" has the keys and bytes of bitsandbytes, so that either
library reads the files of the other:

    w                                    uint8 (ceil(n/2), 1); files may view it as bf16, fp16, fp32
    w.absmax, w.quant_map                fp32 (K,) or uint8 (K,) codes; fp32 (16,)
    w.nested_absmax, w.nested_quant_map  fp32 (J,), fp32 (256,): double quantisation only
    w.quant_state.bitsandbytes__nf4      JSON text as uint8: blocksize, dtype, shape, nested_offset
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from minilora_kernels.nf4.codebook import dynamic_map, nf4_codebook
from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE, double_dequantize
from minilora_kernels.nf4.state_dict import (
    DTYPES,
    JSON_KEY,
    NESTED_FIELDS,
    check_keys,
    check_table,
    entries_of,
    finite_floats,
    read_info,
)
from minilora_kernels.quantized_weight import QuantizedWeight

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight(QuantizedWeight):
    """A tensor of logical `shape` and `dtype`, stored in 4 bits a value.

    `quantize_nf4` makes it, and `dequantize_nf4` reads it.

    Attributes:
        packed: Codes, two in a byte, uint8 of shape (ceil(n / 2),).
        absmax_bytes: Bytes of the fp32 absmax, uint8 of shape (4 K,); or, with double quantisation,
            one 8-bit code for each block, uint8 of shape (K,).
        shape: Shape of the tensor that was quantised, and of the dequantised one.
        dtype: Dtype of the tensor that was quantised.
        blocksize: Number of values that share one scale.
        nested_bytes: Bytes of the fp32 second-level absmax, uint8 of shape (4 J,). None without
            double quantisation.
        offset_bytes: Bytes of the fp32 mean of absmax, uint8 of shape (4,). None without double
            quantisation.

    Raises:
        ValueError: If the dtype, the size or the layout of a tensor does not fit the others.
    """

    kind: ClassVar[str] = "nf4"

    packed: Tensor
    absmax_bytes: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    nested_bytes: Tensor | None = None
    offset_bytes: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        check_format(self.dtype, self.blocksize)
        if self.double_quant != (self.offset_bytes is not None):
            raise ValueError(
                "NF4Weight: expected nested_bytes and offset_bytes both or neither, got one; pass "
                "both"
            )
        for name, size in self._expected_sizes().items():
            part = getattr(self, name)
            if part.dtype != torch.uint8 or part.shape != (size,) or not part.is_contiguous():
                raise ValueError(
                    f"NF4Weight of shape {tuple(self.shape)}, blocksize {self.blocksize}: expected "
                    f"{name} to be contiguous uint8 of shape ({size},), got {part.dtype} of shape "
                    f"{tuple(part.shape)}; view fp32 scales with .view(torch.uint8)"
                )

    def _expected_sizes(self) -> dict[str, int]:
        """Return the number of bytes that each stored tensor must have."""
        blocks = -(-self.numel // self.blocksize)
        packed_size = -(-self.numel // 2)
        if not self.double_quant:
            return {"packed": packed_size, "absmax_bytes": 4 * blocks}
        return {
            "packed": packed_size,
            "absmax_bytes": blocks,
            "nested_bytes": 4 * -(-blocks // NESTED_BLOCKSIZE),
            "offset_bytes": 4,
        }

    @classmethod
    def from_parts(
        cls,
        packed: Tensor,
        scales: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: torch.Size | tuple[int, ...],
        blocksize: int,
        dtype: torch.dtype,
    ) -> "NF4Weight":
        """Build a weight from tensors in their own dtypes.

        The order is that of the arguments of `torch.ops.minilora.dequantize_nf4`.

        Args:
            packed: Packed codes, uint8 of shape (ceil(n / 2),).
            scales: The absmax, fp32 of shape (K,); or, with double quantisation, their codes, uint8
                of shape (K,).
            nested_absmax: Second-level absmax, fp32 of shape (J,), or None.
            offset: Mean of absmax, fp32 of shape (1,), or None.
            shape: Logical shape of the weight.
            blocksize: Number of values that share one scale.
            dtype: Logical dtype of the weight.

        Returns:
            A weight that shares the memory of the tensors.

        Raises:
            ValueError: If the tensors do not fit together.
        """
        return cls(
            packed=packed,
            absmax_bytes=scales.view(torch.uint8),
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=blocksize,
            nested_bytes=None if nested_absmax is None else nested_absmax.view(torch.uint8),
            offset_bytes=None if offset is None else offset.view(torch.uint8),
        )

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.Size, int]:
        """Return (packed, scales, nested_absmax, offset, shape, blocksize).

        These are the arguments of the dequantise ops before the dtype.
        """
        return (
            self.packed,
            self.scales,
            self.nested_absmax,
            self.offset,
            self.shape,
            self.blocksize,
        )

    @property
    def double_quant(self) -> bool:
        """True if the scales are quantised too."""
        return self.nested_bytes is not None

    @property
    def scales(self) -> Tensor:
        """First-level scales as stored: fp32 absmax (K,), or uint8 codes (K,)."""
        if self.double_quant:
            return self.absmax_bytes
        return self.absmax_bytes.view(torch.float32)

    @property
    def nested_absmax(self) -> Tensor | None:
        """Second-level scales, an fp32 view (J,); None without double quantisation."""
        if self.nested_bytes is None:
            return None
        return self.nested_bytes.view(torch.float32)

    @property
    def offset(self) -> Tensor | None:
        """Mean of absmax, an fp32 view (1,); None without double quantisation."""
        if self.offset_bytes is None:
            return None
        return self.offset_bytes.view(torch.float32)

    @property
    def absmax(self) -> Tensor:
        """Scale of each block, fp32 (K,), decoded if it is stored in 8 bits."""
        nested_absmax = self.nested_absmax
        offset = self.offset
        if nested_absmax is None or offset is None:
            return self.scales
        return double_dequantize(self.scales, nested_absmax, offset)

    @property
    def numel(self) -> int:
        """Number of values n."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes stored: codes, and scales of both levels."""
        stored = self._stored().values()
        return sum(tensor.nbytes for tensor in stored)

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return self.packed.device

    def to(self, device: torch.device | str | int) -> "NF4Weight":
        """Return the same weight on another device.

        Args:
            device: Device to move the stored tensors to.

        Returns:
            A new weight; this one does not change.
        """
        target = torch.device(device)
        moved = {name: tensor.to(target) for name, tensor in self._stored().items()}
        return replace(self, **moved)

    def _stored(self) -> dict[str, Tensor]:
        """Return the stored tensors by name, without those that are None."""
        stored = {"packed": self.packed, "absmax_bytes": self.absmax_bytes}
        if self.nested_bytes is not None:
            stored["nested_bytes"] = self.nested_bytes
        if self.offset_bytes is not None:
            stored["offset_bytes"] = self.offset_bytes
        return stored

    def __repr__(self) -> str:
        bits = "empty"
        if self.numel:
            bits = f"{8 * self.nbytes / self.numel:.3f} bits/value"
        return (
            f"NF4Weight(shape={tuple(self.shape)}, dtype={self.dtype}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, {bits}, device={self.device})"
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Return the weight with the keys and bytes of bitsandbytes.

        The dtype float64 is an extension: bitsandbytes does not have it.

        Args:
            prefix: Name of the parameter, with which every key begins.

        Returns:
            Tensors by key, as the table at the top of this file lists them.
        """
        info: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {
            "": self.packed[:, None],  # (ceil(n/2), 1)
            ".absmax": self.scales,
            ".quant_map": nf4_codebook().to(self.device),
        }
        nested_absmax = self.nested_absmax
        offset = self.offset
        if nested_absmax is not None and offset is not None:
            state[".nested_absmax"] = nested_absmax
            state[".nested_quant_map"] = dynamic_map().to(self.device)
            info |= NESTED_FIELDS
            info["nested_offset"] = 0.0 if offset.is_meta else offset.item()
        json_bytes = bytearray(json.dumps(info).encode())
        state[f".{JSON_KEY}"] = torch.frombuffer(json_bytes, dtype=torch.uint8).to(self.device)
        return {prefix + key: tensor for key, tensor in state.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "NF4Weight":
        """Read a weight that `state_dict` or bitsandbytes wrote.

        Args:
            state: Tensors by key. Keys that do not belong to `prefix` are ignored.
            prefix: Name of the parameter.

        Returns:
            The weight.

        Raises:
            ValueError: If an entry is missing, unexpected, of the wrong shape or not finite, or if
                the 4-bit type or its code table is another one.
        """
        entries = entries_of(state, prefix)
        info = read_info(entries, prefix)
        nested = "nested_offset" in info
        check_keys(entries, nested, prefix)
        check_table(entries, "quant_map", nf4_codebook(), prefix)
        if not nested:
            scales = finite_floats(entries, "absmax", prefix)
            nested_absmax = None
            offset = None
        else:
            check_table(entries, "nested_quant_map", dynamic_map(), prefix)
            scales = entries["absmax"].contiguous()
            nested_absmax = finite_floats(entries, "nested_absmax", prefix)
            offset = torch.tensor([info["nested_offset"]], dtype=torch.float32)
            offset = offset.to(nested_absmax.device)
        return cls.from_parts(
            entries[""].detach().contiguous().view(-1).view(torch.uint8),
            scales,
            nested_absmax,
            offset,
            tuple(info["shape"]),
            info["blocksize"],
            DTYPES[info["dtype"]],
        )


def check_format(dtype: torch.dtype, blocksize: int) -> None:
    """Check that NF4 is defined for a dtype and a block size.

    Args:
        dtype: Dtype of the dense tensor.
        blocksize: Number of values that share one scale.

    Raises:
        ValueError: If `dtype` is not in DTYPES, or `blocksize` not in BLOCKSIZES.
    """
    if dtype not in DTYPES.values():
        raise ValueError(
            f"NF4: expected a dtype of {sorted(DTYPES)}, got {dtype}; cast the tensor first"
        )
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"NF4: expected a blocksize of {BLOCKSIZES}, got {blocksize!r}; 64 is the usual one"
        )
