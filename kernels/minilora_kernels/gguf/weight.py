"""GGUFWeight: a matrix in the bytes of a GGUF file.

The bytes are never changed. In files of the llama architecture, llama.cpp stores the rows of q_proj
and k_proj in another order: within each head of d rows,

    row of the model        0   1   …   d/2 - 1   d/2   d/2 + 1   …   d - 1
    row of the file         0   2   …   d - 2     1     3         …   d - 1

`heads` is the number of heads of such a matrix, and the rows are put in the model's order while
they are dequantised. For every other matrix it is 0.

In a state dict a weight with the name "w" has two entries:

    w         uint8 (out, bytes of a row)
    w.gguf    JSON text as uint8: type, shape, dtype, heads
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from minilora_kernels.gguf.formats import FORMATS
from minilora_kernels.quantized_weight import QuantizedWeight

JSON_KEY = "gguf"
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SCALES_AT_A_TIME = 2**20  # blocks whose scales are examined together


@dataclass(frozen=True, eq=False, repr=False)
class GGUFWeight(QuantizedWeight):
    """A matrix of logical `shape` and `dtype`, stored in a quantised type of GGUF.

    Attributes:
        blocks: The bytes of the file, uint8 of shape (out, bytes of a row).
        shape: Shape (out, in) of the dense matrix.
        dtype: Dtype of the dense matrix.
        type_name: Name of the type, a key of FORMATS, such as "Q4_K".
        heads: Number of heads whose rows llama.cpp permuted; 0 for rows in the model's order.

    Raises:
        ValueError: If the type or the dtype is unknown, or if the sizes do not fit together.
    """

    kind: ClassVar[str] = "gguf"

    blocks: Tensor
    shape: torch.Size
    dtype: torch.dtype
    type_name: str
    heads: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        check_matrix(self.blocks, self.shape, self.type_name, self.heads)
        if self.dtype not in _DTYPES.values():
            raise ValueError(
                f"GGUFWeight: expected a dtype of {sorted(_DTYPES)}, got {self.dtype}; choose one"
            )

    def parts(self) -> tuple[Tensor, torch.Size, str, int]:
        """Return (blocks, shape, type_name, heads), the arguments of the ops before the dtype."""
        return self.blocks, self.shape, self.type_name, self.heads

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Number of bytes stored."""
        return self.blocks.nbytes

    @property
    def bits(self) -> float:
        """Stored bits a value, the scales included."""
        return FORMATS[self.type_name].bits

    @property
    def device(self) -> torch.device:
        """Device of the stored bytes."""
        return self.blocks.device

    def to(self, device: torch.device | str | int) -> "GGUFWeight":
        """Return the same weight on another device.

        Args:
            device: Device to move the stored bytes to.
        """
        return replace(self, blocks=self.blocks.to(torch.device(device)))

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows of the dense matrix in fp32; no other row is decoded.

        Args:
            indices: Numbers of rows in the model's order, int64 of any shape (…).

        Returns:
            The rows, fp32 of shape (…, in).
        """
        order = row_order(self.shape[0], self.heads, self.device)
        if order is not None:
            indices = order[indices]
        return decode_rows(self.blocks[indices.flatten()], self.type_name).view(
            *indices.shape, self.shape[1]
        )

    def check_scales(self) -> None:
        """Check that every scale is finite.

        Raises:
            ValueError: If a scale is NaN or infinite.
        """
        block_format = FORMATS[self.type_name]
        blocks = self.blocks.view(-1, block_format.nbytes)  # (K, nbytes)
        for start in range(0, len(blocks), _SCALES_AT_A_TIME):
            chunk = blocks[start : start + _SCALES_AT_A_TIME]  # (K', nbytes)
            for offset in block_format.scale_offsets:
                scales = chunk[:, offset : offset + 2].contiguous().view(torch.float16)  # (K', 1)
                if not scales.isfinite().all():
                    number = start + int((~scales.isfinite()).flatten().nonzero()[0])
                    raise ValueError(
                        f"block {number} of {self.type_name} has a scale that is NaN or infinite; "
                        "the file is damaged, download it again"
                    )

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Return the two entries of the weight.

        Args:
            prefix: Name of the parameter, with which every key begins.
        """
        info = {
            "type": self.type_name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "heads": self.heads,
        }
        text = bytearray(json.dumps(info).encode())
        json_bytes = torch.frombuffer(text, dtype=torch.uint8)
        return {prefix: self.blocks, f"{prefix}.{JSON_KEY}": json_bytes.to(self.device)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "GGUFWeight":
        """Read a weight that `state_dict` wrote.

        Args:
            state: Tensors by key. Keys that do not belong to `prefix` are ignored.
            prefix: Name of the parameter.

        Raises:
            ValueError: If an entry is missing or does not fit, or if a scale is not finite.
        """
        key = f"{prefix}.{JSON_KEY}"
        if prefix not in state or key not in state:
            raise ValueError(
                f"GGUF state: expected the keys {prefix} and {key}, got {sorted(state)[:4]}; load a "
                "state dict of a model in the same storage"
            )
        info = _parse_info(state[key], key)
        blocks = state[prefix].detach().contiguous()
        shape = torch.Size(info["shape"])
        weight = cls(blocks, shape, _DTYPES[info["dtype"]], info["type"], info["heads"])
        if not blocks.is_meta:
            weight.check_scales()
        return weight

    def __repr__(self) -> str:
        return (
            f"GGUFWeight(shape={tuple(self.shape)}, dtype={self.dtype}, type={self.type_name}, "
            f"heads={self.heads}, {self.bits:.3f} bits/value, device={self.device})"
        )


def check_matrix(blocks: Tensor, shape: torch.Size, type_name: str, heads: int) -> None:
    """Check that stored bytes are a matrix of a type.

    Args:
        blocks: The bytes.
        shape: Shape (out, in) of the dense matrix.
        type_name: Name of the type.
        heads: Number of heads of permuted rows, or 0.

    Raises:
        ValueError: If something does not fit.
    """
    if type_name not in FORMATS:
        raise ValueError(
            f"GGUF: expected a type of {', '.join(FORMATS)}, got {type_name!r}; dequantise others"
        )
    block_format = FORMATS[type_name]
    if len(shape) != 2 or shape[1] % block_format.values != 0:
        raise ValueError(
            f"{type_name}: expected a shape (out, in) with in a multiple of {block_format.values}, "
            f"got {tuple(shape)}; keep this matrix dense"
        )
    expected = (shape[0], shape[1] // block_format.values * block_format.nbytes)
    if blocks.dtype != torch.uint8 or blocks.shape != expected or not blocks.is_contiguous():
        raise ValueError(
            f"{type_name} of shape {tuple(shape)}: expected contiguous uint8 of shape {expected}, "
            f"got {blocks.dtype} of shape {tuple(blocks.shape)}; pass the bytes of the file"
        )
    if heads < 0 or (heads and shape[0] % (2 * heads) != 0):
        raise ValueError(
            f"heads: expected 0, or a number of which 2 · heads divides {shape[0]} rows, got {heads}"
        )


def row_order(rows: int, heads: int, device: torch.device) -> Tensor | None:
    """Return the number of the stored row for each row of the model.

    Args:
        rows: Number of rows.
        heads: Number of heads whose rows llama.cpp permuted, or 0.
        device: Device of the result.

    Returns:
        Row numbers, int64 of shape (rows,); None if the two orders are the same.
    """
    if heads == 0:
        return None
    stored = torch.arange(rows, device=device).view(heads, -1, 2)  # (heads, d / 2, 2)
    return stored.transpose(1, 2).flatten()  # (rows,)


def decode_rows(blocks: Tensor, type_name: str) -> Tensor:
    """Return the values of some rows.

    Args:
        blocks: Bytes of the rows, uint8 of shape (rows, bytes of a row).
        type_name: Name of the type.

    Returns:
        Values, fp32 of shape (rows, in).
    """
    block_format = FORMATS[type_name]
    values = block_format.decode(blocks.reshape(-1, block_format.nbytes))  # (K, values)
    return values.view(len(blocks), -1)  # (rows, in)


def _parse_info(json_bytes: Tensor, key: str) -> dict[str, Any]:
    """Return the checked fields of the JSON entry."""
    try:
        info = json.loads(bytes(json_bytes.tolist()))
        sizes_ok = all(type(size) is int and size >= 0 for size in info["shape"])
        fields_ok = info["dtype"] in _DTYPES and type(info["heads"]) is int
        names_ok = set(info) == {"type", "shape", "dtype", "heads"}
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"GGUF state: {key} is not the JSON text that minilora writes ({error!r}); the file is "
            "damaged"
        ) from error
    if not (sizes_ok and fields_ok and names_ok):
        raise ValueError(
            f"GGUF state: expected a type, shape, dtype and heads in {key}, got {info}; the file is "
            "damaged"
        )
    return info
