"""Names of tensors in the files of wrapped models, and their names in the model at hand.

A file names each tensor by the path of its layer. The path contains the wrappers that were around
the model when the adapter was saved:

    base_model.model.model._orig_mod.layers.0.q_proj.lora_A.weight           torch.compile
    base_model.model.model.layers.0._checkpoint_wrapped_module.q_proj.…      checkpointing, FSDP
    model.layers.0.q_proj.lora_A.default.weight                              PEFT's model in memory
    base_model.model.model.language_model.layers.0.q_proj.lora_A.weight      a model with pictures

The core of a name is the name without these parts. If the cores of a file and of the model are the
same, each exactly once, the tensors are renamed. Otherwise the file does not fit the model.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

# Parts of a path that a wrapper adds, or that name the model inside another one.
_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "base_model",
        "language_model",
        "model",
        "module",
    }
)
# PEFT's model in memory has the name of the adapter after the name of the parameter.
_ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta)\.([^.]+)(\.weight|\.bias)?$"
)
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+")


def core_name(name: str, model: nn.Module) -> str:
    """Return the name of a tensor or module without wrappers and without the adapter's name.

    Args:
        name: Name of a tensor in a file, or path of a module.
        model: The model. Its `base_model_prefix` counts as a wrapper, as in transformers.
    """
    wrappers = _WRAPPERS | {str(getattr(model, "base_model_prefix", ""))}
    name = _SAVED_MODULE.sub("", name)
    match = _ADAPTER_NAME.search(name)
    if match is not None:
        parameter, adapter_name, suffix = match.groups()
        if parameter == "lora_magnitude_vector":
            suffix = ""  # a plain name in the file
        elif adapter_name in ("weight", "bias") and suffix is None:
            suffix = f".{adapter_name}"  # there is no adapter's name
        name = f"{name[: match.start()]}.{parameter}{suffix or ''}"
    parts = [part for part in name.split(".") if part not in wrappers]
    return ".".join(parts)


def with_model_names(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    required: Iterable[str],
    optional: Iterable[str],
    folder: Path,
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names of the model, if all of them can be renamed.

    A warning reports the renaming. If one name has no counterpart or several, nothing is renamed.

    Args:
        model: The model.
        tensors: Tensors of the file by name.
        required: Names of the model's tensors that the file must have.
        optional: Names of tensors that it may have.
        folder: The adapter's folder, for messages.
    """
    required = list(required)
    known = [*required, *optional]
    if set(required) <= tensors.keys() <= set(known):
        return dict(tensors)
    by_core = {core_name(name, model): name for name in known}
    new_names = {name: by_core.get(core_name(name, model)) for name in tensors}
    found = set(new_names.values())
    one_to_one = len(by_core) == len(set(known)) and len(found) == len(new_names)
    if None in found or not one_to_one or not set(required) <= found:
        return dict(tensors)
    first = next(name for name in new_names if new_names[name] != name)
    warnings.warn(
        f"{folder}: the adapter was saved from a wrapped model. All {len(tensors)} tensors have "
        f"their counterpart here and are renamed, as {first} to {new_names[first]}.",
        stacklevel=4,  # the caller of load_adapter
    )
    return {str(new_names[name]): tensor for name, tensor in tensors.items()}


def likely_cause(model: nn.Module, missing: list[str], unexpected: list[str]) -> str:
    """Return a sentence about the probable reason for names that do not fit.

    Args:
        model: The model.
        missing: Names of the model's tensors that the file does not have.
        unexpected: Names of the file's tensors that the model does not have.
    """
    if not unexpected:
        return (
            "Cause: the file is incomplete, or the model has more layers than the one that the "
            "adapter was trained on."
        )
    if not missing:
        return (
            "Cause: the model has fewer layers than the one that the adapter was trained on, or "
            "the config does not name all that was trained."
        )
    cores = {core_name(name, model) for name in unexpected}
    common = [name for name in missing if core_name(name, model) in cores]
    if common:
        return (
            f"Cause: {len(common)} of the missing tensors are in the file under other names (with "
            "or without a wrapper), but the rest is not: the model is another part of the one that "
            "the adapter was trained on."
        )
    return "Cause: the layers have other names here: the adapter belongs to another kind of model."
