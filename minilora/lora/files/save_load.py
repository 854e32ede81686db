"""An adapter as a folder in PEFT's format, which vLLM, llama.cpp's converter and others read too.

    adapter_config.json         LoRAConfig, with PEFT's names
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight  fp32 (r, in)
                                base_model.model.<layer>.lora_B.weight  fp32 (out, r)
                                … and what the adapters of other kinds of layers say (embedding_conv.py: `tensors`)
                                base_model.model.<layer>.base_layer.bias, <module>.weight … of trained parts

<layer> is the layer's name in the model; the adapter's own name is not in the file. Reading is strict: PEFT goes on
with a warning, or without one, when keys are missing, left over or not finite, and then computes something else. Beside
an adapted embedding or output layer PEFT writes its base, 100 MB and more, and does not need it: it is compared when
read, and not written.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.common import ends_with, is_conv1d, read_tensors, write_text
from minilora.hub import HUB_ID, download
from minilora.lora.active import check_adapters, disable_adapters, list_adapters, set_adapter
from minilora.lora.config import LoRAConfig
from minilora.lora.embedding_conv import Adapter, unwrapped
from minilora.lora.files.base_check import FORCE, binding, check_binding, hash_tokenizer, read_binding, write_bound
from minilora.lora.inject import adaptable_layers, attach, new_adapters, new_parts
from minilora.lora.modules_to_save import Part
from minilora.lora.registry import lora_configs, lora_layers
from minilora.lora.variants.base import as_plain

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Contents = tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]  # the config's values, tensors, fingerprints


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, fp32; views of the live parameters."""
    check_adapters(model, [name])
    return _keys(model, _adapters(model, name), lora_configs(model).parts.of([name]))


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` as it would be had nothing been injected: plain keys, live tensors, no adapters.

    Of a 4-bit layer bitsandbytes' keys, as NF4Linear writes them. `load_state_dict` takes it before and after inject.
    """
    with disable_adapters(model):
        state = model.state_dict()
    for path, layer in lora_layers(model, remove_duplicate=False).items():
        inside = {f"{path}.{key}" for key in layer.adapters.state_dict(prefix="adapters.")}
        plain = {key: key.replace(f"{path}.base_layer.", f"{path}.", key.startswith(f"{path}.")) for key in state}
        state = {plain[key]: value for key, value in state.items() if key not in inside}
    return state


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, tokenizer: Any = None) -> None:
    """Write the adapter `name` to `folder` in PEFT's format, with fingerprints of the base's layers (base_check.py).

    tokenizer: the one it was trained with, to be told by its hash; by default the one that `train` used.
    An adapter with NaN or infinity raises ValueError.
    """
    write_contents(Path(folder), contents(model, name, tokenizer))


def contents(model: nn.Module, name: str, tokenizer: Any = None) -> Contents:
    """What save_adapter writes; the tensors are live where they can be. Raises as it does."""
    check_adapters(model, [name])
    config, adapters = lora_configs(model).get(name), _adapters(model, name)
    if config is None:
        raise ValueError(f"adapter {name!r} was not made by inject or load_adapter: there is no config to save.")
    if config.begins_from_weight:  # a file of its own would mean another base
        config, adapters = as_plain(config, adapters)
    tensors = _keys(model, adapters, lora_configs(model).parts.of([name]))
    _check_finite(tensors, f"adapter {name!r}")
    values = config.to_dict()
    if config.target_modules is None or config.target_modules == "all-linear":
        values["target_modules"] = _spell_out(model, name)
    values["base_model_name_or_path"] = config.base_model_name_or_path or _source(model)
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    values["fan_in_fan_out"] = any(is_conv1d(layer.base_layer) for layer in layers.values())
    known = lora_configs(model)
    hashes = known.tokenizers.get(name) if tokenizer is None else hash_tokenizer(tokenizer)
    return values, tensors, binding(layers, _source(model), known.seeds.get(name), hashes)


def write_contents(folder: Path, held: Contents) -> None:
    """Write an adapter's two files, each whole or not at all."""
    write_bound(folder / WEIGHTS_FILE, *held[1:])
    write_text(folder / CONFIG_FILE, json.dumps(held[0], indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, allow_untrained: bool = False,
                 check_base: bool = True, tokenizer: Any = None,
                 revision: str | None = None, token: str | None = None) -> list[str]:  # fmt: skip
    """Read an adapter in PEFT's format into `model` and make it the active one; returns its layers' names.

    Args:
        folder: a folder, or the id of a repository on the Hub.
        name: what to call it. If the model has an adapter of this name, that one must have the same layers and
            shapes and takes the file's values.
        allow_untrained: accept an adapter whose every B is zero, which does nothing.
        check_base: False accepts an adapter that was trained on other weights or with another tokenizer.
        tokenizer: the one to be used with it, compared with the one it was saved with.
        revision, token: of a repository on the Hub; by default its main branch, and the token of `hf auth login`.

    Raises ValueError, with the model untouched, if the config asks for what is not supported or not there, if tensors
    are missing, left over, of another shape or not finite, if the adapter does nothing, or if it was trained on another
    base or with another tokenizer (base_check.py; files without fingerprints, such as PEFT's, are not compared).
    OSError if the Hub does not give it.
    """
    held = read_contents(folder, revision, token)
    return put_contents(model, held, name, Path(folder), allow_untrained, check_base, tokenizer)


def read_contents(folder: str | Path, revision: str | None = None, token: str | None = None) -> Contents:
    """What a folder, or a repository on the Hub, holds. Raises as load_adapter."""
    place, _ = find_adapter(folder, revision, token)
    return _read_json(place / CONFIG_FILE), read_tensors(place / WEIGHTS_FILE), read_binding(place / WEIGHTS_FILE)


def put_contents(
    model: nn.Module,
    held: Contents,
    name: str,
    folder: Path,
    allow_untrained: bool = False,
    check_base: bool = True,
    tokenizer: Any = None,
) -> list[str]:
    """load_adapter, of what was read; `folder` is what errors call it."""
    config, tensors, bound = LoRAConfig.from_dict(held[0]), dict(held[1]), held[2]
    adapters = new_adapters(model, config)
    parts = new_parts(model, config, adapters)
    live = _keys(model, adapters, parts)
    extra = {key: tensors.pop(key) for key in [*tensors] if key not in live}
    tensors |= _without_base(model, extra, adapters, folder, check_base)
    _check_keys(tensors, live, folder)
    _check_finite(tensors, str(folder))
    _check_trained(tensors, folder, allow_untrained)
    if check_base:
        check_binding(bound, {path: model.get_submodule(path) for path in adapters}, _source(model), folder, tokenizer)
    _fill(live, tensors, folder)
    if name not in list_adapters(model):
        attach(model, adapters, config, name, parts)
    else:
        existing = _adapters(model, name)
        old, new = ({path: a.scaling for path, a in one.items()} for one in (existing, adapters))
        if old != new or len({*map(id, existing.values())}) != len({*map(id, adapters.values())}):  # shared or not
            raise ValueError(
                f"adapter {name!r} exists with other layers or scaling: delete it, or load by another name."
            )
        there = _keys(model, existing, lora_configs(model).parts.of([name]))
        _check_keys(tensors, there, folder)
        _fill(there, tensors, folder)
        set_adapter(model, name)
    lora_configs(model).seeds[name] = bound.get("seed")
    lora_configs(model).tokenizers[name] = bound.get("tokenizer")
    return list(adapters)


def find_adapter(folder: str | Path, revision: str | None = None, token: str | None = None) -> tuple[Path, LoRAConfig]:
    """A folder here, or a repository's adapter files in the local cache; and its config. Raises as load_adapter."""
    place = Path(folder)
    if not place.is_dir():
        if "/" not in str(folder) or not HUB_ID.fullmatch(str(folder)):
            raise FileNotFoundError(f"{folder}: no such folder. Expected one with {CONFIG_FILE} and {WEIGHTS_FILE}.")
        place = download(str(folder), [CONFIG_FILE, WEIGHTS_FILE], revision, token)
    values = _read_json(place / CONFIG_FILE)
    try:
        config = LoRAConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{place / CONFIG_FILE}: {error}") from error
    if config.begins_from_weight and (how := config.init_lora_weights) != "pissa":  # which finds the same again
        raise ValueError(
            f"{place / CONFIG_FILE}: with init_lora_weights {how!r} PEFT trained beside another base than the named "
            "one, and it is not in the file. Save that base, load it, and set the field to true."
        )
    return place, config


def _adapters(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The adapter's part of each layer that it is on, by the layer's name."""
    layers = lora_layers(model).items()
    return {path: cast(Adapter, layer.adapters[name]) for path, layer in layers if name in layer.adapters}


def _keys(model: nn.Module, adapters: dict[str, Adapter], parts: dict[str, Part]) -> dict[str, Tensor]:
    """PEFT key → the live tensor, for adapters by layer name and trained parts by plain name."""
    keys = {
        f"{path}.{end}": tensor.detach()
        for path, adapter in adapters.items()
        for end, tensor in adapter.tensors(unwrapped(model.get_submodule(path))).items()
    }
    for path, part in parts.items():
        parent, _, leaf = path.rpartition(".")
        if isinstance(part, nn.Module):
            keys |= part.state_dict(prefix=f"{path}.")
        else:
            keys[f"{parent}.base_layer.{leaf}" if parent in adapters else path] = part.detach()
    return {f"{PREFIX}{key}": tensor for key, tensor in keys.items()}


def _without_base(
    model: nn.Module, tensors: dict[str, Tensor], adapters: Iterable[str], folder: Path, check: bool
) -> dict[str, Tensor]:
    """`tensors` but the adapted layers' own weights. ValueError if one is not the model's in the coarser dtype."""
    rest = dict(tensors)
    for path in adapters:
        for leaf, own in unwrapped(model.get_submodule(path)).named_parameters(recurse=False):
            found = rest.pop(key := f"{PREFIX}{path}.base_layer.{leaf}", None)
            if found is None or not check:
                continue
            remedy = f"Load the base that it was trained on, or {FORCE}: {path}'s own is then used."
            if found.shape != own.shape or not found.is_floating_point():
                raise ValueError(f"{folder}: {key} is {tuple(found.shape)}, the model's {tuple(own.shape)}. {remedy}")
            coarse = max(found.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            theirs, ours = found.to(coarse), own.detach().cpu().to(coarse)
            if len(places := (theirs != ours).nonzero()):
                at = tuple(places[0].tolist())
                raise ValueError(f"{folder}: {key}{list(at)} is {theirs[at]}, the model's {ours[at]}. {remedy}")
    return rest


def _fill(live: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy into the live tensors, some of which share memory (tie="shared"). ValueError if those are not equal."""
    for key, tensor in live.items():
        tensor.copy_(tensors[key])
    if apart := [key for key, tensor in live.items() if not torch.equal(tensor, tensors[key].to(tensor))]:
        raise ValueError(
            f"{folder}: ensure_weight_tying is set, but {apart[0]} is not the update of the weight it is "
            "tied to. Set it to false and name all of them in target_modules or modules_to_save, to load them untied."
        )


def _check_keys(tensors: dict[str, Tensor], live: dict[str, Tensor], folder: Path) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in live.items()}
    problems = [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key} {tuple(t.shape)}" for key, t in tensors.items() if key not in expected]
    for key, shape in expected.items():
        if key in tensors and (tuple(tensors[key].shape) != shape or not tensors[key].is_floating_point()):
            found = f"{tuple(tensors[key].shape)} {tensors[key].dtype}"
            problems.append(f"wrong shape or dtype: {key}: expected {shape}, got {found}")
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} tensors do not fit the config and the model. {'; '.join(problems[:3])}. "
            f"Load it into the model it was trained on, with its own {CONFIG_FILE}."
        )


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{where}: {len(bad)} tensors hold NaN or infinity, first {bad[0]}. Training diverged.")


def _check_trained(tensors: dict[str, Tensor], folder: Path, allow_untrained: bool) -> None:
    ups = [key for key in tensors if key.endswith(("lora_B.weight", "lora_embedding_A"))]  # what starts at zero,
    also = {key: key.replace("lora_B.weight", "lora_B.bias") for key in ups}  # with what else may be there
    zero = [key for key in ups if not tensors[key].any() and not tensors.get(also[key], tensors[key]).any()]
    if zero and len(zero) < len(ups):
        warnings.warn(f"{folder}: {len(zero)} of {len(ups)} lora_B are all zero and do nothing: {zero}.", stacklevel=4)
    only_lora = all(".lora_" in key for key in tensors)  # else a module or bias may be all that trained
    if len(zero) == len(ups) and only_lora and not allow_untrained:
        raise ValueError(f"{folder}: every lora_B is zero: an untrained adapter. Pass allow_untrained=True to load it.")


def _spell_out(model: nn.Module, name: str) -> list[str]:
    """The adapter's targets as the shortest list: ends of names if they fit nothing else, else whole names."""
    paths = [path for path, layer in lora_layers(model).items() if name in layer.adapters]
    ends = sorted({path.rpartition(".")[2] for path in paths})
    fitting = {path for path in adaptable_layers(model) if any(ends_with(path, end) for end in ends)}
    return ends if fitting == set(paths) else sorted(paths)


def _source(model: nn.Module) -> str | None:
    """Where the base came from: Hub id or folder, as load_model and transformers note it on the model."""
    return (
        getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    )


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. An adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values
