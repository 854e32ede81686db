"""Combination of several adapters into one: weighted sum, TIES, DARE.

    linear   Σ wᵢ ΔWᵢ, exactly
    svd      the same, truncated to the largest rank of the adapters
    ties     trim, elect a sign, average those that agree        arXiv:2306.01708
    dare     drop random elements and rescale the others         arXiv:2311.03099

TIES and DARE act on the single elements of the dense ΔW = s B A. Their result has no low rank and
is approximated with one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minilora.lora.low_rank import low_rank
from minilora.lora.merging.arithmetic import (
    AdapterWeights,
    Layers,
    Squares,
    common_metadata,
    from_layers,
    sum_of_squares,
)

METHODS = ("linear", "svd", "ties", "dare")


def combine_adapters(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float] | None = None,
    method: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> AdapterWeights:
    """Return one adapter that combines several.

    Args:
        adapters: The adapters.
        weights: One weight for each adapter; None is 1 for each.
        method: "linear" is Σ wᵢ ΔWᵢ, exactly. "svd" is the same, truncated to the largest rank of
            the adapters. "ties" and "dare" combine the elements of ΔW; their result has no low
            rank, so `rank` is required and `error` reports the loss.
        rank: Largest rank of the result; None keeps every rank of a sum.
        density: For "ties" and "dare": the share of the elements of each ΔW that is kept, the
            largest ones ("ties") or random ones ("dare").
        seed: Seed of the elements that "dare" keeps.

    Raises:
        ValueError: `adapters` is empty, the number of weights differs, or an option does not fit
            the method.
    """
    if weights is None:
        weights = [1.0] * len(adapters)
    _check_combination(adapters, weights, method, rank, density)
    if len(adapters) == 1 and weights[0] == 1 and density in (None, 1):
        if rank is None:
            return adapters[0]
        return adapters[0].truncate(rank)
    if method in ("ties", "dare"):
        if rank is None:
            raise ValueError(f"rank: {method} leaves no low rank: give the rank of the result.")
        return _combine_elements(adapters, weights, method, rank, density or 1, seed)
    largest = 0
    for adapter in adapters:
        for _, A in adapter.layers().values():
            largest = max(largest, len(A))
    total = weights[0] * adapters[0]
    for weight, adapter in zip(weights[1:], adapters[1:], strict=True):
        total = total + weight * adapter
    if method == "svd" and rank is None:
        rank = largest
    if rank is None:
        return total
    return total.truncate(rank)


def _check_combination(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float | None,
) -> None:
    """Raise ValueError for arguments of `combine_adapters` that do not fit together."""
    if not adapters or len(weights) != len(adapters) or method not in METHODS:
        raise ValueError(
            "combine_adapters: expected adapters, as many weights, and a method of "
            f"{', '.join(METHODS)}; got {len(adapters)}, {len(weights)} and {method!r}."
        )
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected 1 or more, got {rank}.")
    if method in ("ties", "dare"):
        if density is None or not 0 < density <= 1:
            raise ValueError(f"density: expected 0 < density <= 1, got {density}.")
    elif density is not None:
        raise ValueError(f"density: expected none for {method}, got {density}.")


def _combine_elements(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float],
    method: str,
    rank: int,
    density: float,
    seed: int,
) -> AdapterWeights:
    """Combine the dense ΔW of each layer by TIES or DARE, and approximate it with a low rank."""
    parts = [adapter.layers() for adapter in adapters]
    paths: dict[str, None] = {}
    for part in parts:
        paths |= dict.fromkeys(part)
    w = torch.tensor(weights, dtype=torch.float32)[:, None, None]  # (n, 1, 1)
    layers: Layers = {}
    squares: Squares = {}
    for path in paths:
        deltas = _stacked_deltas(parts, path)  # (n, out, in)
        if method == "ties":
            combined = ties(deltas, w, density)  # (out, in)
        else:
            combined = dare(deltas, w, density, f"{seed}:{path}")  # (out, in)
        B, A = low_rank(combined, rank, 1.0)  # (out, rank), (rank, in)
        layers[path] = (B, A)
        error = (combined - B @ A).double()  # (out, in)
        squares[path] = (sum_of_squares(error), sum_of_squares(combined.double()))
    bound = adapters[0].bound
    for adapter in adapters[1:]:
        bound = common_metadata(bound, adapter.bound)
    return from_layers(layers, replace(adapters[0], bound=bound), squares)


def _stacked_deltas(parts: list[Layers], path: str) -> Tensor:
    """Return ΔW (n, out, in) of one layer for n adapters; zero for an adapter without it."""
    B, A = next(part[path] for part in parts if path in part)  # (out, r), (r, in)
    zero = torch.zeros(len(B), A.shape[1], dtype=torch.float32)  # (out, in)
    deltas = []
    for part in parts:
        delta = zero
        if path in part:
            B, A = part[path]
            delta = B @ A  # (out, in)
        deltas.append(delta)
    return torch.stack(deltas)


def ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Combine changes of one weight by TIES: trim, elect a sign, average those that agree.

    Args:
        deltas: The changes ΔW, (n, out, in).
        weights: Their weights, (n, 1, 1).
        density: Share of the elements of each ΔW that is kept, the largest ones.

    Returns:
        The combined ΔW, (out, in).

    Source:
        TIES-Merging §4, steps 1 to 3 (arXiv:2306.01708).
    """
    flat = deltas.flatten(1)  # (n, out · in)
    largest = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices  # (n, count)
    trimmed = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest))
    trimmed = trimmed.view_as(deltas)  # (n, out, in)
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)  # (out, in) sign of the larger mass
    agrees = trimmed.sign() == elected  # (n, out, in)
    return (weights * trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)  # (out, in)


def dare(deltas: Tensor, weights: Tensor, density: float, seed: str) -> Tensor:
    """Combine changes of one weight by DARE: drop random elements and rescale the others.

    Args:
        deltas: The changes ΔW, (n, out, in).
        weights: Their weights, (n, 1, 1).
        density: Probability of keeping an element, which is then divided by it.
        seed: Text that determines the random elements.

    Returns:
        The combined ΔW, (out, in).

    Source:
        DARE (arXiv:2311.03099).
    """
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    kept = (
        torch.rand(deltas.shape, dtype=torch.float32, generator=generator) < density
    )  # (n, out, in)
    return (weights * deltas * kept / density).sum(0)  # (out, in)
