"""Fingerprints of weights: short hashes by which an adapter file recognises its base."""

import hashlib
from typing import Any

import torch
from torch import Tensor

ROWS = 64  # rows of a weight that are hashed
_DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def hash_rows(weight: Tensor, kind: str | None = None) -> str:
    """Return hashes of 64 rows of a weight, "kind:hash,kind:hash…".

    The rows are spread evenly over the weight. The first hash is of the rows as they are stored.
    The others are of the rows rounded to each dtype that is not wider, so that one checkpoint
    loaded in two dtypes has one hash in common. Only the rows are copied to the CPU.

    Args:
        weight: Tensor of any rank, (rows, …).
        kind: Name of the storage for the first hash; None is the name of the dtype.
    """
    rows = weight.detach()[chosen_rows(weight)].contiguous().cpu()  # (count, …)
    stored_kind = kind or _DTYPE_NAMES.get(rows.dtype, str(rows.dtype))
    versions = {stored_kind: rows}
    if rows.is_floating_point():
        for dtype, name in _DTYPE_NAMES.items():
            if name != stored_kind and dtype.itemsize <= rows.dtype.itemsize:
                versions[name] = rows.to(dtype)  # (count, …)
    hashes = []
    for name, version in versions.items():
        hashes.append(f"{name}:{digest(version.view(torch.uint8).numpy())}")
    return ",".join(hashes)


def chosen_rows(weight: Tensor) -> Tensor:
    """Return the numbers of the rows that are hashed, int64 of shape (count,).

    Args:
        weight: Tensor of any rank, (rows, …).
    """
    count = min(ROWS, len(weight))
    return torch.arange(count, device=weight.device) * len(weight) // max(count, 1)  # (count,)


def digest(content: Any) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of some bytes.

    Args:
        content: Bytes, or an array of them.
    """
    return hashlib.sha256(content).hexdigest()[:16]
