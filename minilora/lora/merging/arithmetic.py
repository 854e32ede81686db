"""Arithmetic on adapters without a model: scale, add, reduce the rank.

    0.7 * a - 0.3 * b    0.7 ΔW_a − 0.3 ΔW_b = [0.7 s_a B_a, −0.3 s_b B_b] [A_a; A_b]
                         exactly, with rank r_a + r_b
    a.truncate(r)        the best approximation of each ΔW with rank r (Eckart–Young), and its error

All operations act on the product ΔW = s B A. A and B have no meaning alone: (B_a + B_b)(A_a + A_b),
the "linear" method of PEFT, contains two products that were never trained. Ranks and layers may
differ; where an adapter has no layer, its ΔW is zero. One adapter with weight 1 is returned
unchanged, bit for bit, and may be of any kind. Everything else is for linear layers and for
adapters whose ΔW does not depend on W. DoRA rescales W and is refused.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora.config import LoRAConfig
from minilora.lora.files.adapter_tensors import PREFIX
from minilora.lora.files.base_check import same_base
from minilora.lora.files.save_load import (
    AdapterContents,
    contents,
    put_contents,
    read_contents,
    write_contents,
)
from minilora.lora.layer import scaling
from minilora.lora.low_rank import product_svd
from minilora.quant.storage import common_storage, stored_storage

_COPIED_FIELDS = ("task_type", "base_model_name_or_path", "revision")  # of the config
Layers = dict[str, tuple[Tensor, Tensor]]  # name → s B (out, r), A (r, in), fp32
Squares = dict[str, tuple[float, float]]  # name → ‖error‖², ‖ΔW‖² (Frobenius)


@dataclass(frozen=True, eq=False, repr=False)
class AdapterWeights:
    """The contents of an adapter's folder, as a value that can be scaled and added.

    `a + b`, `a - b`, `-a` and `weight * a` return new values.

    Attributes:
        values: The config, as in adapter_config.json.
        tensors: Tensors by PEFT's names.
        bound: Metadata of the file: fingerprints of the base, seed, tokenizer.
        error: Relative error of ΔW over all layers, ‖ΔW − result‖ / ‖ΔW‖ (Frobenius), which
            `truncate` or `combine_adapters` made; 0 if nothing was left out.
        errors: The relative error of each layer by name.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    bound: dict[str, Any] = field(default_factory=dict)
    error: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        r = self.values.get("r")
        return f"AdapterWeights(r={r}, {len(self.tensors)} tensors, error={self.error:.3g})"

    @classmethod
    def load(cls, folder: str | Path) -> "AdapterWeights":
        """Read an adapter from a folder in PEFT's format or from the Hub, to the CPU.

        Args:
            folder: A folder, or the id of a repository on the Hub.

        Raises:
            ValueError: A file is damaged, or its config is not supported.
            OSError: The folder does not exist, or the Hub does not provide it.
        """
        adapter = read_contents(folder)
        return cls(adapter.values, adapter.tensors, adapter.bound)

    @classmethod
    def of(cls, model: nn.Module, name: str = "default") -> "AdapterWeights":
        """Copy an adapter of a model to the CPU, as `save_adapter` would write it.

        Args:
            model: A model with adapters.
            name: Name of the adapter.

        Raises:
            ValueError: The adapter is unknown, or contains NaN or infinity.
        """
        adapter = contents(model, name)
        tensors = {}
        for key, tensor in adapter.tensors.items():
            tensors[key] = tensor.detach().to("cpu", copy=True)
        return cls(adapter.values, tensors, adapter.bound)

    def save(self, folder: str | Path) -> None:
        """Write a folder in PEFT's format.

        Args:
            folder: The folder to create or to write into.
        """
        write_contents(Path(folder), self._contents())

    def put(self, model: nn.Module, name: str = "default", **options: Any) -> list[str]:
        """Put the adapter into a model, as `load_adapter` does with a folder.

        Args:
            model: The model that the adapter was trained on.
            name: Name of the adapter in the model.
            **options: `allow_untrained`, `check_base` and `tokenizer` of `load_adapter`.

        Returns:
            Names of the adapted layers.

        Raises:
            ValueError: The adapter does not fit the model. The model is then unchanged.
        """
        return put_contents(model, self._contents(), name, Path("the adapter"), **options)

    def layers(self) -> Layers:
        """Return s B (out, r) and A (r, in) of each layer, in fp32.

        Raises:
            ValueError: The adapter is more than a ΔW of linear layers.
        """
        config = LoRAConfig.from_dict(self.values)
        if config.use_dora or config.begins_from_weight:
            reason = "init_lora_weights: PEFT's PiSSA changes W"
            if config.use_dora:
                reason = "use_dora: DoRA rescales W"
            raise ValueError(
                f"{reason}, so its change of W depends on W. Merge it, or use it alone."
            )
        layers: Layers = {}
        for key, tensor in self.tensors.items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
            if match is None or tensor.dim() != 2:
                raise ValueError(
                    f"{key}: only adapters of linear layers can be added and scaled, "
                    "without biases. Merge this adapter, or use it alone."
                )
            path, letter = match.groups()
            if letter == "A":
                A = tensor.float()  # (r, in)
                B = self.tensors[_tensor_name(path, "B")].float()  # (out, r)
                lora_alpha = config.strength(path)[1]
                s = scaling(len(A), lora_alpha, 0, config.use_rslora)
                layers[path] = (s * B, A)
        return layers

    def truncate(self, rank: int) -> "AdapterWeights":
        """Return the best approximation with at most this rank in each layer.

        `error` of the result is the relative error. An adapter that has the rank already is
        returned unchanged.

        Args:
            rank: Largest rank of a layer.

        Raises:
            ValueError: The rank is smaller than 1, or ΔW depends on W.
        """
        if rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {rank}.")
        layers = self.layers()
        if all(len(A) <= rank for _, A in layers.values()):
            return self
        truncated: Layers = {}
        squares: Squares = {}
        for path, (B, A) in layers.items():
            U, sigma, V = product_svd(B, A)  # (out, r), (r,), (in, r)
            root = sigma[:rank].sqrt()  # (rank,)
            new_B = (U[:, :rank] * root).float()  # (out, rank)
            new_A = (root[:, None] * V[:, :rank].T).float()  # (rank, in)
            truncated[path] = (new_B, new_A)
            squares[path] = (sum_of_squares(sigma[rank:]), sum_of_squares(sigma))
        return from_layers(truncated, self, squares)

    def __mul__(self, weight: float) -> "AdapterWeights":
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        if not math.isfinite(weight):
            raise ValueError(f"an adapter times {weight}: expected a finite number.")
        if weight == 1:
            return self
        self.layers()  # raises ValueError for an adapter that cannot be scaled
        tensors = {}
        for key, tensor in self.tensors.items():
            if ".lora_B." in key:
                tensor = weight * tensor
            tensors[key] = tensor
        return replace(self, tensors=tensors)

    __rmul__ = __mul__

    def __neg__(self) -> "AdapterWeights":
        return -1 * self

    def __add__(self, other: "AdapterWeights") -> "AdapterWeights":
        if not isinstance(other, AdapterWeights):
            return NotImplemented
        layers = self.layers()
        for path, (B, A) in other.layers().items():
            if path in layers:
                B, A = _concatenate(path, layers[path], (B, A))
            layers[path] = (B, A)
        bound = common_metadata(self.bound, other.bound)
        return from_layers(layers, replace(self, bound=bound))

    def __sub__(self, other: "AdapterWeights") -> "AdapterWeights":
        if not isinstance(other, AdapterWeights):
            return NotImplemented
        return self + -other

    def _contents(self) -> AdapterContents:
        """Return the contents of the folder."""
        return AdapterContents(self.values, self.tensors, self.bound)


def _concatenate(
    path: str, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return [B₁, B₂] and [A₁; A₂], whose product is B₁ A₁ + B₂ A₂."""
    first_shape = (len(first[0]), first[1].shape[1])  # (out, in)
    second_shape = (len(second[0]), second[1].shape[1])
    if first_shape != second_shape:
        raise ValueError(
            f"{path} is {first_shape} in one adapter, {second_shape} in the other: "
            "the adapters are for different models."
        )
    B = torch.cat([first[0], second[0]], dim=1)  # (out, r₁ + r₂)
    A = torch.cat([first[1], second[1]])  # (r₁ + r₂, in)
    return B, A


def from_layers(
    layers: Layers, like: AdapterWeights, squares: Squares | None = None
) -> AdapterWeights:
    """Return an adapter of these layers, with s = 1.

    Args:
        layers: B and A of each layer by name.
        like: An adapter whose metadata and facts about the base are taken over.
        squares: Squared norms of the error and of ΔW by layer; None if nothing was left out.
    """
    ranks = {path: len(A) for path, (_, A) in layers.items()}
    r = max(ranks.values())
    smaller = {path: rank for path, rank in ranks.items() if rank < r}
    copied: dict[str, Any] = {name: like.values.get(name) for name in _COPIED_FIELDS}
    config = LoRAConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=sorted(layers),
        **copied,
    )
    values = config.to_dict()
    values["fan_in_fan_out"] = like.values.get("fan_in_fan_out", False)
    tensors = {}
    for path, (B, A) in layers.items():
        tensors[_tensor_name(path, "B")] = B.contiguous()
        tensors[_tensor_name(path, "A")] = A.contiguous()
    squares = squares or {}
    errors = {path: _relative_error(*pair) for path, pair in squares.items()}
    lost = sum(error for error, _ in squares.values())
    total = sum(whole for _, whole in squares.values())
    return AdapterWeights(values, tensors, like.bound, _relative_error(lost, total), errors)


def _tensor_name(path: str, letter: str) -> str:
    """Return PEFT's name of A or B of a linear layer."""
    return f"{PREFIX}{path}.lora_{letter}.weight"


def sum_of_squares(values: Tensor) -> float:
    """Return the sum of the squares of all elements.

    Args:
        values: Tensor of any shape.
    """
    return values.square().sum().item()


def _relative_error(lost: float, total: float) -> float:
    """Return ‖error‖ / ‖ΔW‖ from the squares of the two norms; 0 if ΔW is zero."""
    if total == 0:
        return 0.0
    return math.sqrt(lost / total)


def common_metadata(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an adapter that is made of two.

    Args:
        one: Metadata of the first adapter.
        other: Metadata of the second adapter.

    Raises:
        ValueError: The two were trained on different bases or with different vocabularies.
    """
    if not one and not other:
        return {}
    layers = one.get("layers", {})
    other_layers = other.get("layers", {})
    for path in layers:
        if path in other_layers and same_base(layers[path], other_layers[path]) is False:
            raise ValueError(
                "the adapters were trained on different bases: "
                f"{path} is {layers[path]}, {other_layers[path]}."
            )
    tokenizer = one.get("tokenizer") or {}
    other_tokenizer = other.get("tokenizer") or {}
    vocabulary = tokenizer.get("vocabulary")
    other_vocabulary = other_tokenizer.get("vocabulary", vocabulary)
    if vocabulary is not None and vocabulary != other_vocabulary:
        raise ValueError(
            "the adapters were trained with different vocabularies: "
            "they do not read the same tokens."
        )
    common = {}
    for name, value in tokenizer.items():
        if other_tokenizer.get(name) == value:
            common[name] = value
    return (
        one
        | other
        | {
            "seed": None,
            "tokenizer": common or None,
            "storage": common_storage([stored_storage(one), stored_storage(other)]),
            "layers": layers | other_layers,
        }
    )
