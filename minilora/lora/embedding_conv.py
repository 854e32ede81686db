"""Adapters for layers that are no plain matrix product: embeddings and convolutions. PEFT's keys, PEFT's shapes.

    embedding      y = E[ids] + ΔE[ids]               ΔE = s · (B A)ᵀ          A (r, V) zero, B (D, r) from N(0, 1)
    its head       h = E x + ΔE x                     where the output layer shares E and its adapter
    convolution    y = W ∗ x + s · (B ∗ (A ∗ x) + b)  ΔW = s · B A, flattened  A (r, in, k…), B (out, r/groups, 1…)

An embedding starts with A at zero, since B would otherwise have no gradient: a row of A is met only when its token
is. A convolution's A has the base's kernel, stride and padding and sees every input channel; B mixes the r results, in
the base's groups. What PEFT would compute otherwise than a merged layer does is refused here.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.lora.layer import LoRAAdapter, LoRALayer, linear_features, scaling

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EmbeddingAdapter(nn.Module):
    """ΔE = s · (B A)ᵀ for an nn.Embedding, and for the output layer that shares its weight (one adapter in both).

    Dropout acts on the output layer's input only, as in PEFT: token ids cannot be dropped.
    """

    def __init__(self, base: nn.Embedding, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool,
                 lora_bias: bool, *, seed: int):  # fmt: skip
        super().__init__()
        plain = type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
        refused = {"max_norm": base.max_norm is not None, "sparse": base.sparse, "a forward of its own": not plain}
        if names := [name for name, value in refused.items() if value]:
            raise ValueError(f"an embedding with {names[0]} computes something else than E[ids]: leave it out.")
        if lora_bias:
            raise ValueError("lora_bias: an embedding has no bias, in PEFT neither. Leave it out of target_modules.")
        most = min(base.num_embeddings, base.embedding_dim)
        self.scaling = scaling(r, most, lora_alpha, lora_dropout, use_rslora)
        self.r, self.lora_alpha = r, lora_alpha
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_A = nn.Parameter(torch.zeros(r, base.num_embeddings, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(base.embedding_dim, r, dtype=torch.float32))
        generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every device
        self.lora_B.data.copy_(torch.randn(self.lora_B.shape, device="cpu", generator=generator))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y + ΔE[x] with ids x (…) and y (…, D); under the output layer y + ΔE x with x (…, D) and y (…, V)."""
        if not isinstance(base, nn.Embedding):
            z = F.linear(self.dropout(x), self.lora_B.T.to(x.dtype))  # (…, r)
            return y + F.linear(self.scaling * z, self.lora_A.T.to(x.dtype))  # (…, V)
        z = F.embedding(x, self.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (…, r)
        s = self.scaling * getattr(base, "embed_scale", 1.0)  # Gemma's and BART's embeddings multiply E[ids]
        return y + F.linear(s * z.to(y.dtype), self.lora_B.to(y.dtype))  # (…, D)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """What merging adds to E, and to the head's weight: s · (B A)ᵀ (V, D)."""
        return (self.scaling * self.lora_B.detach().to(dtype) @ self.lora_A.detach().to(dtype)).T

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """The live parameters under PEFT's names: for the output layer, which PEFT gives a linear adapter, turned."""
        if isinstance(base, nn.Embedding):
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        return {"lora_A.weight": self.lora_B.T, "lora_B.weight": self.lora_A.T}

    lora_bias = None
    _apply, extra_repr = cast(Any, LoRAAdapter._apply), LoRAAdapter.extra_repr


class ConvAdapter(nn.Module):
    """s · (B ∗ (A ∗ x) + b) for nn.Conv1d, nn.Conv2d or nn.Conv3d."""

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d, r: int, lora_alpha: float, lora_dropout: float,
                 use_rslora: bool, lora_bias: bool, *, seed: int):  # fmt: skip
        super().__init__()
        wide = any(k > 1 and d > 1 for k, d in zip(base.kernel_size, base.dilation, strict=True))
        plain = type(base).forward in [kind.forward for kind in _CONVOLUTIONS]
        refused = {"padding_mode": base.padding_mode != "zeros", "dilation": wide, "a forward of its own": not plain}
        if names := [name for name, value in refused.items() if value]:
            raise ValueError(f"a convolution with {names[0]} has no adapter in PEFT's format that can be merged.")
        if r % base.groups:
            raise ValueError(f"r: expected a multiple of the convolution's {base.groups} groups, got {r}.")
        out, inside = base.out_channels, (base.in_channels, *base.kernel_size)
        self.scaling = scaling(r, min(out, math.prod(inside)), lora_alpha, lora_dropout, use_rslora)
        self.r, self.lora_alpha, self.groups = r, lora_alpha, base.groups
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        ones = (1 for _ in base.kernel_size)
        self.lora_A = nn.Parameter(torch.empty(r, *inside, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out, r // base.groups, *ones, dtype=torch.float32))
        self.lora_bias = nn.Parameter(torch.zeros(out, dtype=torch.float32)) if lora_bias else None
        self.reset_parameters(seed)

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """y + s · (B ∗ (A ∗ dropout(x)) + b), computed in x.dtype; x (N, in, …), y (N, out, …)."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        b = None if self.lora_bias is None else self.scaling * self.lora_bias.to(x.dtype)  # (out,)
        convolve: Any = _CONVOLVE[A.dim()]
        z = convolve(self.dropout(x), A, None, base.stride, base.padding)  # (N, r, …)
        return y + convolve(self.scaling * z, B, b, groups=self.groups)  # (N, out, …)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """What merging adds to W: s · B A (out, in, k…). ValueError with groups: ΔW joins what W keeps apart."""
        if self.groups > 1:
            raise ValueError(
                f"a convolution with {self.groups} groups cannot hold its adapter, which reads all input channels: "
                "keep it unmerged (save_adapter)."
            )
        B, A = self.lora_B.detach().to(dtype), self.lora_A.detach().to(dtype)
        return (self.scaling * B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])

    tensors, reset_parameters = LoRAAdapter.tensors, LoRAAdapter.reset_parameters
    _apply, extra_repr = cast(Any, LoRAAdapter._apply), LoRAAdapter.extra_repr


Adapter = LoRAAdapter | EmbeddingAdapter | ConvAdapter


def unwrapped(layer: nn.Module) -> nn.Module:
    """The base of a LoRALayer; any other module as it is."""
    return layer.base_layer if isinstance(layer, LoRALayer) else layer


def active_adapters(layer: nn.Module) -> list[Adapter]:
    """The adapters at work on a layer, in their order; none on a module that is no LoRALayer."""
    return [cast(Adapter, layer.adapters[name]) for name in layer.active] if isinstance(layer, LoRALayer) else []


def is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear or its kin, NF4Linear, transformers' Conv1D, or a LoRALayer around one.

    Not the output projection of nn.MultiheadAttention, which reads that layer's weight and never calls it.
    """
    try:
        linear_features(unwrapped(module))
    except ValueError:
        return False
    return hasattr(module, "weight") and not isinstance(module, NonDynamicallyQuantizableLinear)


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is an adapter for its kind."""
    return isinstance(unwrapped(module), (nn.Embedding, *_CONVOLUTIONS)) or is_linear(module)


def new_adapter(layer: nn.Module, r: int, *options: Any, seed: int) -> Adapter:
    """An adapter of the kind that `layer` takes; `options` are lora_alpha, lora_dropout, use_rslora and lora_bias."""
    base = unwrapped(layer)
    if isinstance(base, nn.Embedding):
        return EmbeddingAdapter(base, r, *options, seed=seed)
    if isinstance(base, _CONVOLUTIONS):
        return ConvAdapter(base, r, *options, seed=seed)
    return LoRAAdapter(*linear_features(base), r, *options, seed=seed)
