"""The layout of a GGUF file: what is before the tensors' data.

    magic "GGUF" · version · number of tensors · number of pairs      u32, u64, u64
    pairs      key string · value type u32 · value                     string: u64 length, then UTF-8
    records    name · dims count u32 · dims u64 · type u32 · offset    array: element type u32, u64 count, elements
    data       from the next multiple of general.alignment on; a record's offset counts from there

Everything is little-endian. Dims are written innermost first: a torch (rows, columns) weight says [columns, rows].
Read here rather than with the `gguf` package, whose reader builds an object a string: 5 s a file, against 0.2 s.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
_STRING, _ARRAY = 8, 9
_LONGEST = 2**26  # bytes of a string or array, and for each 32 of them an element: beyond any vocabulary or template


@dataclass(frozen=True)
class Record:
    """Where a tensor lies: its shape in torch's order, its gguf.GGMLQuantizationType, its offset in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """The pairs and the records. ValueError when the file is no GGUF or is cut off within its header."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file.")
        version, tensors, pairs = reader.number("I"), reader.number("Q"), reader.number("Q")
        if version not in (2, 3):
            raise ValueError(f"{path} has GGUF version {version}, expected 2 or 3 (little-endian).")
        fields = reader.named(reader.pair, pairs)
        records = reader.named(reader.record, tensors)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"{path} is damaged: general.alignment is {alignment!r}.")
        start = -(-file.tell() // alignment) * alignment
    return fields, {name: Record(r.shape, r.kind, start + r.offset) for name, r in records.items()}


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def take(self, count: int) -> bytes:
        if count > min(self.size - self.file.tell(), _LONGEST):  # first: a damaged count may be astronomical
            raise ValueError(f"{self.path} is cut off or damaged within its header. Download it again.")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def named(self, read: Callable[[], tuple[str, Any]], count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in (read() for _ in range(count)):
            if name in found:
                raise ValueError(f"{self.path} is damaged: {name!r} is in it twice.")
            found[name] = value
        return found

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def pair(self) -> tuple[str, Any]:
        return self.string(), self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} is damaged: value type {kind} does not exist.")
        element, count = self.number("I"), self.number("Q")
        if element == _ARRAY or count > _LONGEST // 32 and element == _STRING:
            raise ValueError(f"{self.path} is damaged: an array of arrays, or of {count} elements.")
        if element not in _SCALARS:
            return [self.value(element) for _ in range(count)]
        import numpy as np  # here: `import minilora` is to stay light

        dtype = np.dtype("<" + _SCALARS[element])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def record(self) -> tuple[str, Record]:
        name, dims_count = self.string(), self.number("I")
        if not 1 <= dims_count <= 4:
            raise ValueError(f"{self.path} is damaged: tensor {name!r} has {dims_count} dimensions.")
        dims = [self.number("Q") for _ in range(dims_count)]
        return name, Record(tuple(dims[::-1]), self.number("I"), self.number("Q"))
