"""The storage of a base: dense, in 4 bits with one or two levels of scales, or as in its file.

An adapter learns to correct the weights that it is trained on, the errors of 4 bits included. On
the same base in another storage it corrects slightly other weights. Therefore an adapter file
states the storage of its base:

    {"quantize": null}                                              dense
    {"quantize": "nf4", "blocksize": 64, "double_quant": true}      4 bits
    {"quantize": "keep"}                                            the bytes of its GGUF file
    {"quantize": "several kinds"}                                   layers that differ
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from minilora.common import named_modules
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantized_linear import QuantizedLinear

Storage = dict[str, Any]
DENSE: Storage = {"quantize": None}
_NF4 = "nf4/"  # begins the kind of a 4-bit layer in the files of earlier versions


def base_storage(model: nn.Module) -> Storage:
    """Return the storage of a model's linear layers. Layers that stay dense do not count.

    Args:
        model: Any model, also one with 4-bit or 8-bit layers of bitsandbytes.
    """
    kinds: list[Storage] = []
    for _, module in named_modules(model):
        storage = _layer_storage(module)
        if storage is not None and storage not in kinds:
            kinds.append(storage)
    if not kinds:
        return DENSE
    if len(kinds) > 1:
        return {"quantize": "several kinds"}
    return kinds[0]


def _layer_storage(module: Any) -> Storage | None:
    """Return the storage of a quantised layer; None for every other module."""
    if isinstance(module, QuantizedLinear):
        return module.storage()
    if type(module).__module__.partition(".")[0] != "bitsandbytes":
        return None
    if type(module).__name__ == "Linear8bitLt":
        return {"quantize": "int8"}
    if type(module).__name__ == "Linear4bit":
        weight = module.weight
        return {
            "quantize": weight.quant_type,
            "blocksize": weight.blocksize,
            "double_quant": weight.compress_statistics,
        }
    return None


def stored_storage(metadata: dict[str, Any]) -> Storage | None:
    """Return the storage that the metadata of an adapter file states; None if it states none.

    Files of earlier versions have the kind of each adapted layer, without its levels of scales.

    Args:
        metadata: The metadata of the file, from `read_binding`.
    """
    storage = metadata.get("storage")
    if isinstance(storage, dict):
        return storage
    kinds = {entry[0].removeprefix("gguf-") for entry in metadata.get("layers", {}).values()}
    if not kinds:
        return None
    block_sizes = {kind.removeprefix(_NF4) for kind in kinds if kind.startswith(_NF4)}
    if not block_sizes:
        return DENSE
    if len(block_sizes) > 1:
        return {"quantize": "several kinds"}
    return {"quantize": "nf4", "blocksize": int(block_sizes.pop()), "double_quant": None}


def same_storage(one: Storage, other: Storage) -> bool:
    """Return True if two storages are the same; a double_quant of None fits both.

    Args:
        one: A storage.
        other: Another storage.
    """
    for name in one.keys() | other.keys():
        values = [one.get(name), other.get(name)]
        unknown = name == "double_quant" and None in values and one.get("quantize") is not None
        if values[0] != values[1] and not unknown:
            return False
    return True


def common_storage(storages: Iterable[Storage | None]) -> Storage | None:
    """Return the storage that all known ones share, or None.

    Args:
        storages: Storages of several adapters; None where it is unknown.
    """
    known = [storage for storage in storages if storage is not None]
    if not known or not all(same_storage(known[0], other) for other in known):
        return None
    return known[0]


def describe(storage: Storage) -> str:
    """Return a storage in words.

    Args:
        storage: A storage.
    """
    kind = storage["quantize"]
    if kind is None:
        return "dense"
    if kind == "keep":
        return "in the bits of its GGUF file"
    if "blocksize" not in storage:
        return f"quantised ({kind})"
    scales = {True: ", double quantisation", False: ", without double quantisation", None: ""}
    return f"in {kind.upper()} (block size {storage['blocksize']}{scales[storage['double_quant']]})"


def remedy(storage: Storage) -> str:
    """Return how a base is loaded in a storage, as a sentence.

    Args:
        storage: A storage.
    """
    if storage["quantize"] is None:
        return "Load the base without quantize."
    if storage["quantize"] == "keep":
        return 'Load the GGUF file with quantize="keep" (ml.load_model).'
    if storage["quantize"] != "nf4":
        return "Quantise the base as it was quantised for training."
    options = (
        f"blocksize={storage['blocksize']}, double_quant={storage['double_quant'] is not False}"
    )
    return (
        f'Load the base with quantize="nf4", {options} (ml.load_model), or call '
        f"ml.quantize_model(model, {options}) before load_adapter."
    )


def bitsandbytes_config(model: nn.Module, dtype: str) -> dict[str, Any]:
    """Return the fields of transformers' BitsAndBytesConfig.

    A list of exceptions replaces transformers' default, which is the head alone.

    Args:
        model: A model with 4-bit layers.
        dtype: Name of the dtype of the computation, such as "bfloat16".
    """
    dense = set()
    double_quant = False
    for name, module in named_modules(model):
        if isinstance(module, nn.Linear):
            dense.add(name.removesuffix(".base_layer"))
        elif isinstance(module, NF4Linear) and module.weight.double_quant:
            double_quant = True
    skip = None
    if dense - {"lm_head"}:
        skip = sorted({*dense, "lm_head"})
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip,
    }
