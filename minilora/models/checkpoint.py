"""A folder with config.json and safetensors files, seen tensor by tensor.

Names, shapes and places come from the headers; no tensor is read before it is asked for. Each read opens the file anew,
because safetensors maps the whole file into memory and pages once touched would stay until it is closed.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from minilora.models.config import DecoderConfig

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(Protocol):
    """What `load_model` reads: a config, the shape of each tensor, and the tensors, one at a time."""

    config: DecoderConfig
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...
    def where(self, name: str) -> str: ...


class SafetensorsCheckpoint:
    """One file, or shards and their index. ValueError for anything that is damaged, missing or contradictory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = DecoderConfig.from_hf(_read_config(folder))
        self._files: dict[str, str] = {}  # tensor -> file name
        self.shapes: dict[str, tuple[int, ...]] = {}
        if (folder / _SINGLE).is_file():
            self._read_headers({_SINGLE})
        elif (folder / _INDEX).is_file():
            self._read_index()
        else:
            raise ValueError(f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}. {_hint(folder)}")

    def where(self, name: str) -> str:
        return str(self.folder / self._files.get(name, ""))

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype; it lives in the mapped file, so copy it before keeping it."""
        from safetensors import safe_open

        with safe_open(self.folder / self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _read_headers(self, names: set[str]) -> None:
        from safetensors import SafetensorError, safe_open  # here: `import minilora` stays light

        for file_name in sorted(names):
            path = self.folder / file_name
            if not path.is_file():
                raise ValueError(f"{path} is missing: the index names it. Download the checkpoint again.")
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        if name in self._files:
                            raise ValueError(f"tensor {name} is in both {self.where(name)} and {path}.")
                        self._files[name] = file_name
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut off ({error}). Download it again.") from error

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


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no model. {_hint(folder)}")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _hint(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "adapter_config.json" in names:
        return "It is an adapter: load its base model, then ml.load_adapter(model, folder)."
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "minilora reads no pickle files: convert them to safetensors."
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return f"Give the GGUF file itself: {folder / ggufs[0]}."
    return f"It holds {sorted(names)[:8] or 'nothing'}."
