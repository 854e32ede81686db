"""Save a model as a folder that transformers, vLLM and llama.cpp's converter load: config.json and safetensors.

With merge=True each layer is made dense as it is written, W' = W + Σ s · B A in fp32, rounded once, so that no second
model is ever in memory: beyond the model it takes one tensor. A safetensors file is, for that reason, written here:

    u64 length of the header · header, JSON: name -> dtype, shape, [begin, end) in the data · data, tensor by tensor

Files replace what the folder held one by one, each whole or not at all; weight files of an earlier save are removed.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.merge import merged_weight
from minilora.lora import LoRALayer
from minilora.models.decoder import CausalLM
from minilora.quant import NF4Linear
from minilora.storage import whole, write_text

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file to be; `make` computes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` to `folder`; transformers loads it with equal logits.

    merge: fold the active adapters in and make 4-bit layers dense; without it, a model that has any is refused.
    dtype: of all tensors; default each tensor's own, and for a 4-bit layer the dtype it computes in.
    tokenizer: saved beside the model (its `save_pretrained` is called).
    shard_bytes: size above which the weights go to several files.
    Raises ValueError for what cannot be saved so, and when a value leaves the range of `dtype`.
    """
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"save_model writes models of load_model, got {type(model).__name__}. A transformers model: "
            "ml.merge(model).save_pretrained(folder); an adapter alone: ml.save_adapter(model, folder)."
        )
    if dtype is not None and dtype not in _CODES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _CODES))}, got {dtype}.")
    _check_mergeable(model, merge)
    head = model.lm_head  # an adapter on it unties: what is true of the weights counts, not what the config said
    tied = isinstance(head, nn.Linear) and head.weight is model.model.embed_tokens.weight
    entries = [entry for entry in _entries(model, "", dtype) if not (tied and entry.name == "lm_head.weight")]
    shards = _shards(entries, shard_bytes)
    folder = Path(folder)
    for file, shard in shards.items():
        _write(folder / file, shard)
    embedding = next(entry for entry in entries if entry.name == "model.embed_tokens.weight")
    config = replace(model.config, tie_word_embeddings=tied, dtype=str(embedding.dtype).removeprefix("torch."))
    write_text(folder / "config.json", json.dumps(config.to_hf(), indent=2, sort_keys=True) + "\n")
    if len(shards) > 1:
        places = {entry.name: file for file, shard in shards.items() for entry in shard}
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": places}
        write_text(folder / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    for stale in [*folder.glob("model-*.safetensors"), folder / "model.safetensors", folder / _INDEX]:
        if stale.name not in shards and not (stale.name == _INDEX and len(shards) > 1):
            stale.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _check_mergeable(model: nn.Module, merge: bool) -> None:
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    in_4_bits = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    if (adapted or in_4_bits) and not merge:
        what = f"{len(adapted)} layers with adapters" if adapted else f"{len(in_4_bits)} layers in 4 bits"
        raise ValueError(
            f"the model has {what} (first {(adapted or in_4_bits)[0]}), which a plain checkpoint cannot hold. "
            "Pass merge=True to write dense weights, or ml.save_adapter(model, folder) for the adapter alone."
        )
    if adapted and not any(isinstance(m, LoRALayer) and m.active for m in model.modules()):
        raise ValueError("no adapter is active, so none would be merged: ml.use_adapter or ml.eject first.")


def _entries(module: nn.Module, prefix: str, dtype: torch.dtype | None) -> Iterator[_Entry]:
    """Every tensor under its plain name, adapters merged and 4-bit layers dense."""
    if isinstance(module, LoRALayer | NF4Linear):
        base: Any = module.base_layer if isinstance(module, LoRALayer) else module
        own = base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
        shape = (base.out_features, base.in_features)
        yield _Entry(f"{prefix}weight", shape, dtype or own, lambda: merged_weight(module))
        parameters = {} if base.bias is None else {"bias": base.bias}
    else:
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, child in module.named_children():
            yield from _entries(child, f"{prefix}{name}.", dtype)
    for name, value in parameters.items():
        yield _Entry(f"{prefix}{name}", tuple(value.shape), dtype or value.dtype, value.detach)


def _shards(entries: list[_Entry], limit: int) -> dict[str, list[_Entry]]:
    """File name -> its tensors, in the model's order; a tensor larger than `limit` gets a file of its own."""
    groups: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": entries}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


@torch.no_grad()
def _write(path: Path, entries: list[_Entry]) -> None:
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned to its item size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.make().to(entry.dtype)
            if not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"{entry.name} holds NaN or infinity in {entry.dtype}: nothing was written to {path}.")
            file.write(tensor.contiguous().flatten().cpu().view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
