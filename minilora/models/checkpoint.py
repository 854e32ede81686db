"""A folder with config.json and safetensors files, seen tensor by tensor.

Names, shapes and places come from the headers; no tensor is read before it is asked for. Each read opens the file anew,
because safetensors maps the whole file into memory and pages once touched would stay until it is closed. What comes
next in the file is read by the kernel meanwhile.

A weight that bitsandbytes keeps in 4 bits is up to six tensors (minilora_kernels/nf4/weight.py lists them). Here it is
one, of its logical shape, read as an NF4Weight; its parts may lie in several shards, and its bytes under another dtype
(bnb_4bit_quant_storage).
"""

import json
import os
from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from minilora.models.config import DecoderConfig
from minilora_kernels import NF4Weight

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AHEAD = 2**28  # bytes after a tensor that are asked for with it
_LARGEST_JSON = 2**26  # bytes; the index of a model of 1 T parameters has about 2**24
_STATE = ".quant_state.bitsandbytes__"  # then "nf4": the JSON that says a 4-bit weight's shape, dtype and block size


class Checkpoint(Protocol):
    """What `load_model` reads: a config, the shape of each tensor, and the tensors, one at a time.

    four_bit: the weights that `read` gives as an NF4Weight; skip: the linear layers which then are dense.
    """

    config: DecoderConfig
    shapes: dict[str, tuple[int, ...]]
    four_bit: Set[str]
    skip: list[str]

    def read(self, name: str) -> Tensor | NF4Weight: ...
    def where(self, name: str) -> str: ...


class SafetensorsCheckpoint:
    """One file, or shards and their index. ValueError for anything that is damaged, missing or contradictory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _read_config(folder)
        quantization = config.pop("quantization_config", None)
        self.skip = _dense_modules(folder / "config.json", quantization) if quantization else []
        try:
            self.config = DecoderConfig.from_hf(config)
        except (TypeError, AttributeError, OverflowError) as error:  # a list or a text where another kind belongs
            raise ValueError(f"{folder / 'config.json'}: a field is of the wrong kind ({error}).") from error
        self._parts: dict[str, list[str]] = {}  # 4-bit weight -> the tensors it is made of
        self.four_bit: Set[str] = self._parts.keys()
        self._files: dict[str, str] = {}  # tensor -> file name
        self._spans: dict[str, tuple[int, int]] = {}  # tensor -> where it begins in its file, and ends
        self.shapes: dict[str, tuple[int, ...]] = {}
        if (folder / _SINGLE).is_file():
            self._read_headers({_SINGLE})
        elif (folder / _INDEX).is_file():
            self._read_index()
        else:
            raise ValueError(f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}. {_hint(folder)}")
        if quantization:
            self._join_parts()

    def where(self, name: str) -> str:
        return str(self.folder / self._files.get(name, ""))

    def read(self, name: str) -> Tensor | NF4Weight:
        """One tensor in its stored dtype, which lives in the mapped file (copy it before keeping it); or an NF4Weight.

        ValueError if the parts of a 4-bit weight do not fit together.
        """
        if name not in self._parts:
            return self._tensors([name])[name]
        parts = {part: tensor.clone() for part, tensor in self._tensors(self._parts[name]).items()}
        try:
            return NF4Weight.from_state_dict(parts, name)
        except ValueError as error:
            raise ValueError(f"{self.where(name)}: {error}") from error

    def _tensors(self, names: list[str]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        found = {}
        try:
            for file_name in {self._files[name] for name in names}:
                own = [name for name in names if self._files[name] == file_name]
                _read_ahead(self.folder / file_name, *self._spans[own[0]])
                with safe_open(self.folder / file_name, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in own}
        except SafetensorError as error:  # a dtype that torch has not
            raise ValueError(f"{self.where(names[0])}: {names[0]} cannot be read ({error}).") from error
        return found

    def _join_parts(self) -> None:
        """Put the logical shape of each 4-bit weight in the place of its parts' shapes."""
        for key in self.shapes:
            if ".weight." in key:
                name = key.partition(".weight.")[0] + ".weight"
                self._parts.setdefault(name, [name] if name in self.shapes else []).append(key)
        if not self._parts:
            raise ValueError(f"{self.folder}: config.json says load_in_4bit, but no weight is in 4 bits.")
        for name, parts in self._parts.items():
            kinds = [part.partition(_STATE)[2] for part in parts if _STATE in part]
            if kinds != ["nf4"]:
                found = kinds or "no quant_state"
                raise ValueError(f"{self.where(parts[0])}: {name} is 4-bit of kind {found}; minilora reads nf4 alone.")
            shape = self._logical_shape(f"{name}{_STATE}nf4")
            for part in parts:
                del self.shapes[part]
            self.shapes[name] = shape

    def _logical_shape(self, key: str) -> tuple[int, ...]:
        """The shape in a quant_state; all else in it is checked when its weight is read."""
        short = len(self.shapes[key]) == 1 and self.shapes[key][0] < 10_000
        try:
            return tuple(json.loads(bytes(self._tensors([key])[key].tolist()))["shape"]) if short else ()
        except (ValueError, TypeError, KeyError) as error:  # not JSON; not bytes or no list; no shape in it
            raise ValueError(f"{self.where(key)}: {key} is damaged ({error!r}). Download it again.") from error

    def _read_headers(self, names: set[str]) -> None:
        from safetensors import SafetensorError, safe_open  # here: `import minilora` stays light

        for file_name in sorted(names):
            path = self.folder / file_name
            if not path.is_file():
                raise ValueError(f"{path} is missing: the index names it. Download the checkpoint again.")
            if not _is_own(path):
                raise ValueError(
                    f"{path} is a link to {path.resolve()}, outside its folder: do not trust this checkpoint, or put "
                    "the file itself there."
                )
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        if name in self._files:
                            raise ValueError(f"tensor {name} is in both {self.where(name)} and {path}.")
                        self._files[name] = file_name
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut off ({error}). Download it again.") from error
            with path.open("rb") as raw:  # a file that safetensors has found to be sound
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(size))
            for name in header.keys() - {"__metadata__"}:
                begin, end = header[name]["data_offsets"]
                self._spans[name] = 8 + size + begin, 8 + size + end

    def _read_index(self) -> None:
        path = self.folder / _INDEX
        places = _read_json(path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{path}: weight_map must say which file each tensor is in.")
        for name in set(places.values()):
            if not name or Path(name).name != name or "\\" in name or name == "..":
                raise ValueError(f"{path} points to {name!r}, outside its folder: do not trust this checkpoint.")
        self._read_headers(set(places.values()))
        for name in sorted(places.keys() | self._files.keys()):
            if places.get(name) != self._files.get(name):
                raise ValueError(
                    f"tensor {name} is in {self._files.get(name)}, but {path} says {places.get(name)}. "
                    "Download the checkpoint again."
                )


def _read_ahead(path: Path, begin: int, end: int) -> None:
    """Have the kernel read a tensor and what follows while what came before is worked on; only Linux can be told."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), begin, end - begin + _AHEAD, os.POSIX_FADV_WILLNEED)


def _dense_modules(path: Path, quantization: Any) -> list[str]:
    """llm_int8_skip_modules, after checking that this is bitsandbytes' NF4 and nothing else."""
    get = quantization.get if isinstance(quantization, dict) else {}.get
    method, bits = get("quant_method"), "4 bits" if get("load_in_4bit") else "8 bits" if get("load_in_8bit") else "?"
    kind = get("bnb_4bit_quant_type") or "nf4"  # left out: the tensors say which
    if (method, bits, kind) != ("bitsandbytes", "4 bits", "nf4"):
        raise ValueError(
            f"{path}: this checkpoint is already quantised (quant_method {method!r}, {bits}, {kind}); minilora reads "
            "bitsandbytes' 4-bit nf4. Give the 16-bit checkpoint and quantize='nf4'."
        )
    skip = get("llm_int8_skip_modules") or []
    if not isinstance(skip, list) or not all(isinstance(name, str) and name for name in skip):
        raise ValueError(f"{path}: llm_int8_skip_modules must be a list of module names or null, got {skip!r}.")
    return skip


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no model. {_hint(folder)}")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: that is no config and no index.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _is_own(path: Path) -> bool:
    """Whether a file lies in its folder; in the Hub's cache, snapshots/REVISION/FILE is a link into blobs beside it."""
    folder = path.parent.resolve()
    places = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    return path.resolve().parent in places


def _hint(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "adapter_config.json" in names:
        return "It is an adapter: load its base model, then ml.load_adapter(model, folder)."
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "minilora reads no pickle files: convert them to safetensors."
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return f"Give the GGUF file itself: {folder / ggufs[0]}."
    return f"It holds {sorted(names)[:8] or 'nothing'}."
