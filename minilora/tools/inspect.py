"""What a model folder, GGUF file or adapter folder is, from its headers; of adapters also what they learned.

An update s · B A has rank r at most, so its singular values σ are those of an (r, r) matrix, and it is never formed:

    B = Q_B R_B,  Aᵀ = Q_A R_A,  s R_B R_Aᵀ = U diag(σ) Vᵀ   =>   s B A = (Q_B U) diag(σ) (Q_A V)ᵀ

norm = ‖σ‖, stable rank = ‖σ‖² / σ₁², effective rank = exp(entropy of σ / Σσ) (Roy & Vetterli 2007). Two adapters are
compared by the principal angles between their column spaces (Q_B U: what they write) and between their row spaces
(Q_A V: what they read): arccos of the singular values of Q₁ᵀ Q₂. 0° means shared, 90° unrelated. All in fp64.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.common import read_tensors
from minilora.lora.config import LoRAConfig
from minilora.lora.files.adapter_tensors import PREFIX
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE
from minilora.lora.layer import scaling
from minilora.lora.low_rank import Spaces, product_svd
from minilora.models.gguf.header import read_header

GGUF_KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K"}
GGUF_KINDS |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}  # gguf.GGMLQuantizationType
_SHOWN = re.compile(  # of config.json, adapter_config.json and GGUF fields
    r"architectures|model_type|(torch_)?dtype|hidden_size|vocab_size|num_(hidden_layers|attention_heads|key_value_heads)|"
    r"tie_word_embeddings|base_model_name_or_path|r|lora_alpha|use_\w+|target_modules|(rank|alpha)_pattern|bias|"
    r"general\.(architecture|name)|tokenizer\.ggml\.model|\w+\.(embedding_length|block_count|context_length)"
)


@dataclass(frozen=True)
class Inspection:
    """kind: "model", "gguf", "adapter" or "two adapters". facts: what they are. tensors: name -> (dtype, shape).
    layers: of an adapter the spectrum of each layer's update, of two the angles in degrees. Prints as text."""

    kind: str
    facts: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        number = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer
        alike = Counter((number.sub("*", name), *what) for name, what in self.tensors.items())
        lines = [self.kind, *(f"  {name:<24}{value}" for name, value in self.facts.items())]
        lines += [f"  {n:>4} × {name:<60}{dtype:>5} {shape}" for (name, dtype, shape), n in alike.items()]
        if self.layers:
            lines.append(" " * 42 + "".join(f"{name:>16}" for name in next(iter(self.layers.values()))))
        for layer, figures in self.layers.items():
            lines.append(f"{layer[-41:]:<42}" + "".join(f"{value:16.4g}" for value in figures.values()))
        return "\n".join(lines)


def inspect(path: str | Path, other: str | Path | None = None) -> Inspection:
    """Describe a folder or .gguf file; with `other`, compare two adapters over the layers they share.

    ValueError or OSError for what is none of these or damaged, and for two that are not adapters with common layers.
    """
    path = Path(path)
    if other is not None:
        first, second = _spaces(path), _spaces(Path(other))
        if not (shared := [layer for layer in first if layer in second]):
            raise ValueError(f"{path} and {other} adapt no layer in common: {[*first][:2]} and {[*second][:2]}.")
        facts = {"layers of both": len(shared), "layers of one": len(first.keys() ^ second.keys())}
        return Inspection("two adapters", facts, {}, {layer: _angles(first[layer], second[layer]) for layer in shared})
    if path.is_file() and path.suffix == ".gguf":
        facts, records = read_header(path)
        tensors = {name: (GGUF_KINDS.get(r.kind, f"type {r.kind}"), r.shape) for name, r in records.items()}
        return Inspection("gguf", _shown(facts) | _sizes(tensors, [path]), tensors)
    headers = safetensors_headers(path)
    tensors = {name: (dtype, shape) for name, (_, dtype, shape) in headers.items()}
    sizes = _sizes(tensors, {file for file, *_ in headers.values()})
    if (path / CONFIG_FILE).is_file():
        layers = {layer: _spectrum(sigma) for layer, (_, sigma, _) in _spaces(path).items()}
        return Inspection("adapter", _shown(read_json(path / CONFIG_FILE)) | sizes | _metadata(path), tensors, layers)
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "none"
    kinds = Counter(name.rpartition("__")[2] for name in tensors if ".quant_state.bitsandbytes__" in name)
    quantised = {"quantisation": ", ".join([method, *(f"{n} weights in {kind}" for kind, n in kinds.items())])}
    return Inspection("model", _shown(config) | quantised | sizes, tensors)


def safetensors_headers(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Tensor -> (file, dtype, shape) of an adapter or a model (as load_model: one file before shards); none is read.

    ValueError for a damaged file and for a tensor in two of them.
    """
    from safetensors import SafetensorError, safe_open  # here: `import minilora` stays light

    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    patterns = WEIGHTS_FILE, "model.safetensors", "model-*.safetensors", "*.safetensors"
    files = next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])
    if not files:
        raise FileNotFoundError(f"{folder}: expected a folder with .safetensors files (or, to inspect, a .gguf file).")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                here = {name: (path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut off ({error}). Download it again.") from error
        if twice := sorted(found.keys() & here.keys()):
            raise ValueError(f"tensor {twice[0]} is in both {found[twice[0]][0]} and {path}: remove the stale file.")
        found |= here
    return found


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if _SHOWN.fullmatch(name) and value}


def _sizes(tensors: dict[str, tuple[str, tuple[int, ...]]], files: Any) -> dict[str, Any]:
    values = Counter()
    for dtype, shape in tensors.values():
        values[dtype] += math.prod(shape)
    by_dtype = ", ".join(f"{dtype} {count:,}" for dtype, count in values.most_common())
    return {"tensors": len(tensors), "values": by_dtype, "bytes": f"{sum(file.stat().st_size for file in files):,}"}


def _metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {f"metadata {key}": value[:80] for key, value in sorted((file.metadata() or {}).items())}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of such a folder; FileNotFoundError or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected a .gguf file, or a model's or adapter's folder.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error}). Download it again.") from error


def _spaces(folder: Path) -> dict[str, Spaces]:
    """Layer -> the two bases and σ of its update; convolutions as matrices, embeddings as PEFT multiplies them."""
    read, tensors = read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
    told = ("lora_alpha", "alpha_pattern", "use_rslora")  # more than these may be what load_adapter refuses
    config = LoRAConfig.from_dict({name: read[name] for name in told if name in read})
    found = {}
    for key, up in tensors.items():
        if not (match := re.fullmatch(r"(.*)\.lora_(embedding_)?B(\.weight)?", key)):
            continue
        down = tensors.get(f"{match[1]}.lora_{match[2] or ''}A{match[3] or ''}")
        if down is not None and up.dim() > 2 and down.shape[0] % up.shape[1] == 0:
            up = torch.block_diag(*up.flatten(1).chunk(down.shape[0] // up.shape[1]))  # (out, r): each group's own rows
        if down is None or down.shape[0] != up.shape[1]:
            raise ValueError(f"{folder}: {key} {tuple(up.shape)} has no A that fits it. Copy the adapter again.")
        layer, r = match[1].removeprefix(PREFIX), down.shape[0]
        s = scaling(r, r, config.strength(layer)[1], 0, config.use_rslora)
        found[layer] = spaces(up.flatten(1), down.flatten(1), s)
    if not found:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds no lora_B: expected a LoRA adapter in PEFT's format.")
    return found


def spaces(up: Tensor, down: Tensor, s: float) -> Spaces:
    """The two bases and σ of s · B A, from B (out, r) and A (r, in); what fp32 cannot tell from zero is left out."""
    U, sigma, V = product_svd(s * up.double(), down)
    k = int((sigma > sigma[0] * max(up.shape[0], down.shape[1]) * torch.finfo(torch.float32).eps).sum())
    return U[:, :k], sigma[:k], V[:, :k]


def _spectrum(sigma: Tensor) -> dict[str, float]:
    if not len(sigma):
        return {"norm": 0.0, "rank": 0, "stable rank": 0.0, "effective rank": 0.0}
    square, p = sigma.square().sum(), sigma / sigma.sum()
    effective = torch.special.entr(p).sum().exp().item()
    stable = (square / sigma[0] ** 2).item()
    return {"norm": square.sqrt().item(), "rank": len(sigma), "stable rank": stable, "effective rank": effective}


def _angles(first: Spaces, second: Spaces) -> dict[str, float]:
    """Smallest and largest principal angle, in degrees; NaN where a layer's update is zero."""
    found = {}
    for name, i in (("columns", 0), ("rows", 2)):
        if first[i].shape[0] != second[i].shape[0]:
            raise ValueError(f"the adapters are of different bases: {first[i].shape[0]} {name}, {second[i].shape[0]}.")
        cosines = torch.linalg.svdvals(first[i].T @ second[i]).clamp(max=1)
        angles = cosines.acos().rad2deg() if len(cosines) else torch.full((1,), math.nan)
        found |= {f"{name} min°": angles[0].item(), f"{name} max°": angles[-1].item()}
    return found
