"""Adapters as values: ΔW of each layer, to be scaled, added and reduced, without a model.

    0.7 * a - 0.3 * b       0.7 ΔW_a − 0.3 ΔW_b = [0.7 s_a B_a, −0.3 s_b B_b] [A_a; A_b], exactly, with rank r_a + r_b
    value.truncate(r)       the best approximation of each ΔW with rank r (Eckart–Young), and what it loses
    combine_adapters(…, "ties")      trim, elect a sign, average those who agree, of each number of ΔW (arXiv
                                     2306.01708)
    combine_adapters(…, "dare")      drop numbers of ΔW at random and scale up the rest, then add (arXiv 2311.03099)

All is done to ΔW and nothing to A and B apart, which mean nothing apart: (B_a + B_b)(A_a + A_b) has two products that
nobody trained (PEFT's "linear" has them). Ranks and layers may differ; where an adapter has no layer, its ΔW is zero.
One adapter with weight 1 is itself, bit for bit, of whatever kind. For anything else ΔW has to be of linear layers and
need no W: DoRA's rescales W, and is refused.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora.config import LoRAConfig
from minilora.lora.files.base_check import same_base
from minilora.lora.files.save_load import PREFIX, contents, put_contents, read_contents, write_contents
from minilora.lora.layer import scaling
from minilora.lora.low_rank import low_rank, product_svd

CARRIED = ("task_type", "base_model_name_or_path", "revision")
METHODS = ("linear", "svd", "ties", "dare")
Layers = dict[str, tuple[Tensor, Tensor]]  # name -> s B (out, r), A (r, in), fp32; ΔW = (s B) A


@dataclass(frozen=True, eq=False, repr=False)
class AdapterWeights:
    """What an adapter's folder holds: the config's values, tensors under PEFT's keys, fingerprints of its base.

    error, errors: the relative error of ΔW, ‖ΔW − what is kept‖ / ‖ΔW‖ (Frobenius), of all layers and by layer, which
        `truncate` or `combine_adapters` made; 0 and {} where nothing was left out.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    bound: dict[str, Any] = field(default_factory=dict)
    error: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"AdapterWeights(r={self.values.get('r')}, {len(self.tensors)} tensors, error={self.error:.3g})"

    @classmethod
    def load(cls, folder: str | Path) -> "AdapterWeights":
        """From a folder in PEFT's format, or the Hub; on the CPU. Raises as load_adapter."""
        return cls(*read_contents(folder))

    @classmethod
    def of(cls, model: nn.Module, name: str = "default") -> "AdapterWeights":
        """A copy of a model's adapter, on the CPU, as save_adapter would write it."""
        values, tensors, bound = contents(model, name)
        return cls(values, {key: t.detach().to("cpu", copy=True) for key, t in tensors.items()}, bound)

    def save(self, folder: str | Path) -> None:
        """Write a folder in PEFT's format."""
        write_contents(Path(folder), (self.values, self.tensors, self.bound))

    def put(self, model: nn.Module, name: str = "default", **how: Any) -> list[str]:
        """Onto a model, as load_adapter does it from a folder, with its options; returns the layers' names."""
        return put_contents(model, (self.values, self.tensors, self.bound), name, Path("the adapter"), **how)

    def layers(self) -> Layers:
        """s B and A of each layer. ValueError for what is no ΔW of linear layers alone."""
        config = LoRAConfig.from_dict(self.values)
        if config.use_dora or config.begins_from_weight:
            what = "use_dora: DoRA rescales W" if config.use_dora else "init_lora_weights: PEFT's PiSSA changes W"
            raise ValueError(f"{what}, so that what it adds to W depends on W. Merge it, or use it alone.")
        found = {}
        for key in self.tensors:
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
            if match is None or self.tensors[key].dim() != 2:
                raise ValueError(f"{key}: only adapters of linear layers can be added and scaled, without biases.")
            if match[2] == "A":
                path, A = match[1], self.tensors[key].float()
                s = scaling(len(A), len(A), config.strength(path)[1], 0, config.use_rslora)
                found[path] = s * self.tensors[f"{PREFIX}{path}.lora_B.weight"].float(), A
        return found

    def truncate(self, rank: int) -> "AdapterWeights":
        """The best approximation with at most this rank in each layer; `error` says what that loses."""
        if rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {rank}.")
        layers, lost = self.layers(), {}
        if all(len(A) <= rank for _, A in layers.values()):
            return self
        for path, (B, A) in layers.items():
            U, sigma, V = product_svd(B, A)
            root = sigma[:rank].sqrt()
            layers[path] = (U[:, :rank] * root).float(), (root[:, None] * V[:, :rank].T).float()
            lost[path] = sigma[rank:].square().sum().item(), sigma.square().sum().item()
        return _made(layers, self, lost)

    def __mul__(self, weight: float) -> "AdapterWeights":
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        if not math.isfinite(weight):
            raise ValueError(f"an adapter times {weight}: expected a finite number.")
        if weight == 1:
            return self
        self.layers()
        return replace(self, tensors={k: weight * t if ".lora_B." in k else t for k, t in self.tensors.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "AdapterWeights":
        return -1 * self

    def __add__(self, other: "AdapterWeights") -> "AdapterWeights":
        if not isinstance(other, AdapterWeights):
            return NotImplemented
        mine, its = self.layers(), other.layers()
        for path in (shared := [path for path in mine if path in its]):
            (B, A), (C, D) = mine[path], its[path]
            if B.shape[0] != C.shape[0] or A.shape[1] != D.shape[1]:
                shapes = (len(B), A.shape[1]), (len(C), D.shape[1])
                raise ValueError(
                    f"{path} is {shapes[0]} in one adapter, {shapes[1]} in the other: two models' adapters."
                )
        both = {
            path: (torch.cat([mine[path][0], its[path][0]], 1), torch.cat([mine[path][1], its[path][1]]))
            for path in shared
        }
        return _made(mine | its | both, replace(self, bound=_bound(self.bound, other.bound)))

    def __sub__(self, other: "AdapterWeights") -> "AdapterWeights":
        return self + -other if isinstance(other, AdapterWeights) else NotImplemented


def combine_adapters(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float] | None = None,
    method: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> AdapterWeights:
    """One adapter of several, by weight (each 1 by default).

    method: "linear", Σ wᵢ ΔWᵢ, exactly; "svd", the same with the largest rank of the parts; "ties" and "dare", which
        leave no low rank: `rank` has to be given, and `error` says what it loses.
    rank: truncate the result to it. density: the share of the numbers of each ΔW that "ties" (the largest) and "dare"
        (drawn with `seed`) keep.
    ValueError: no adapter, another number of weights, an option that the method lacks or has no use for.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters) or method not in METHODS:
        expected = f"adapters, as many weights, and a method of {', '.join(METHODS)}"
        raise ValueError(f"combine_adapters: expected {expected}; got {len(adapters)}, {len(weights)} and {method!r}.")
    sparse = method in ("ties", "dare")
    if (density is None) == sparse or (density is not None and not 0 < density <= 1):
        raise ValueError(f"density: expected {'0 < density <= 1' if sparse else f'none for {method}'}, got {density}.")
    if len(adapters) == 1 and weights[0] == 1 and density in (None, 1):
        return adapters[0] if rank is None else adapters[0].truncate(rank)
    parts = [adapter.layers() for adapter in adapters]
    if not sparse:
        total = reduce(AdapterWeights.__add__, (w * adapter for w, adapter in zip(weights, adapters, strict=True)))
        largest = max(len(A) for part in parts for _, A in part.values())
        return total if (rank := rank or (largest if method == "svd" else None)) is None else total.truncate(rank)
    if rank is None:
        raise ValueError(f"rank: {method} leaves no low rank by itself: say how many columns to keep.")
    layers, lost = {}, {}
    for path in dict.fromkeys(path for part in parts for path in part):
        shape = next((len(part[path][0]), part[path][1].shape[1]) for part in parts if path in part)
        deltas = torch.stack([part[path][0] @ part[path][1] if path in part else torch.zeros(shape) for part in parts])
        w = torch.tensor(weights)[:, None, None]
        dense = ties(deltas, w, density or 1) if method == "ties" else dare(deltas, w, density or 1, f"{seed}:{path}")
        layers[path] = B, A = low_rank(dense, rank, 1.0)
        lost[path] = (dense - B @ A).double().square().sum().item(), dense.double().square().sum().item()
    return _made(layers, replace(adapters[0], bound=reduce(_bound, (a.bound for a in adapters))), lost)


def ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """TIES of ΔW (n, out, in), with weights (n, 1, 1): trim (§4, step 1), elect (2), average those who agree (3)."""
    flat = deltas.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    trimmed = torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(deltas)
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)  # (out, in) the sign with more behind it
    agree = trimmed.sign() == elected  # (n, out, in)
    return (weights * trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(deltas: Tensor, weights: Tensor, density: float, seed: str) -> Tensor:
    """DARE of ΔW (n, out, in), with weights (n, 1, 1): a number stays with probability `density`, divided by it."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
    drawn = torch.rand(deltas.shape, generator=torch.Generator().manual_seed(number))
    return (weights * deltas * (drawn < density) / density).sum(0)


def _made(layers: Layers, like: AdapterWeights, lost: dict[str, tuple[float, float]] | None = None) -> AdapterWeights:
    """A value of these layers with s = 1; `lost` is (‖lost‖², ‖ΔW‖²) by layer."""
    ranks = {path: len(A) for path, (_, A) in layers.items()}
    r = max(ranks.values())
    smaller = {path: rank for path, rank in ranks.items() if rank < r}
    given: dict[str, Any] = {name: like.values.get(name) for name in CARRIED}
    given |= {"r": r, "lora_alpha": r, "rank_pattern": smaller, "alpha_pattern": smaller}
    config = LoRAConfig(target_modules=sorted(layers), **given)
    values = config.to_dict() | {"fan_in_fan_out": like.values.get("fan_in_fan_out", False)}
    tensors = {
        f"{PREFIX}{path}.lora_{M}.weight": pair[i].contiguous()
        for path, pair in layers.items()
        for i, M in ((0, "B"), (1, "A"))
    }
    errors = {path: math.sqrt(part / whole) if whole else 0.0 for path, (part, whole) in (lost or {}).items()}
    parts, wholes = (sum(pair[i] for pair in (lost or {}).values()) for i in (0, 1))
    return AdapterWeights(values, tensors, like.bound, math.sqrt(parts / wholes) if wholes else 0.0, errors)


def _bound(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The fingerprints of both. ValueError if they are of different bases or vocabularies."""
    layers, more = one.get("layers", {}), other.get("layers", {})
    for path in (path for path in layers if path in more):
        if same_base(layers[path], more[path]) is False:
            raise ValueError(f"the adapters were trained on different bases: {path} is {layers[path]}, {more[path]}.")
    told, also = one.get("tokenizer") or {}, other.get("tokenizer") or {}
    if "vocabulary" in told and told["vocabulary"] != also.get("vocabulary", told["vocabulary"]):
        raise ValueError("the adapters were trained with different vocabularies: they do not read the same tokens.")
    tokenizer = {what: told[what] for what in told if also.get(what) == told[what]} or None
    return one | other | {"seed": None, "tokenizer": tokenizer, "layers": layers | more} if one or other else {}
