"""The layout of a GGUF file's header, which comes before the tensors' data.

    magic "GGUF" · version · number of tensors · number of pairs      u32, u64, u64
    pairs      key string · value type u32 · value
    records    name string · dims count u32 · dims u64 · type u32 · offset u64
    data       from the next multiple of general.alignment on; offsets count from there

    string     u64 length, then UTF-8
    array      element type u32, u64 count, then the elements

Every number is little-endian. The dims are written innermost first: the record of a torch weight of
shape (rows, columns) stores [columns, rows].

This module parses the header instead of the `gguf` package because the reader of that package
builds one object for each string and needs 5 s for a file, against 0.2 s here.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_SCALAR_CODES = {  # value type -> code of the struct module
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9
_MAX_BYTES = 2**26  # of one string or one array; more than any vocabulary or template needs
_MAX_STRINGS = _MAX_BYTES // 32  # in one array
_MAX_ALIGNMENT = 2**20  # bytes
_MAX_DIMS = 4


@dataclass(frozen=True)
class Record:
    """The header's entry for one tensor.

    Attributes:
        shape: Shape of the tensor in torch's order.
        kind: Number of its gguf.GGMLQuantizationType.
        offset: Position of its first byte, in bytes from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """Read the key-value pairs and the tensor records of a GGUF file.

    Args:
        path: The GGUF file.

    Returns:
        The values by key, and the records by tensor name.

    Raises:
        ValueError: If the file is not a GGUF file, or its header is cut off or damaged.

    Source:
        The GGUF specification, versions 2 and 3 (ggml/docs/gguf.md).
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file.")
        version = reader.number("I")
        tensor_count = reader.number("Q")
        pair_count = reader.number("Q")
        if version not in (2, 3):
            raise ValueError(f"{path} has GGUF version {version}, expected 2 or 3 (little-endian).")
        fields = reader.items(reader.pair, pair_count)
        relative_records = reader.items(reader.record, tensor_count)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
            raise ValueError(f"{path} is damaged: general.alignment is {alignment!r}.")
        data_start = -(-file.tell() // alignment) * alignment  # rounded up

    records = {}
    for name, record in relative_records.items():
        records[name] = Record(record.shape, record.kind, data_start + record.offset)
    return fields, records


class _Reader:
    """Reads the values of a header in turn and refuses counts that the file cannot hold."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.size = path.stat().st_size  # bytes

    def take(self, count: int) -> bytes:
        """Read `count` bytes; the check comes first because a damaged count may be astronomical."""
        remaining = self.size - self.file.tell()
        if count > min(remaining, _MAX_BYTES):
            raise ValueError(
                f"{self.path} is cut off or damaged within its header. Download it again."
            )
        return self.file.read(count)

    def number(self, code: str) -> Any:
        """Read one number of a struct code."""
        layout = "<" + code
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def items(self, read_item: Callable[[], tuple[str, Any]], count: int) -> dict[str, Any]:
        """Read `count` named items; a name that occurs twice is an error."""
        items: dict[str, Any] = {}
        for _ in range(count):
            name, value = read_item()
            if name in items:
                raise ValueError(f"{self.path} is damaged: it contains {name!r} twice.")
            items[name] = value
        return items

    def string(self) -> str:
        """Read a string: its length, then UTF-8."""
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def pair(self) -> tuple[str, Any]:
        """Read a key, the type of its value, and the value."""
        key = self.string()
        kind = self.number("I")
        return key, self.value(kind)

    def value(self, kind: int) -> Any:
        """Read a value of a GGUF value type."""
        if kind in _SCALAR_CODES:
            return self.number(_SCALAR_CODES[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise ValueError(f"{self.path} is damaged: value type {kind} does not exist.")

    def array(self) -> list[Any]:
        """Read an array of scalars or of strings."""
        element_kind = self.number("I")
        count = self.number("Q")
        too_many_strings = element_kind == _STRING and count > _MAX_STRINGS
        if element_kind == _ARRAY or too_many_strings:
            raise ValueError(
                f"{self.path} is damaged: it has an array of arrays, or of {count} elements."
            )
        if element_kind not in _SCALAR_CODES:
            return [self.value(element_kind) for _ in range(count)]

        import numpy as np  # not at the top: `import minilora` must stay light

        dtype = np.dtype("<" + _SCALAR_CODES[element_kind])
        raw = self.take(count * dtype.itemsize)
        return np.frombuffer(raw, dtype).tolist()

    def record(self) -> tuple[str, Record]:
        """Read a tensor's name and its record, whose offset counts from the start of the data."""
        name = self.string()
        dims_count = self.number("I")
        if not 1 <= dims_count <= _MAX_DIMS:
            raise ValueError(
                f"{self.path} is damaged: tensor {name!r} has {dims_count} dimensions."
            )
        dims = [self.number("Q") for _ in range(dims_count)]
        kind = self.number("I")
        offset = self.number("Q")
        return name, Record(tuple(reversed(dims)), kind, offset)
