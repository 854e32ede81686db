"""LoRA: learn a low-rank correction beside a frozen weight.

    h = W x + s · B A x                       LoRA §4.1, eq. 3 (arXiv:2106.09685)

W never changes. A brings x down to r numbers, B back up; only these train: r · (in + out) numbers in place of in · out.
B starts at zero, so that at step 0 h is W x, and A's gradient zero: B moves first. A is random, or B's were zero too.

    symbol  here               shape      meaning
    x       x                  (…, in)    input
    W       base_layer.weight  (out, in)  frozen weight: of an nn.Linear, or 4-bit, or anything that maps x to h
    A       lora_A             (r, in)    down-projection, fp32, U(−1/√in, 1/√in)
    B       lora_B             (out, r)   up-projection, fp32, zero
    r, α    r, lora_alpha      ()         rank of the correction, and its strength
    s       scaling            ()         α/r, or α/√r when rank-stabilised (arXiv:2312.03732)
    b       lora_bias          (out,)     on request: h = W x + s · (B A x + b), fp32, zero
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAAdapter(nn.Module):
    """s · B A x, called with a layer's input, its output so far and its base. Variants have the same methods."""

    def __init__(self, in_features: int, out_features: int, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0,
                 use_rslora: bool = False, lora_bias: bool = False, *, seed: int = 0):  # fmt: skip
        super().__init__()
        self.scaling = scaling(r, min(in_features, out_features), lora_alpha, lora_dropout, use_rslora)
        self.r, self.lora_alpha = r, lora_alpha
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32))
        self.lora_bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32)) if lora_bias else None
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:  # from `seed` alone: no global random state is read or moved
        bound = 1 / math.sqrt(self.lora_A[0].numel())  # what nn.Linear does: kaiming_uniform with a = √5
        generator = torch.Generator("cpu").manual_seed(seed)  # drawn on the CPU: the same numbers on every device
        self.lora_A.data.copy_(
            torch.empty(self.lora_A.shape, device="cpu").uniform_(-bound, bound, generator=generator)
        )

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y + s · (B A dropout(x) + b), computed in x.dtype; x (…, in), y (…, out). Variants also need the base."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)  # (r, in), (out, r)
        b = None if self.lora_bias is None else self.scaling * self.lora_bias.to(x.dtype)  # (out,)
        z = F.linear(self.dropout(x), A)  # (…, r)
        return y + F.linear(self.scaling * z, B, b)  # (…, out)

    def delta(self, dtype: torch.dtype) -> Tensor:  # what merging adds to W: s · B A (out, in)
        return self.scaling * self.lora_B.detach().to(dtype) @ self.lora_A.detach().to(dtype)

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:  # the live parameters under PEFT's names
        named = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B, "lora_B.bias": self.lora_bias}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    def _apply(self, fn, recurse=True):
        def keep_fp32(t: Tensor) -> Tensor:  # `.half()` and `.bfloat16()` are for the base: masters only move device
            return moved if (moved := fn(t)).dtype.itemsize >= 4 else t.to(moved.device)

        return nn.Module._apply(self, keep_fp32, recurse)  # not super(): other adapters borrow this method

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}"


def scaling(r: int, most: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> float:
    """s of an adapter on a layer that has room for a rank of `most`; ValueError for a number outside its range."""
    if not 1 <= r <= most:
        raise ValueError(f"r: expected 1 to {most}, got {r}. Lower r, or give this layer its own with rank_pattern.")
    if not 0 <= lora_dropout < 1 or not math.isfinite(lora_alpha) or lora_alpha == 0:
        raise ValueError(f"expected 0 <= lora_dropout < 1 and lora_alpha != 0, got {lora_dropout}, {lora_alpha}.")
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class LoRALayer(nn.Module):
    """A frozen layer with named low-rank adapters: h = W x + Σ s · B A x over the active ones; with none h is W x.

    base: nn.Linear, NF4Linear, or transformers' Conv1D (its weight is stored transposed). With r=None there is no
        adapter yet, and base may be of any kind that embedding_conv.py has adapters for. The rest describes the first
        adapter.
    Raises ValueError: a base that is not linear, r outside the layer, dropout outside [0, 1), α = 0.
    """

    def __init__(self, base: nn.Module, r: int | None = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
                 use_rslora: bool = False, *, name: str = "default", seed: int = 0):  # fmt: skip
        super().__init__()
        self.base_layer = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.fused = None  # inject's: what `forward` says below, with less kept for backward (lora/fused_linear.py)
        self.training = base.training  # a layer put into an evaluating model evaluates: no dropout
        if r is not None:
            adapter = LoRAAdapter(*linear_features(base), r, lora_alpha, lora_dropout, use_rslora, seed=seed)
            self.add_adapter(name, adapter)
            self.use([name])
        base.requires_grad_(False)  # after all that may raise

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Add an inactive adapter, on the base's device. A name that exists, is empty or has a dot raises."""
        if not name or "." in name or hasattr(self.adapters, name):  # a ModuleDict's methods are taken as well
            raise ValueError(f"adapter {name!r}: expected a new, dotless name, not ModuleDict's: {[*self.adapters]}")
        device = next((p.device for p in self.base_layer.parameters()), None)
        self.adapters[name] = adapter.to(device).train(self.training).requires_grad_(False)

    def use(self, names: list[str] | tuple[str, ...]) -> None:  # these, in this order, are active and train; no others
        if unknown := set(names := tuple(names)) - set(self.adapters):
            raise ValueError(f"unknown adapters {sorted(unknown)}: this layer has {[*self.adapters]}.")
        self.active = names
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

    def forward(self, x: Tensor) -> Tensor:  # x (…, in) → h (…, out)
        if self.fused is not None:
            return self.fused(self, x)
        h = self.base_layer(x)  # W x
        for name in self.active:
            h = self.adapters[name](x, h, self.base_layer)  # + s · B A x
        return h

    in_features, out_features = (property(lambda self, i=i: linear_features(self.base_layer)[i]) for i in (0, 1))
    weight = property(lambda self: self.base_layer.weight, doc="W, read only: a Parameter, or an NF4Weight.")
    bias = property(lambda self: self.base_layer.bias, doc="The base's bias (out,) or None, read only.")

    def _replicate_for_data_parallel(self):
        raise RuntimeError("nn.DataParallel copies parameters every step; use DistributedDataParallel (DDP) instead.")

    def extra_repr(self) -> str:
        dtype = next(self.base_layer.parameters()).dtype
        return f"active={self.active}, bits={4 if dtype == torch.uint8 else dtype.itemsize * 8}"


def linear_features(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; ValueError for anything else."""
    for i, o in (("in_features", "out_features"), ("nx", "nf")):  # nx, nf: transformers' Conv1D
        if isinstance(getattr(base, i, None), int) and isinstance(getattr(base, o, None), int):
            return getattr(base, i), getattr(base, o)
    raise ValueError(f"expected a linear base (Linear, NF4Linear, Conv1D), got {type(base).__name__}: use inject.")
