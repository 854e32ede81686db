"""A folder with config.json and safetensors files as a checkpoint that is read tensor by tensor.

Names, shapes and positions come from the files' headers; no tensor is read before `read` names it.
Each read opens its file again: safetensors maps the whole file into memory, and pages that were
touched would stay in memory until the file is closed. The kernel reads the next part of the file
in the background.

bitsandbytes stores a 4-bit weight as up to six tensors, which minilora_kernels/nf4/weight.py lists.
Here they are one tensor of the logical shape, read as an NF4Weight. Its parts may be in several
shards, and the bytes of its codes may have another dtype (bnb_4bit_quant_storage).

A checkpoint may come from a stranger, so every claim of a file is checked before memory is
allocated for it, and no path leaves the folder.
"""

import json
import os
from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from minilora.common import is_list_of, read_json
from minilora.models.config import DecoderConfig
from minilora_kernels import NF4Weight

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_READ_AHEAD = 2**28  # bytes after a tensor that the kernel reads in the background
_MAX_STATE = 10_000  # bytes of a 4-bit weight's JSON
_STATE = ".quant_state.bitsandbytes__"  # then "nf4": JSON with a weight's shape, dtype, block size


class Checkpoint(Protocol):
    """The interface that `load_model` reads: a config, shapes, and tensors one at a time.

    Attributes:
        config: The model's config.
        shapes: Shape of each tensor by its Hugging Face name; of a 4-bit weight the logical shape.
        four_bit: Names of the weights that `read` returns as an NF4Weight.
        skip: Names of the linear layers that are dense in a 4-bit checkpoint.
    """

    config: DecoderConfig
    shapes: dict[str, tuple[int, ...]]
    four_bit: Set[str]
    skip: list[str]

    def read(self, name: str) -> Tensor | NF4Weight:
        """Read one tensor.

        Args:
            name: A key of `shapes`.

        Returns:
            The tensor, or an NF4Weight for a name in `four_bit`.
        """
        ...

    def where(self, name: str) -> str:
        """Return the place of a tensor for an error message.

        Args:
            name: Name of the tensor.

        Returns:
            The file, or the checkpoint where the tensor is missing.
        """
        ...


class SafetensorsCheckpoint:
    """A folder with one safetensors file, or with shards and their index.

    Args:
        folder: The folder with config.json.

    Attributes:
        folder: The folder with config.json.
        config: The model's config.
        shapes: Shape of each tensor by its name; of a 4-bit weight the logical shape.
        four_bit: Names of the weights that `read` returns as an NF4Weight.
        skip: Names of the linear layers that are dense in a 4-bit checkpoint.

    Raises:
        ValueError: If something is damaged, missing or contradictory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        config = _read_config(folder)
        quantization = config.pop("quantization_config", None)
        self.skip: list[str] = []
        if quantization:
            self.skip = _dense_modules(config_path, quantization)
        try:
            self.config = DecoderConfig.from_hf(config)
        except (TypeError, AttributeError, OverflowError) as error:  # a list for a number, or so
            raise ValueError(f"{config_path}: a field is of the wrong kind ({error}).") from error
        self._parts: dict[str, list[str]] = {}  # 4-bit weight -> the tensors that it consists of
        self.four_bit: Set[str] = self._parts.keys()
        self._files: dict[str, str] = {}  # tensor -> file name
        self._spans: dict[str, tuple[int, int]] = {}  # tensor -> first byte in its file, and end
        self.shapes: dict[str, tuple[int, ...]] = {}
        if (folder / _SINGLE).is_file():
            self._read_headers({_SINGLE})
        elif (folder / _INDEX).is_file():
            self._read_index()
        else:
            raise ValueError(
                f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}. {_hint(folder)}"
            )
        if quantization:
            self._join_parts()

    def where(self, name: str) -> str:
        """Return the place of a tensor for an error message.

        Args:
            name: Name of the tensor.

        Returns:
            Its file; the folder if it has no such tensor.
        """
        return str(self.folder / self._files.get(name, ""))

    def read(self, name: str) -> Tensor | NF4Weight:
        """Read one tensor.

        Args:
            name: A key of `shapes`.

        Returns:
            The tensor in its stored dtype, or an NF4Weight for a name in `four_bit`. A tensor's
            memory is the mapped file: copy the tensor before you keep it.

        Raises:
            ValueError: If torch does not have the stored dtype, or the parts of a 4-bit weight do
                not fit together.
        """
        if name not in self._parts:
            return self._read_tensors([name])[name]
        parts = {}
        for part, tensor in self._read_tensors(self._parts[name]).items():
            parts[part] = tensor.clone()
        try:
            return NF4Weight.from_state_dict(parts, name)
        except ValueError as error:
            raise ValueError(f"{self.where(name)}: {error}") from error

    def _read_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors as stored, each of their files once."""
        from safetensors import SafetensorError, safe_open

        names_by_file: dict[str, list[str]] = {}
        for name in names:
            names_by_file.setdefault(self._files[name], []).append(name)
        tensors = {}
        try:
            for file_name, names_in_file in names_by_file.items():
                path = self.folder / file_name
                begin, end = self._spans[names_in_file[0]]
                _read_ahead(path, begin, end)
                with safe_open(path, framework="pt") as file:
                    for name in names_in_file:
                        tensors[name] = file.get_tensor(name)
        except SafetensorError as error:  # torch does not have its dtype
            raise ValueError(
                f"{self.where(names[0])}: {names[0]} cannot be read ({error})."
            ) from error
        return tensors

    def _join_parts(self) -> None:
        """Replace the shapes of each 4-bit weight's parts by its logical shape."""
        for key in self.shapes:
            if ".weight." not in key:
                continue
            name = key.partition(".weight.")[0] + ".weight"
            if name not in self._parts:
                self._parts[name] = []
                if name in self.shapes:
                    self._parts[name].append(name)
            self._parts[name].append(key)
        if not self._parts:
            raise ValueError(
                f"{self.folder}: config.json has load_in_4bit, but no weight is in 4 bits."
            )
        for name, parts in self._parts.items():
            kinds = [part.partition(_STATE)[2] for part in parts if _STATE in part]
            if kinds != ["nf4"]:
                raise ValueError(
                    f"{self.where(parts[0])}: {name} is 4-bit of kind {kinds or 'no quant_state'}; "
                    "minilora reads nf4 alone."
                )
            shape = self._logical_shape(f"{name}{_STATE}nf4")
            for part in parts:
                del self.shapes[part]
            self.shapes[name] = shape

    def _logical_shape(self, key: str) -> tuple[int, ...]:
        """Return the shape in a quant_state; `read` checks its other fields."""
        stored_shape = self.shapes[key]
        if len(stored_shape) != 1 or stored_shape[0] >= _MAX_STATE:
            return ()
        try:
            state_bytes = bytes(self._read_tensors([key])[key].tolist())
            return tuple(json.loads(state_bytes)["shape"])
        except (ValueError, TypeError, KeyError) as error:  # not bytes, not JSON, or no shape
            raise ValueError(
                f"{self.where(key)}: {key} is damaged ({error!r}). Download it again."
            ) from error

    def _read_headers(self, file_names: set[str]) -> None:
        """Read the name, shape and position of every tensor in these files."""
        from safetensors import SafetensorError  # not at the top: `import minilora` stays light

        for file_name in sorted(file_names):
            path = self.folder / file_name
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing: the index names it. Download the checkpoint again."
                )
            if not _is_inside_checkpoint(path):
                raise ValueError(
                    f"{path} is a link to {path.resolve()}, outside its folder: do not trust this "
                    "checkpoint, or put the file itself there."
                )
            try:
                self._read_shapes(path)
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged or cut off ({error}). Download it again."
                ) from error
            self._read_spans(path)

    def _read_shapes(self, path: Path) -> None:
        """Read the name and shape of every tensor in a file, which safetensors checks."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name in self._files:
                    raise ValueError(f"tensor {name} is in both {self.where(name)} and {path}.")
                self._files[name] = path.name
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def _read_spans(self, path: Path) -> None:
        """Read the position of every tensor in a file that safetensors has checked."""
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
        data_start = 8 + header_size
        for name in header.keys() - {"__metadata__"}:
            begin, end = header[name]["data_offsets"]
            self._spans[name] = (data_start + begin, data_start + end)

    def _read_index(self) -> None:
        """Read the headers of all shards, and check that the index agrees with them."""
        path = self.folder / _INDEX
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not is_list_of(list(files.values()), str):
            raise ValueError(f"{path}: weight_map must map each tensor to the name of its file.")
        for name in set(files.values()):
            if not name or Path(name).name != name or "\\" in name or name == "..":
                raise ValueError(
                    f"{path} points to {name!r}, outside its folder: do not trust this checkpoint."
                )
        self._read_headers(set(files.values()))
        for name in sorted(files.keys() | self._files.keys()):
            if files.get(name) != self._files.get(name):
                raise ValueError(
                    f"tensor {name} is in {self._files.get(name)}, but {path} names "
                    f"{files.get(name)}. Download the checkpoint again."
                )


def _read_ahead(path: Path, begin: int, end: int) -> None:
    """Let the kernel read a tensor and the bytes after it in the background; only on Linux."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        length = end - begin + _READ_AHEAD
        os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


def _dense_modules(path: Path, quantization: Any) -> list[str]:
    """Return llm_int8_skip_modules after checking that the format is bitsandbytes' NF4."""
    settings = quantization if isinstance(quantization, dict) else {}
    method = settings.get("quant_method")
    bits = "?"
    if settings.get("load_in_4bit"):
        bits = "4 bits"
    elif settings.get("load_in_8bit"):
        bits = "8 bits"
    kind = settings.get("bnb_4bit_quant_type") or "nf4"  # if absent, the tensors' names decide
    if (method, bits, kind) != ("bitsandbytes", "4 bits", "nf4"):
        raise ValueError(
            f"{path}: this checkpoint is already quantised (quant_method {method!r}, {bits}, "
            f"{kind}); minilora reads bitsandbytes' 4-bit nf4. Give the 16-bit checkpoint and "
            "quantize='nf4'."
        )
    skip = settings.get("llm_int8_skip_modules") or []
    if not is_list_of(skip, str) or "" in skip:
        raise ValueError(
            f"{path}: llm_int8_skip_modules must be a list of module names or null, got {skip!r}."
        )
    return skip


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a model. {_hint(folder)}")
    return read_json(path)


def _is_inside_checkpoint(path: Path) -> bool:
    """Check that a file, or the target of a link, is in the folder or in the Hub cache's blobs.

    In the Hub's cache, snapshots/REVISION/FILE is a link to a file in the folder blobs.
    """
    folder = path.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    return path.resolve().parent in allowed


def _hint(folder: Path) -> str:
    """Return the remedy for a folder that is not a safetensors checkpoint."""
    names: list[str] = []
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "It is an adapter: load its base model, then ml.load_adapter(model, folder)."
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "minilora reads no pickle files: convert them to safetensors."
    gguf_names = [name for name in names if name.endswith(".gguf")]
    if gguf_names:
        return f"Give the GGUF file itself: {folder / gguf_names[0]}."
    return f"It holds {names[:8] or 'nothing'}."
