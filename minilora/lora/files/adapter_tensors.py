"""The tensors of an adapter file: their names, and the checks of the tensors that were read.

    base_model.model.<layer>.lora_A.weight      fp32 (r, in)
    base_model.model.<layer>.lora_B.weight      fp32 (out, r)
    …                                           of other kinds of adapters: their method `tensors`
    base_model.model.<layer>.base_layer.bias    a bias that trains with the adapter
    base_model.model.<module>.weight, …         a module that trains with the adapter
    base_model.model.<layer>.token_adapter.…    rows of single tokens that train

<layer> is the name of the layer in the model. The name of the adapter is not in the file.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.common import get_submodule
from minilora.lora.embedding_conv import Adapter, unwrapped
from minilora.lora.files.base_check import FORCE
from minilora.lora.files.key_names import likely_cause
from minilora.lora.trained_parts.modules_to_save import Part
from minilora.lora.trained_parts.trained_tokens import KEY, TrainedTokens

PREFIX = "base_model.model."


def named_tensors(
    model: nn.Module, adapters: Mapping[str, Adapter], parts: Mapping[str, Part]
) -> dict[str, Tensor]:
    """Return the live tensors of an adapter under PEFT's names.

    Args:
        model: The model.
        adapters: The adapters by layer name.
        parts: Copies of modules and biases that train with them, by name.
    """
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        base = unwrapped(get_submodule(model, path))
        for end, tensor in adapter.tensors(base).items():
            tensors[f"{path}.{end}"] = tensor.detach()
    token_rows: set[int] = set()
    for path, part in parts.items():
        if isinstance(part, TrainedTokens):
            if id(part.token_rows) not in token_rows:  # not again for a layer that shares them
                tensors[f"{path}.{KEY}"] = part.token_rows.rows.detach()
            token_rows.add(id(part.token_rows))
            continue
        if isinstance(part, nn.Module):
            tensors |= part.state_dict(prefix=f"{path}.")
            continue
        parent, _, leaf = path.rpartition(".")
        key = path
        if parent in adapters:
            key = f"{parent}.base_layer.{leaf}"
        elif isinstance(parts.get(parent), TrainedTokens):
            key = f"{parent}.token_adapter.base_layer.{leaf}"
        tensors[key] = part.detach()
    return {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}


def base_weight_names(model: nn.Module, adapters: Iterable[str]) -> list[str]:
    """Return the names in a file of the weights of the adapted layers themselves.

    Args:
        model: The model.
        adapters: Names of the adapted layers.
    """
    names: list[str] = []
    for path in adapters:
        base = unwrapped(get_submodule(model, path))
        for leaf, _ in base.named_parameters(recurse=False):
            names.append(f"{PREFIX}{path}.base_layer.{leaf}")
    return names


def without_base_weights(
    model: nn.Module,
    tensors: dict[str, Tensor],
    adapters: Iterable[str],
    folder: Path,
    check: bool,
) -> dict[str, Tensor]:
    """Return tensors without the weights of the adapted layers themselves.

    PEFT writes the base of an adapted embedding or output layer into the file.

    Args:
        model: The model.
        tensors: Tensors of the file that do not belong to the adapter.
        adapters: Names of the adapted layers.
        folder: The adapter's folder, for messages.
        check: Compare these weights with the model's.

    Raises:
        ValueError: A weight differs from the model's, compared in the coarser of the two dtypes.
    """
    rest = dict(tensors)
    for path in adapters:
        base = unwrapped(get_submodule(model, path))
        for leaf, own in base.named_parameters(recurse=False):
            key = f"{PREFIX}{path}.base_layer.{leaf}"
            stored = rest.pop(key, None)
            if check and stored is not None:
                check_base_weight(key, stored, own, path, folder)
    return rest


def check_base_weight(key: str, stored: Tensor, own: Tensor, path: str, folder: Path) -> None:
    """Check that a weight of the base in the file is the model's.

    Args:
        key: Name of the weight in the file.
        stored: The weight in the file.
        own: The weight of the model.
        path: Path of its layer.
        folder: The adapter's folder, for messages.

    Raises:
        ValueError: They differ, compared in the coarser of the two dtypes.
    """
    remedy = (
        f"Load the base that it was trained on, or {FORCE}: "
        f"the model's own weight of {path} is then used."
    )
    if stored.shape != own.shape or not stored.is_floating_point():
        raise ValueError(
            f"{folder}: {key} is {tuple(stored.shape)}, the model's {tuple(own.shape)}. {remedy}"
        )
    coarser = max(stored.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    stored = stored.to(coarser)
    own = own.detach().cpu().to(coarser)
    different = (stored != own).nonzero()  # (count, dimensions)
    if len(different):
        index = tuple(different[0].tolist())
        raise ValueError(
            f"{folder}: {key}{list(index)} is {stored[index]}, the model's {own[index]}. {remedy}"
        )


def fill(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the values of a file into the live tensors.

    Args:
        live: Tensors of the model by name. With tie="shared" some of them share memory.
        tensors: Tensors of the file by name.
        folder: The adapter's folder, for messages.

    Raises:
        ValueError: Live tensors share memory, but their values in the file differ.
    """
    for key, tensor in live.items():
        tensor.copy_(tensors[key])
    for key, tensor in live.items():
        if not torch.equal(tensor, tensors[key].to(tensor)):
            raise ValueError(
                f"{folder}: ensure_weight_tying is set, but {key} is not the update of the weight "
                "it is tied to. Set it to false and name all of them in target_modules or "
                "modules_to_save, to load them untied."
            )


def check_names_and_shapes(
    model: nn.Module, tensors: Mapping[str, Tensor], live: Mapping[str, Tensor], folder: Path
) -> None:
    """Check that a file has exactly the tensors that the model expects.

    Args:
        model: The model, for the message.
        tensors: Tensors of the file by name.
        live: Tensors of the model by name.
        folder: The adapter's folder, for messages.

    Raises:
        ValueError: A tensor is missing or unexpected, or has another shape or an integer dtype.
    """
    missing = [key for key in live if key not in tensors]
    unexpected = [key for key in tensors if key not in live]
    wrong: list[str] = []
    for key, own in live.items():
        tensor = tensors.get(key, own)
        if tensor.shape != own.shape or not tensor.is_floating_point():
            wrong.append(
                f"{key}: expected {tuple(own.shape)}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    problems: list[str] = []
    if missing:
        problems.append(f"{len(missing)} missing: {missing[0]}")
    if unexpected:
        shape = tuple(tensors[unexpected[0]].shape)
        problems.append(f"{len(unexpected)} unexpected: {unexpected[0]} {shape}")
    if wrong:
        problems.append(f"{len(wrong)} of wrong shape or dtype: {wrong[0]}")
    if not problems:
        return
    cause = "Cause: the config has another rank than the file, or the model has another width."
    if missing or unexpected:
        cause = likely_cause(model, missing, unexpected)
    count = len(missing) + len(unexpected) + len(wrong)
    raise ValueError(
        f"{folder}: {count} tensors do not fit the config and the model: {'; '.join(problems)}. "
        f"{cause} Load the adapter into the model it was trained on, "
        "with its own adapter_config.json."
    )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that no tensor contains NaN or infinity.

    Args:
        tensors: Tensors by name.
        where: The adapter or folder, for the message.

    Raises:
        ValueError: A tensor contains NaN or infinity.
    """
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(
            f"{where}: {len(bad)} tensors hold NaN or infinity, first {bad[0]}. "
            "The training diverged: use an earlier checkpoint, or train with a lower learning rate."
        )


def check_not_sharded(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that no tensor is one shard of several, as FSDP leaves them outside a forward pass.

    Args:
        tensors: Tensors by name.
        where: The adapter, for the message.

    Raises:
        ValueError: A tensor is a shard.
    """
    for key, tensor in tensors.items():
        flat = key.endswith(("lora_A.weight", "lora_B.weight")) and tensor.dim() < 2  # FSDP1
        if flat or hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{where}: {key} is one shard of a tensor. Save in the block `with "
                "FullyShardedDataParallel.summon_full_params(model):`; with fully_shard, call "
                "unshard() on every sharded module first; or shard by TrainConfig(fsdp=True), after "
                "which the model is whole."
            )


def check_trained(tensors: Mapping[str, Tensor], folder: Path, allow_untrained: bool) -> None:
    """Check that an adapter does something; warn if a part of it does nothing.

    Args:
        tensors: Tensors of the file by name.
        folder: The adapter's folder, for messages.
        allow_untrained: Accept an adapter that does nothing.

    Raises:
        ValueError: Every B is zero, and nothing else trains with the adapter.
    """
    starts_at_zero = [key for key in tensors if key.endswith(("lora_B.weight", "lora_embedding_A"))]
    zero = []
    for key in starts_at_zero:
        bias_key = key.replace("lora_B.weight", "lora_B.bias")
        bias = tensors.get(bias_key, tensors[key])
        if not tensors[key].any() and not bias.any():
            zero.append(key)
    if zero and len(zero) < len(starts_at_zero):
        warnings.warn(
            f"{folder}: {len(zero)} of {len(starts_at_zero)} lora_B are all zero and do nothing: "
            f"{zero}.",
            stacklevel=4,  # the caller of load_adapter
        )
    only_lora = all(".lora_" in key for key in tensors)  # no module or bias that trains too
    if len(zero) == len(starts_at_zero) and only_lora and not allow_untrained:
        raise ValueError(
            f"{folder}: every lora_B is zero: an untrained adapter. "
            "Pass allow_untrained=True to load it."
        )
