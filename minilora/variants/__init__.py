"""Methods beside plain LoRA, each in one file. LoRAConfig asks for them: `use_dora`, `init_lora_weights`.

    DoRA     W' = m ∘ (W + s B A) / ‖W + s B A‖      rows of length m; m, A and B train          dora.py
    PiSSA    W' = W + s (B A − B₀ A₀)                s B₀ A₀ ≈ W, where A and B begin            pissa.py
    LoftQ    W' = Q + s B A                          s B A ≈ W − Q, where A and B begin; Q in 4 bits, in the place of W

Each is an adapter like LoRAAdapter (lora.py): called with a layer's input, its output so far and its base. All are for
linear layers, dense or (but LoftQ, which makes them) in 4 bits. docs/variants.md says what they cost.
"""

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.merge import merged_weight
from minilora.config import LoRAConfig
from minilora.layers import unwrapped
from minilora.lora import LoRAAdapter
from minilora.modules import is_conv1d


def vary(adapter: nn.Module, layer: nn.Module, config: LoRAConfig, seed: int) -> nn.Module:
    """The adapter that `config` asks for on `layer`, made of the plain one. ValueError: the layer is not linear."""
    name = "dora" if config.use_dora else str(config.init_lora_weights).partition("_")[0]
    if type(adapter) is not LoRAAdapter:
        raise ValueError(f"{name} is for linear layers, and this is {type(unwrapped(layer)).__name__}: leave it out.")
    return importlib.import_module(f"minilora.variants.{name}").begin(adapter, layer, config, seed)


def as_plain(config: LoRAConfig, adapters: dict[str, Any]) -> tuple[LoRAConfig, dict[str, Any]]:
    """What a file holds of an adapter that began from W: a plain LoRA beside the base that is in the model.

    PiSSA's has twice the rank and the same s: α/r, or α/√r when rank-stabilised. LoftQ's is one already.
    """
    if config.init_lora_weights == "loftq":
        return replace(config, init_lora_weights=True, loftq_config={}), adapters
    stronger = 2**0.5 if config.use_rslora else 2
    plain = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=stronger * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: stronger * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return plain, {path: adapter.plain() for path, adapter in adapters.items()}


def dense_weight(base: nn.Module) -> Tensor:
    """W (out, in) of a linear base, fp32."""
    W = merged_weight(base)
    return W.T if is_conv1d(base) else W


def low_rank(M: Tensor, r: int, s: float, niter: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) with s B A the best approximation of M (out, in): B = U √(σ/s), A = √(σ/s) Vᵀ.

    niter: find it in a random r-dimensional range that so many iterations turned towards it (Halko et al. 2011,
    algorithm 4.4): quicker, and nearly the best.
    """
    if niter is None:
        U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        start = torch.randn(M.shape[1], r, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        Q = torch.linalg.qr(M @ start.to(M)).Q  # (out, r)
        for _ in range(niter):
            Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
        U, sigma, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
        U = Q @ U
    root = (sigma[:r] / abs(s)).sqrt()  # (r,)
    B, A = U[:, :r] * root.copysign(torch.tensor(s)), root[:, None] * Vh[:r]
    return B.contiguous(), A.contiguous()  # not in LAPACK's order, which an optimiser's saved state would not follow
