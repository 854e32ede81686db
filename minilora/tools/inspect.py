"""Description of a model folder, GGUF file or adapter folder from its headers.

For an adapter the description contains the spectrum of every layer's update. An update s · B A has
rank at most r, so its singular values σ are those of an (r, r) matrix, and the update itself is
never formed:

    B = Q_B R_B,  Aᵀ = Q_A R_A,  s R_B R_Aᵀ = U diag(σ) Vᵀ   =>   s B A = (Q_B U) diag(σ) (Q_A V)ᵀ

    norm            ‖σ‖
    stable rank     ‖σ‖² / σ₁²
    effective rank  exp(entropy of σ / Σσ)   (Roy & Vetterli 2007)

Two adapters are compared by the principal angles between their column spaces (Q_B U, the
directions that they write) and between their row spaces (Q_A V, the directions that they read):
arccos of the singular values of Q₁ᵀ Q₂. 0° means a shared direction, 90° unrelated ones. All
computations are in fp64.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.common import read_json, read_tensors
from minilora.common.notebook import html_text
from minilora.hub import missing_path
from minilora.lora.config import LoRAConfig
from minilora.lora.files.adapter_tensors import PREFIX
from minilora.lora.files.find import CONFIG_FILE, WEIGHTS_FILE, read_config, result_folder
from minilora.lora.layer import scaling
from minilora.lora.low_rank import Spaces, product_svd
from minilora.models.gguf.header import read_header

GGUF_KINDS = {  # gguf.GGMLQuantizationType
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
_SHOWN = re.compile(  # fields of config.json, adapter_config.json and GGUF files
    r"""
    architectures | model_type | (torch_)?dtype | hidden_size | vocab_size
    | num_(hidden_layers|attention_heads|key_value_heads) | tie_word_embeddings
    | base_model_name_or_path | r | lora_alpha | use_\w+ | target_modules
    | (rank|alpha)_pattern | bias
    | general\.(architecture|name) | tokenizer\.ggml\.model
    | \w+\.(embedding_length|block_count|context_length)
    """,
    re.VERBOSE,
)
_LORA_B = re.compile(r"(?P<layer>.*)\.lora_(?P<kind>embedding_)?B(?P<suffix>\.weight)?")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SCALING_FIELDS = ("lora_alpha", "alpha_pattern", "use_rslora")  # the fields that s depends on

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype, shape)


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint; prints as text.

    Attributes:
        kind: "model", "gguf", "adapter" or "two adapters".
        facts: Names and values of the description.
        tensors: Maps a tensor's name to its dtype and shape.
        layers: For an adapter, the spectrum of each layer's update; for two adapters, the
            principal angles of each shared layer in degrees.
    """

    kind: str
    facts: dict[str, Any]
    tensors: Shapes = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.kind]
        for name, value in self.facts.items():
            lines.append(f"  {name:<24}{value}")
        # Tensors that differ in the number of their layer only are counted on one line.
        counts = Counter()
        for name, (dtype, shape) in self.tensors.items():
            counts[_LAYER_NUMBER.sub("*", name), dtype, shape] += 1
        for (name, dtype, shape), count in counts.items():
            lines.append(f"  {count:>4} × {name:<60}{dtype:>5} {shape}")
        return "\n".join(lines + self._layer_lines())

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def _layer_lines(self) -> list[str]:
        """Return the table of layers, or an empty list."""
        if not self.layers:
            return []
        columns = next(iter(self.layers.values()))
        header = "".join(f"{name:>16}" for name in columns)
        lines = [f"{'':<42}{header}"]
        for layer, figures in self.layers.items():
            cells = "".join(f"{value:16.4g}" for value in figures.values())
            lines.append(f"{layer[-41:]:<42}{cells}")
        return lines


def inspect(path: str | Path, other: str | Path | None = None) -> Inspection:
    """Describe a model folder, GGUF file or adapter folder, or compare two adapters.

    Args:
        path: A .gguf file, or the folder of a model, an adapter or a run.
        other: A second adapter or run folder. The two adapters are then compared over the layers they
            share. None describes `path` alone.

    Returns:
        The description.

    Raises:
        OSError: A file is missing.
        ValueError: A file is damaged, or the two paths are not adapters with a layer in common.
    """
    path = result_folder(path)
    if other is not None:
        return _compare_adapters(path, result_folder(other))
    if path.is_file() and path.suffix == ".gguf":
        return _inspect_gguf(path)
    headers = safetensors_headers(path)
    tensors = {name: (dtype, shape) for name, (_, dtype, shape) in headers.items()}
    sizes = _sizes(tensors, {file for file, _, _ in headers.values()})
    if (path / CONFIG_FILE).is_file():
        return _inspect_adapter(path, tensors, sizes)
    return _inspect_model(path, tensors, sizes)


def safetensors_headers(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Read the headers of an adapter's or a model's safetensors files, without the tensors.

    The files are chosen as in `load_model`: one file in preference to shards.

    Args:
        folder: Folder of the adapter or the model.

    Returns:
        Maps a tensor's name to its file, dtype and shape.

    Raises:
        FileNotFoundError: The folder contains no safetensors files.
        ValueError: A file is damaged, or two files contain the same tensor.
    """
    from safetensors import SafetensorError, safe_open  # here: `import minilora` stays light

    headers: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in _safetensors_files(folder):
        file_headers: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    file_headers[name] = (path, view.get_dtype(), tuple(view.get_shape()))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or cut off ({error}). Download it again."
            ) from error
        duplicates = sorted(headers.keys() & file_headers.keys())
        if duplicates:
            name = duplicates[0]
            raise ValueError(
                f"tensor {name} is in both {headers[name][0]} and {path}: remove the stale file."
            )
        headers |= file_headers
    return headers


def spaces(B: Tensor, A: Tensor, s: float) -> Spaces:
    """Return the column space, singular values and row space of s · B A.

    Singular values that are zero up to rounding in fp32 are dropped.

    Args:
        B: Matrix of shape (out, r).
        A: Matrix of shape (r, in).
        s: Scaling of the adapter.

    Returns:
        U (out, k), σ (k,) and V (in, k) in fp64, where k is the numerical rank.
    """
    U, sigma, V = product_svd(s * B.double(), A)
    eps = torch.finfo(torch.float32).eps
    smallest = sigma[0] * max(B.shape[0], A.shape[1]) * eps
    k = int((sigma > smallest).sum())
    return U[:, :k], sigma[:k], V[:, :k]


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return the sort key of a module path: layer 2 comes before layer 10.

    Args:
        name: Path of a module or a tensor.
    """
    key = []
    for part in name.split("."):
        number = int(part) if part.isdecimal() else -1
        key.append((number, part))
    return key


def _compare_adapters(path: Path, other: Path) -> Inspection:
    """Compare two adapters over the layers they share."""
    first = _adapter_spaces(path)
    second = _adapter_spaces(other)
    shared = sorted(first.keys() & second.keys(), key=natural_order)
    if not shared:
        raise ValueError(
            f"{path} and {other} adapt no layer in common: {[*first][:2]} and {[*second][:2]}."
        )
    facts = {"layers of both": len(shared), "layers of one": len(first.keys() ^ second.keys())}
    angles = {layer: _angles(first[layer], second[layer]) for layer in shared}
    return Inspection("two adapters", facts, {}, angles)


def _inspect_gguf(path: Path) -> Inspection:
    facts, records = read_header(path)
    tensors: Shapes = {}
    for name, record in records.items():
        dtype = GGUF_KINDS.get(record.kind, f"type {record.kind}")
        tensors[name] = (dtype, record.shape)
    return Inspection("gguf", _shown(facts) | _sizes(tensors, [path]), tensors)


def _inspect_adapter(folder: Path, tensors: Shapes, sizes: dict[str, Any]) -> Inspection:
    spaces_by_layer = _adapter_spaces(folder)
    layers = {}
    for layer in sorted(spaces_by_layer, key=natural_order):
        _, sigma, _ = spaces_by_layer[layer]
        layers[layer] = _spectrum(sigma)
    facts = _shown(read_config(folder)) | sizes | _metadata(folder)
    return Inspection("adapter", facts, tensors, layers)


def _inspect_model(folder: Path, tensors: Shapes, sizes: dict[str, Any]) -> Inspection:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file}: no such file. Expected a .gguf file, or a folder of a model or an "
            "adapter."
        )
    config = read_json(config_file)
    quantization = config.get("quantization_config")
    method = "none"
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "?")
    counts = Counter()
    for name in tensors:
        if ".quant_state.bitsandbytes__" in name:
            counts[name.rpartition("__")[2]] += 1
    parts = [method]
    parts += [f"{count} weights in {kind}" for kind, count in counts.items()]
    facts = _shown(config) | {"quantisation": ", ".join(parts)} | sizes
    return Inspection("model", facts, tensors)


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the files of the first pattern that matches any."""
    expected = "a folder with .safetensors files (or, to inspect, a .gguf file)"
    if not folder.exists():
        raise missing_path(folder, expected)
    for pattern in (WEIGHTS_FILE, "model.safetensors", "model-*.safetensors", "*.safetensors"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise FileNotFoundError(f"{folder}: expected {expected}.")


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the description shows."""
    shown = {}
    for name, value in facts.items():
        if value and _SHOWN.fullmatch(name):
            shown[name] = value
    return shown


def _sizes(tensors: Shapes, files: Iterable[Path]) -> dict[str, Any]:
    """Return the number of tensors, values by dtype, and bytes of the files."""
    values = Counter()
    for dtype, shape in tensors.values():
        values[dtype] += math.prod(shape)
    values_by_dtype = ", ".join(f"{dtype} {count:,}" for dtype, count in values.most_common())
    size = sum(file.stat().st_size for file in files)
    return {"tensors": len(tensors), "values": values_by_dtype, "bytes": f"{size:,}"}


def _metadata(folder: Path) -> dict[str, str]:
    """Return the metadata of an adapter's safetensors file, each value cut to 80 characters."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        metadata = file.metadata() or {}
    facts = {}
    for key, value in sorted(metadata.items()):
        facts[f"metadata {key}"] = value[:80]
    return facts


def _adapter_spaces(folder: Path) -> dict[str, Spaces]:
    """Return U, σ and V of every layer's update.

    Convolutions count as matrices; embeddings are multiplied as PEFT does it.
    """
    stored_config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    # Other fields stay unread: load_adapter may refuse them, but the spectrum needs none of them.
    fields = {name: stored_config[name] for name in _SCALING_FIELDS if name in stored_config}
    config = LoRAConfig.from_dict(fields)
    found = {}
    for key, lora_B in tensors.items():
        match = _LORA_B.fullmatch(key)
        if match is None:
            continue
        kind = match["kind"] or ""
        suffix = match["suffix"] or ""
        lora_A = tensors.get(f"{match['layer']}.lora_{kind}A{suffix}")
        if lora_A is not None:
            lora_B = _ungrouped(lora_B, lora_A)
        if lora_A is None or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(
                f"{folder}: {key} {tuple(lora_B.shape)} has no A that fits it. "
                "Copy the adapter again."
            )
        layer = match["layer"].removeprefix(PREFIX)
        r = lora_A.shape[0]
        alpha = config.strength(layer)[1]
        s = scaling(r, alpha, 0, config.use_rslora)
        found[layer] = spaces(lora_B.flatten(1), lora_A.flatten(1), s)
    if not found:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} holds no lora_B: expected a LoRA adapter in PEFT's format."
        )
    return found


def _ungrouped(lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """Return the B of a grouped convolution as one (out, r) matrix; any other B unchanged."""
    if lora_B.dim() <= 2:
        return lora_B
    groups, remainder = divmod(lora_A.shape[0], lora_B.shape[1])
    if remainder != 0:
        return lora_B
    blocks = lora_B.flatten(1).chunk(groups)  # each (out / groups, r / groups)
    return torch.block_diag(*blocks)  # (out, r)


def _spectrum(sigma: Tensor) -> dict[str, float]:
    """Return norm, rank, stable rank and effective rank of an update from its σ (k,)."""
    if len(sigma) == 0:
        return {"norm": 0.0, "rank": 0, "stable rank": 0.0, "effective rank": 0.0}
    square = sigma.square().sum()
    # exp(entropy of σ / Σσ)
    p = sigma / sigma.sum()  # (k,)
    effective_rank = torch.special.entr(p).sum().exp().item()
    # ‖σ‖² / σ₁²
    stable_rank = (square / sigma[0] ** 2).item()
    return {
        "norm": square.sqrt().item(),
        "rank": len(sigma),
        "stable rank": stable_rank,
        "effective rank": effective_rank,
    }


def _angles(first: Spaces, second: Spaces) -> dict[str, float]:
    """Return the principal angles of two updates of one layer; NaN where an update is zero."""
    U1, _, V1 = first
    U2, _, V2 = second
    return _angle_range("columns", U1, U2) | _angle_range("rows", V1, V2)


def _angle_range(name: str, first: Tensor, second: Tensor) -> dict[str, float]:
    """Return the smallest and largest angle, in degrees, between (n, k₁) and (n, k₂) bases."""
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"the adapters belong to different bases: {first.shape[0]} {name} in the first, "
            f"{second.shape[0]} in the second."
        )
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1)  # (min(k₁, k₂),)
    if len(cosines) == 0:
        return {f"{name} min°": math.nan, f"{name} max°": math.nan}
    angles = cosines.acos().rad2deg()  # (min(k₁, k₂),), ascending
    return {f"{name} min°": angles[0].item(), f"{name} max°": angles[-1].item()}
