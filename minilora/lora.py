"""LoRA: learn a low-rank correction beside a frozen weight.

    h = W x + s · B A x                       LoRA §4.1, eq. 3 (arXiv:2106.09685)

W was pretrained and never changes. A brings x down to r numbers, B brings them back up, and only A and B
are trained: r · (in + out) numbers instead of in · out. B starts at zero, so that at step 0 the layer is
exactly the layer it replaced; A starts random, or the gradient of B would be zero as well.

    symbol  here               shape      meaning
    x       x                  (…, in)    input
    W       base_layer.weight  (out, in)  frozen weight: of an nn.Linear, or 4-bit, or anything that maps x to h
    A       lora_A             (r, in)    down-projection, fp32, U(−1/√in, 1/√in)
    B       lora_B             (out, r)   up-projection, fp32, zero
    r       r                  ()         rank of the correction
    α       lora_alpha         ()         its strength
    s       scaling            ()         α/r, or α/√r when rank-stabilised (arXiv:2312.03732)

Several adapters can live on one layer by name; the active ones add up, and with none active the output is the
base's own, bit for bit. Simpler than PEFT: a layer never merges, so forward(), train() and eval() change no weight.
What would break it: computing B A first, as large as W.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAAdapter(nn.Module):
    """One low-rank correction s · B A x, called as ``adapter(x, y, base)`` with the layer's input x (…, in), its
    output so far y (…, out) and the base; returns the corrected y. Variants are other small classes with this call.
    """

    def __init__(self, in_features: int, out_features: int, r: int = 8, lora_alpha: float = 8,
                 lora_dropout: float = 0.0, use_rslora: bool = False, *, seed: int = 0):  # fmt: skip
        super().__init__()
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(
                f"r: expected 1 to {min(in_features, out_features)} for a layer of {in_features} inputs and "
                f"{out_features} outputs, got {r}. Lower r, or give this layer its own with rank_pattern."
            )
        if not 0 <= lora_dropout < 1 or not math.isfinite(lora_alpha) or lora_alpha == 0:
            raise ValueError(f"expected 0 <= lora_dropout < 1 and lora_alpha != 0, got {lora_dropout}, {lora_alpha}.")
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=torch.float32))
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise A and B from `seed` alone: no global random state is read or moved."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])  # what nn.Linear does: kaiming_uniform with a = √5
        generator = torch.Generator("cpu").manual_seed(seed)  # drawn on the CPU: the same numbers on every device
        self.lora_A.copy_(torch.empty(self.lora_A.shape, device="cpu").uniform_(-bound, bound, generator=generator))
        self.lora_B.zero_()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y + s · B A dropout(x), computed in x.dtype; x (…, in), y (…, out)."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)  # (r, in), (out, r)
        z = F.linear(self.dropout(x), A)  # (…, r)
        return y + F.linear(self.scaling * z, B)  # (…, out)

    def _apply(self, fn, recurse=True):
        def keep_fp32(t: Tensor) -> Tensor:  # `.half()` and `.bfloat16()` are for the base: masters only move device
            return moved if (moved := fn(t)).dtype.itemsize >= 4 else t.to(moved.device)

        return super()._apply(keep_fp32, recurse)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}"


class LoRALayer(nn.Module):
    """A frozen linear layer with named low-rank adapters: h = W x + Σ s · B A x over the active ones.

    Args:
        base: nn.Linear, NF4Linear, or transformers' Conv1D (its weight is stored transposed).
        r, lora_alpha, lora_dropout, use_rslora: the first adapter's rank, α, dropout on its input, α/√r scaling.
        name: the first adapter's name.  seed: what its A is drawn from.
    Raises ValueError: a base that is not linear, r outside the layer, dropout outside [0, 1), α = 0.
    """

    def __init__(self, base: nn.Module, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
                 use_rslora: bool = False, *, name: str = "default", seed: int = 0):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = linear_features(base)
        adapter = LoRAAdapter(self.in_features, self.out_features, r, lora_alpha, lora_dropout, use_rslora, seed=seed)
        self.base_layer = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.training = base.training  # a layer put into an evaluating model evaluates: no dropout
        self.add_adapter(name, adapter)
        self.use([name])

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Add an inactive adapter, on the base's device. A name that exists, is empty or has a dot raises."""
        if name in self.adapters or not name or "." in name:
            raise ValueError(f"adapter name: expected a new name without dots, got {name!r} beside {[*self.adapters]}.")
        device = next((p.device for p in self.base_layer.parameters()), None)
        self.adapters[name] = adapter.to(device).train(self.training).requires_grad_(False)

    def use(self, names: Iterable[str]) -> None:
        """Make exactly these adapters active and trainable, in this order; all others neither."""
        names = tuple(names)
        if unknown := set(names) - set(self.adapters):
            raise ValueError(f"unknown adapters {sorted(unknown)}: this layer has {[*self.adapters]}.")
        self.active = names
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → h (…, out)."""
        h = self.base_layer(x)  # W x
        for name in self.active:
            h = self.adapters[name](x, h, self.base_layer)  # + s · B A x
        return h

    weight = property(lambda self: self.base_layer.weight, doc="W, read only: a Parameter, or an NF4Weight.")
    bias = property(lambda self: self.base_layer.bias, doc="The base's bias (out,) or None, read only.")

    def _replicate_for_data_parallel(self):
        raise RuntimeError("nn.DataParallel copies parameters every step; use DistributedDataParallel (DDP) instead.")

    def extra_repr(self) -> str:
        dtype = next(self.base_layer.parameters()).dtype
        bits = 4 if dtype == torch.uint8 else dtype.itemsize * 8
        return f"in_features={self.in_features}, out_features={self.out_features}, active={self.active}, bits={bits}"


def linear_features(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; ValueError for anything else."""
    for i, o in (("in_features", "out_features"), ("nx", "nf")):  # nx, nf: transformers' Conv1D
        if isinstance(getattr(base, i, None), int) and isinstance(getattr(base, o, None), int):
            return getattr(base, i), getattr(base, o)
    raise ValueError(f"base: expected a linear layer (nn.Linear, NF4Linear, Conv1D), got {type(base).__name__}.")
