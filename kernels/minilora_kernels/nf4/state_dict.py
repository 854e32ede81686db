"""The checks of an NF4 weight that is read from a state dict; nf4/weight.py lists its keys."""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minilora_kernels.nf4.reference import NESTED_BLOCKSIZE

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
JSON_KEY = "quant_state.bitsandbytes__nf4"
NESTED_FIELDS = {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}


def entries_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries of one parameter, with the prefix cut off; its own name becomes ''.

    Args:
        state: Tensors by key.
        prefix: Name of the parameter.
    """
    entries = {}
    for key, tensor in state.items():
        if key == prefix or key.startswith(prefix + "."):
            entries[key[len(prefix) :].lstrip(".")] = tensor
    return entries


def check_keys(entries: Mapping[str, Tensor], nested: bool, prefix: str) -> None:
    """Raise ValueError unless the entries have exactly the keys of the format.

    Args:
        entries: The entries of one parameter, as entries_of returns them.
        nested: True for double quantisation.
        prefix: Name of the parameter, for the message.
    """
    names = {"", "absmax", "quant_map", JSON_KEY}
    if nested:
        names |= {"nested_absmax", "nested_quant_map"}
    missing = sorted(names - set(entries))
    unexpected = sorted(set(entries) - names)
    if missing or unexpected:
        raise ValueError(
            f"NF4 state of {prefix!r}: missing {missing}, unexpected {unexpected}; expected "
            f"exactly {sorted(names)} after the name ('' is the name itself); load the complete "
            "file in which it was saved"
        )


def check_table(entries: Mapping[str, Tensor], name: str, table: Tensor, prefix: str) -> None:
    """Raise ValueError unless the entry is the standard table.

    Args:
        entries: The entries of one parameter, as entries_of returns them.
        name: Name of the entry.
        table: The standard table, fp32.
        prefix: Name of the parameter, for the message.
    """
    entry = entries[name]
    if entry.dtype != torch.float32 or not torch.equal(entry.cpu(), table):
        raise ValueError(
            f"NF4 state: {prefix}.{name} is not the standard table; only the standard table is "
            "supported"
        )


def finite_floats(entries: Mapping[str, Tensor], name: str, prefix: str) -> Tensor:
    """Return the entry as a contiguous tensor; raise ValueError unless it is finite fp32.

    Args:
        entries: The entries of one parameter, as entries_of returns them.
        name: Name of the entry.
        prefix: Name of the parameter, for the message.
    """
    tensor = entries[name]
    finite = tensor.is_meta or torch.isfinite(tensor).all()
    if tensor.dtype != torch.float32 or not finite:
        raise ValueError(
            f"NF4 state: expected {prefix}.{name} to be finite fp32, got {tensor.dtype}; the file "
            "is damaged"
        )
    return tensor.contiguous()


def read_info(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return the JSON entry with every field checked.

    Args:
        entries: The entries of one parameter, as entries_of returns them.
        prefix: Name of the parameter, for the message.

    Raises:
        ValueError: If the entry is missing, is not JSON, or a field is missing or wrong.
    """
    info = _parse_json(entries, prefix)
    nested = isinstance(info, dict) and "nested_offset" in info
    fixed: dict[str, Any] = {"quant_type": "nf4"}
    names = {"quant_type", "blocksize", "dtype", "shape"}
    if nested:
        fixed |= NESTED_FIELDS
        names |= {*NESTED_FIELDS, "nested_offset"}
    if not isinstance(info, dict) or set(info) != names:
        raise ValueError(
            f"NF4 state: expected the JSON fields {sorted(names)} in {prefix}.{JSON_KEY}, got "
            f"{info}"
        )
    fixed_ok = all(info[name] == value for name, value in fixed.items())
    dtype_ok = info["dtype"] in list(DTYPES)
    offset_ok = not nested or _is_finite_number(info["nested_offset"])
    if not (fixed_ok and dtype_ok and _is_list_of_sizes(info["shape"]) and offset_ok):
        raise ValueError(
            f"NF4 state: {prefix}.{JSON_KEY} is {info}; expected {fixed}, a dtype of "
            f"{sorted(DTYPES)}, a list of sizes as shape and a finite offset"
        )
    return info


def _parse_json(entries: Mapping[str, Tensor], prefix: str) -> Any:
    """Return the parsed JSON entry."""
    if JSON_KEY not in entries:
        raise ValueError(
            f"NF4 state of {prefix!r}: expected the key {prefix}.{JSON_KEY}, got "
            f"{sorted(entries) or 'no key of it'}; other 4-bit types (fp4) are not supported: "
            "dequantise with bitsandbytes and quantise again"
        )
    try:
        return json.loads(bytes(entries[JSON_KEY].tolist()))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"NF4 state: {prefix}.{JSON_KEY} is not JSON text ({error}); the file is damaged"
        ) from error


def _is_list_of_sizes(shape: Any) -> bool:
    """Return True for a list of integers that are not negative."""
    if not isinstance(shape, list):
        return False
    return all(type(size) is int and size >= 0 for size in shape)


def _is_finite_number(value: Any) -> bool:
    """Return True for an int or a finite float; a bool is neither."""
    return type(value) in (int, float) and abs(value) < math.inf
