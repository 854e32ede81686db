"""Atomic file writes and safetensors I/O, name suggestions, checked dataclass fields, module paths, the version.

A file is whole or absent: write to a temporary name, fsync, rename. A crash at any moment leaves the old file or
the new one. Nothing here reads or writes pickle.
"""

import difflib
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor, nn

__version__ = "0.1.0"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder at; it takes the place of `path` on leaving.

    An exception removes it and leaves what was at `path`. A folder at `path` is replaced by the new one, in two
    renames: a crash between them leaves both beside `path`, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old.tmp"))
    _remove(temporary)  # left over from a crash
    try:
        with naming(path):
            yield temporary
        for part in [temporary, *temporary.rglob("*")]:
            _fsync(part)
        if path.is_dir():  # a folder cannot be renamed over another
            _remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)
        _remove(old)
    finally:
        _remove(temporary)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError says where: that of a write, such as to a full disk, does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.errno, error.strerror = error.errno or errno.EIO, error.strerror or str(error)
            error.filename = str(path)
        raise


@contextmanager
def together(folder: Path, index: Path) -> Iterator[Path]:
    """A temporary folder to write files in, which move to `folder` on leaving. `index`, which tells a reader of them,
    is removed before the first one moves: a crash leaves the old files, the new ones, or no index, never a mixture."""
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
    """Write a UTF-8 text file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; keys sorted, so that equal tensors give equal bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as temporary:
        contiguous: dict[str, Tensor] = {}
        places: set[int] = set()  # in memory: safetensors refuses what stands under two names
        for key in sorted(tensors):
            tensor = tensors[key].detach().contiguous()
            contiguous[key] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(tensor.data_ptr())
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. ValueError if it is damaged or cut off, FileNotFoundError if there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}). Copy or download it again.") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of the candidates that look most like `name`, best first; module paths also match by last part."""
    candidates = list(dict.fromkeys(candidates))
    by_tail = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    found = difflib.get_close_matches(name, candidates, n) or difflib.get_close_matches(name, by_tail, n)
    return found or sorted(by_tail)[:n]


def unknown(kind: str, name: str, candidates: Iterable[str]) -> ValueError:
    """A ValueError that says what was unknown and what was probably meant."""
    candidates = list(candidates)
    hint = f"Nearest: {', '.join(map(repr, nearest(name, candidates)))}." if candidates else "There are none."
    return ValueError(f"{kind}: {name!r} matches nothing. {hint}")


_WORDS: dict[Any, str] = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}


_WORDS |= {list[str]: "a list of names", list[int]: "a list of whole numbers"}


_WORDS |= {dict[str, int]: "a dict of whole numbers", dict[str, float]: "a dict of finite numbers"}


def option(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf,
           below: float = math.inf, choices: tuple = ()) -> Any:  # fmt: skip
    """A field whose value v obeys low <= v <= high, above < v < below (in a dict each value), and v in choices if
    there are any."""
    bounds = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    start: dict[str, Any] = {"default_factory": dict} if default == {} else {"default": default}
    return field(**start, metadata={"help": help} | bounds)


def check_options(config: Any) -> None:
    """Bring the `option` fields of a frozen dataclass to their types, or raise ValueError for one out of its range."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        if "choices" in f.metadata:
            object.__setattr__(config, f.name, _checked(f.name, getattr(config, f.name), hints[f.name], f.metadata))


def _checked(name: str, value: Any, hint: Any, rules: Any) -> Any:
    """The value in its field's type (int → float, path → str), or a ValueError."""
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if str in allowed and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if float in allowed and type(value) is int:
        value = float(value)
    kinds = [kind for kind in allowed if kind is not type(None)]
    if not any(_is(value, kind) for kind in kinds):
        names = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(f"{name}: expected {names}, got {value!r}. It is: {rules['help']}.")
    if rules["choices"] and value not in rules["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, rules['choices']))}, got {value!r}.")
    for number in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        if not (rules["low"] <= number <= rules["high"] and rules["above"] < number < rules["below"]):
            signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
            limits = " and ".join(f"{sign} {rules[key]:g}" for key, sign in signs.items() if math.isfinite(rules[key]))
            raise ValueError(f"{name}: expected {limits}, got {number!r}. It is: {rules['help']}.")
    return value


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`, and so is what it holds; a whole number in a dict may stand for any."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, *get_args(kind)) for item in value)
    if get_origin(kind) is dict:
        of, to = get_args(kind)
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_is(key, of) and (_is(item, to) or (to is float and _is(item, int))) for key, item in pairs)
    return type(value) is kind and (kind is not float or math.isfinite(value))


def ends_with(path: str, entry: str) -> bool:
    """Whether `entry` is the module path or its last parts: "q_proj" fits "layers.0.q_proj", not "layers.0.xq_proj"."""
    return path == entry or path.endswith(f".{entry}")


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with its weight stored as (in, out)."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits, where the model says which it is."""
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def within(path: str, module: str) -> bool:
    """Whether `path` is the module or something in it."""
    return f"{path}.".startswith(f"{module}.")


def tied_modules(model: nn.Module, originals: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """Modules whose weight stands under another plain name too → those names.

    originals: by path what stands in the place of a module of the model, for the comparison.
    """
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = (originals or {}).get(path, module)._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(path.removesuffix(".base_layer"))
    groups = [group for group in holders.values() if len(group) > 1]
    return {path: [name for name in group if name != path] for group in groups for path in group}
