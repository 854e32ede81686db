"""The safetensors files of a model, written tensor by tensor.

safetensors' own writer takes all tensors at once, so this module writes the file itself:

    u64 length of the header
    header, JSON: name -> dtype, shape, [begin, end) in the data
    data, tensor by tensor

The weight files appear when all of them are written, and those of an earlier save are removed.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.common import atomic_write, atomic_writes, write_text
from minilora.common.progress import ProgressBar

_DTYPE_CODES = {  # torch dtype -> safetensors' code
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `make` computes it only when the file has reached it.

    Attributes:
        name: Name of the tensor in the file.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor in the file.
        make: Function that returns the tensor, on any device and of any floating dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, entries: list[Entry], shard_bytes: int) -> set[str]:
    """Write the weight files and, for several, their index.

    Args:
        folder: The folder of the model.
        entries: The tensors, in the model's order.
        shard_bytes: Largest size of a file, in bytes; a larger tensor is alone in its file.

    Returns:
        The names of the files, for remove_stale_weights.

    Raises:
        ValueError: If a tensor holds NaN or infinity; then no file has changed.
    """
    shards = _shards(entries, shard_bytes)
    with (
        atomic_writes(folder, folder / _INDEX) as temporary,
        ProgressBar("save", len(entries), "tensor") as bar,
    ):
        for file_name, shard in shards.items():
            _write_safetensors(temporary / file_name, shard, bar)
    if len(shards) == 1:
        return set(shards)
    weight_map = {}
    for file_name, shard in shards.items():
        for entry in shard:
            weight_map[entry.name] = file_name
    total_size = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_text(folder / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {*shards, _INDEX}


def _shards(entries: list[Entry], limit: int) -> dict[str, list[Entry]]:
    """Return the tensors of each file in the model's order.

    A tensor larger than `limit` bytes is alone in its file.
    """
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {_SINGLE: entries}
    count = len(groups)
    shards = {}
    for number, group in enumerate(groups, start=1):
        shards[f"model-{number:05}-of-{count:05}.safetensors"] = group
    return shards


@torch.no_grad()
def _write_safetensors(path: Path, entries: list[Entry], bar: ProgressBar) -> None:
    """Write one safetensors file; each tensor is made, checked, written and freed in turn."""
    # The largest item size first keeps every tensor aligned to its item size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(_safetensors_header(entries))
        for entry in entries:
            tensor = entry.make().to(entry.dtype)  # entry.shape
            if not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(
                    f"{entry.name} holds NaN or infinity in {entry.dtype}: nothing was written."
                )
            data = tensor.contiguous().flatten().cpu().view(torch.uint8)  # (nbytes,)
            file.write(data.numpy().data)
            del tensor, data  # before the next one is made
            bar.update()


def _safetensors_header(entries: list[Entry]) -> bytes:
    """Return the length and the JSON of a header, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPE_CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def remove_stale_weights(folder: Path, file_names: set[str]) -> None:
    """Remove the weight files of an earlier save.

    Args:
        folder: The folder of the model.
        file_names: The names that write_weights returned; these files stay.
    """
    for path in [*folder.glob("model-*.safetensors"), folder / _SINGLE, folder / _INDEX]:
        if path.name not in file_names:
            path.unlink(missing_ok=True)
