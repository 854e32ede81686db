"""Helpers for the whole library: atomic files, name suggestions, checked config fields, modules.

Files are written atomically: to a temporary name, then fsync, then rename. A crash at any moment
leaves the old file or the new one, never a part of one. Nothing here reads or writes pickle.
"""

import difflib
import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor, nn

__version__ = "0.1.0"


# ---- atomic files


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file or folder atomically.

    The `with` block writes to a temporary path, which replaces `path` at the end. An exception
    removes the temporary path and leaves `path` unchanged. A folder at `path` is replaced in two
    renames; a crash between them leaves both folders complete.

    Args:
        path: The file or folder to create or replace.

    Yields:
        The temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old.tmp")
    _remove(temporary)  # left by an earlier crash
    try:
        with naming(path):
            yield temporary
        for part in [temporary, *temporary.rglob("*")]:
            _fsync(part)
        if path.is_dir():  # a folder cannot be renamed over another one
            _remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)
        _remove(old)
    finally:
        _remove(temporary)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to an OSError of the `with` block, which may not name it (a full disk).

    Args:
        path: The path to add.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.errno = error.errno or errno.EIO
            error.strerror = error.strerror or str(error)
            error.filename = str(path)
        raise


@contextmanager
def together(folder: Path, index: Path) -> Iterator[Path]:
    """Write several files that belong together and move them into a folder.

    `index` is removed before the first file is moved. A crash therefore leaves the old files, the
    new files, or no index, but never an index for a mixture of old and new files.

    Args:
        folder: The folder that receives the files.
        index: The file that lists them for a reader.

    Yields:
        A temporary folder to write to.
    """
    new = folder / ".new"
    with whole(new) as temporary:
        temporary.mkdir()
        yield temporary
    index.unlink(missing_ok=True)
    for file in new.iterdir():
        os.replace(file, folder / file.name)
    new.rmdir()
    _fsync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Args:
        path: The file to create or replace.
        text: Its content.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically. Equal tensors give equal bytes.

    Args:
        path: The file to create or replace.
        tensors: Tensors by name.
        metadata: Texts by name for the header of the file.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        address = tensor.data_ptr()
        if address in addresses:  # safetensors refuses tensors that share memory
            tensor = tensor.clone()
        contiguous[key] = tensor
        addresses.add(address)
    with whole(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: The file.

    Raises:
        ValueError: The file is damaged or incomplete.
        FileNotFoundError: The file does not exist.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}). Copy or download it again."
        ) from error


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Wait until the disk has stored a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- name suggestions


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the candidates that are most similar to a name, best first.

    Args:
        name: The name that was not found.
        candidates: Possible names. Module paths are also compared by their last part.
        n: Largest number of results.
    """
    candidates = list(dict.fromkeys(candidates))
    similar = difflib.get_close_matches(name, candidates, n)
    if similar:
        return similar
    last_parts = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    return difflib.get_close_matches(name, last_parts, n) or sorted(last_parts)[:n]


def unknown(kind: str, name: str, candidates: Iterable[str]) -> ValueError:
    """Return a ValueError for a name that matches nothing, with the nearest names.

    Args:
        kind: The option or kind of thing that was named.
        name: The name that matches nothing.
        candidates: The names that exist.
    """
    candidates = list(candidates)
    if not candidates:
        return ValueError(f"{kind}: {name!r} matches nothing. There are none.")
    names = ", ".join(map(repr, nearest(name, candidates)))
    return ValueError(f"{kind}: {name!r} matches nothing. Nearest: {names}.")


# ---- checked fields of a dataclass

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    list[str]: "a list of names",
    list[int]: "a list of whole numbers",
    dict[str, int]: "a dict of whole numbers",
    dict[str, float]: "a dict of finite numbers",
}


def option(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    choices: tuple = (),
) -> Any:
    """Return a dataclass field with a help text and the values that it may have.

    `check_options` checks the limits. In a dict they hold for each value.

    Args:
        default: The default value.
        help: The meaning of the field, for error messages and the command line.
        low: Smallest value.
        high: Largest value.
        above: Every value is larger than this.
        below: Every value is smaller than this.
        choices: The only values; empty allows any value.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    start: dict[str, Any] = {"default": default}
    if default == {}:
        start = {"default_factory": dict}
    return field(**start, metadata={"help": help} | bounds)


def check_options(config: Any) -> None:
    """Convert the `option` fields of a frozen dataclass to their types and check them.

    Args:
        config: The dataclass instance. Its fields are changed in place (int → float, path → str).

    Raises:
        ValueError: A value has the wrong type or is outside its range.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        if "choices" in f.metadata:
            value = _checked(f.name, getattr(config, f.name), hints[f.name], f.metadata)
            object.__setattr__(config, f.name, value)


def _checked(name: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
    """Return the value in the type of its field, or raise ValueError."""
    allowed = (hint,)
    if isinstance(hint, UnionType):
        allowed = get_args(hint)
    if value is None and type(None) in allowed:
        return None
    if str in allowed and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if float in allowed and type(value) is int:
        value = float(value)
    types = [kind for kind in allowed if kind is not type(None)]
    if not any(_has_type(value, kind) for kind in types):
        names = " or ".join(_TYPE_NAMES[kind] for kind in types)
        raise ValueError(f"{name}: expected {names}, got {value!r}. It is: {rules['help']}.")
    if rules["choices"] and value not in rules["choices"]:
        choices = ", ".join(map(str, rules["choices"]))
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")
    numbers = value.values() if isinstance(value, dict) else [value]
    for number in numbers:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            _check_range(name, number, rules)
    return value


def _check_range(name: str, number: float, rules: Mapping[str, Any]) -> None:
    """Raise ValueError if a number is outside the limits of its field."""
    in_closed_range = rules["low"] <= number <= rules["high"]
    if in_closed_range and rules["above"] < number < rules["below"]:
        return
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    limits = [f"{sign} {rules[key]:g}" for key, sign in signs.items() if math.isfinite(rules[key])]
    expected = " and ".join(limits)
    raise ValueError(f"{name}: expected {expected}, got {number!r}. It is: {rules['help']}.")


def _has_type(value: Any, kind: Any) -> bool:
    """Return True if a value, and each element that it contains, has a type of `_TYPE_NAMES`."""
    if get_origin(kind) is list:
        (item_kind,) = get_args(kind)
        return isinstance(value, list) and all(_has_type(item, item_kind) for item in value)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            return False
        key_kind, item_kind = get_args(kind)
        item_kinds = [item_kind]
        if item_kind is float:
            item_kinds.append(int)  # a whole number is a number too
        return all(
            _has_type(key, key_kind) and any(_has_type(item, k) for k in item_kinds)
            for key, item in value.items()
        )
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind


# ---- modules of a model and their paths


def ends_with(path: str, entry: str) -> bool:
    """Return True if `entry` is a module path or its end: "q_proj" in "layers.0.q_proj".

    Args:
        path: Path of a module.
        entry: Complete path or last parts.
    """
    return path == entry or path.endswith(f".{entry}")


def ends_with_any(path: str, entries: Iterable[str]) -> bool:
    """Return True if `ends_with` is true for one of several entries.

    Args:
        path: Path of a module.
        entries: Complete paths or last parts.
    """
    return any(ends_with(path, entry) for entry in entries)


def within(path: str, module: str) -> bool:
    """Return True if `path` is the path of a module or of something inside it.

    Args:
        path: Path of a module or parameter.
        module: Path of the module.
    """
    return f"{path}.".startswith(f"{module}.")


def is_conv1d(module: nn.Module) -> bool:
    """Return True for Conv1D of transformers, a linear layer with a weight of shape (in, out).

    Args:
        module: Any module.
    """
    return hasattr(module, "nx") and hasattr(module, "nf")


def output_layer(model: Any) -> nn.Module | None:
    """Return the layer that computes logits; None if the model cannot name it.

    Args:
        model: A model, with `get_output_embeddings` as in transformers or without it.
    """
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def tied_modules(
    model: nn.Module, originals: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """Return the modules that share their weight, each with the paths of the others.

    Args:
        model: The model. `base_layer` at the end of a path is left out of the result.
        originals: Modules by path that are compared in place of the model's own.
    """
    paths_of_weight: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        module = (originals or {}).get(path, module)
        weight = module._parameters.get("weight")
        if weight is not None:
            path = path.removesuffix(".base_layer")
            paths_of_weight.setdefault(id(weight), []).append(path)
    tied: dict[str, list[str]] = {}
    for group in paths_of_weight.values():
        if len(group) > 1:
            for path in group:
                tied[path] = [other for other in group if other != path]
    return tied
