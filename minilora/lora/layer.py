"""The LoRA layer: a frozen linear layer with trainable low-rank corrections of its weight.

    h = W x + s · B A x                       LoRA §4.1, eq. 3 (arXiv:2106.09685)

W never changes. A projects x down to r numbers and B projects them up again. Only A and B are
trained: r · (in + out) parameters instead of in · out.

B starts at zero and A starts random. Therefore B A = 0, and h = W x before the first step. In the
first step only B receives a gradient, because the gradient of A is a product with B. If A started
at zero too, the gradient of B, which is a product with A x, would be zero, and neither could learn.

    symbol  in the code        shape      meaning
    x       x                  (…, in)    input
    W       base_layer.weight  (out, in)  frozen weight of an nn.Linear, or of a 4-bit layer
    A       lora_A             (r, in)    down-projection, fp32, starts in U(−1/√in, 1/√in)
    B       lora_B             (out, r)   up-projection, fp32, starts at zero
    r       r                  ()         rank of the correction
    α       lora_alpha         ()         strength of the correction
    s       scaling            ()         α/r, or α/√r for rank-stabilised LoRA (arXiv:2312.03732)
    b       lora_bias          (out,)     optional: h = W x + s · (B A x + b), fp32, starts at zero

A and B are stored in fp32. Each forward pass casts them to the dtype of x and computes in it. The
factor s multiplies A x, so A and B themselves do not contain it.

LoRAAdapter is one pair of A and B. LoRALayer is the frozen layer together with its adapters.
"""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdapterBase(nn.Module):
    """The common part of all kinds of adapters: hyperparameters, and parameters that stay in fp32.

    A subclass is called as `adapter(x, y, base)` with the input of a layer, the output so far and
    the frozen layer. It returns the output with its own correction added.

    Attributes:
        r: Rank of the correction.
        lora_alpha: Strength α of the correction.
        scaling: Factor s of the correction.
        lora_A: Down-projection, fp32.
        lora_B: Up-projection, fp32.
        lora_bias: Bias, fp32, or None.
    """

    r: int
    lora_alpha: float
    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """Return the parameters under the names that PEFT's files use.

        Args:
            base: The frozen layer. Some kinds of adapters have other names for other layers.

        Returns:
            The live parameters, not copies of them.
        """
        named: dict[str, Tensor] = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.lora_bias is not None:
            named["lora_B.bias"] = self.lora_bias
        return named

    @property
    def max_rank(self) -> int:
        """Largest rank that the change of the weight can have: the smaller of its two sides."""
        return min(self.lora_B.shape[0], self.lora_A[0].numel())

    def extra_repr(self) -> str:
        """Return the hyperparameters for `repr(module)`."""
        return f"r={self.r}, lora_alpha={self.lora_alpha}"

    def _apply(self, fn, recurse=True):
        """Move parameters between devices, but never cast them to 16 bits.

        `model.half()` and `model.bfloat16()` are meant for the base. The parameters of an adapter
        are the fp32 masters that the optimiser updates.
        """

        def apply_without_16_bits(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if converted.dtype.itemsize >= 4:
                return converted
            return tensor.to(converted.device)

        return super()._apply(apply_without_16_bits, recurse)


class LoRAAdapter(AdapterBase):
    """The low-rank correction s · (B A x + b) of one linear layer.

    Args:
        in_features: Size of the layer's input.
        out_features: Size of the layer's output.
        r: Rank of the correction, 1 or more. Above min(in_features, out_features) it adds memory
            only, because B A has no higher rank.
        lora_alpha: Strength α of the correction; not 0.
        lora_dropout: Probability of setting an element of the adapter's input to zero in training.
        use_rslora: Use s = α/√r instead of s = α/r.
        lora_bias: Train a bias b with B.
        seed: Seed of the initial A.

    Raises:
        ValueError: A hyperparameter is outside its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        *,
        seed: int = 0,
    ):
        super().__init__()
        self.scaling = scaling(r, lora_alpha, lora_dropout, use_rslora)
        self.r = r
        self.lora_alpha = lora_alpha
        self.dropout = dropout_layer(lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32))  # (out, r)
        self.lora_bias = None
        if lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))  # (out,)
        init_down_projection(self.lora_A, seed)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + s · (B A dropout(x) + b), computed in x.dtype.

        Args:
            x: Input of the layer, (…, in).
            y: Output of the layer so far, (…, out).
            base: The frozen layer. Plain LoRA does not read it; some variants do.

        Returns:
            The corrected output, (…, out).
        """
        A = self.lora_A.to(x.dtype)  # (r, in)
        B = self.lora_B.to(x.dtype)  # (out, r)
        b = None
        if self.lora_bias is not None:
            b = self.scaling * self.lora_bias.to(x.dtype)  # (out,)
        z = F.linear(self.dropout(x), A)  # (…, r)
        return y + F.linear(self.scaling * z, B, b)  # (…, out)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s · B A, the matrix that merging adds to W.

        Args:
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (out, in).
        """
        A = self.lora_A.to(dtype)  # (r, in)
        B = self.lora_B.to(dtype)  # (out, r)
        return self.scaling * B @ A  # (out, in)


def scaling(r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> float:
    """Check the hyperparameters of an adapter and return its factor s.

    Args:
        r: Rank of the correction.
        lora_alpha: Strength α of the correction.
        lora_dropout: Dropout probability.
        use_rslora: Use α/√r instead of α/r.

    Returns:
        The factor s.

    Raises:
        ValueError: A hyperparameter is outside its range.

    Source:
        LoRA §4.1 (arXiv:2106.09685); rsLoRA (arXiv:2312.03732).
    """
    if r < 1:
        raise ValueError(f"r: expected 1 or more, got {r}. Give a positive rank.")
    if not 0 <= lora_dropout < 1 or not math.isfinite(lora_alpha) or lora_alpha == 0:
        raise ValueError(
            "expected 0 <= lora_dropout < 1 and a finite lora_alpha != 0, "
            f"got lora_dropout={lora_dropout} and lora_alpha={lora_alpha}."
        )
    if use_rslora:
        return lora_alpha / math.sqrt(r)
    return lora_alpha / r


def init_down_projection(A: nn.Parameter, seed: int) -> None:
    """Fill A with the initial values of nn.Linear, U(−1/√in, 1/√in).

    The values depend on the seed alone. The global random state is neither read nor changed, and
    the CPU draws the values, so that every device starts with the same ones.

    Args:
        A: The down-projection, (r, in), or (r, in, k…) of a convolution.
        seed: Seed of the random generator.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    limit = 1 / math.sqrt(A[0].numel())
    values = torch.empty(A.shape, dtype=torch.float32, device="cpu")  # (r, in)
    values.uniform_(-limit, limit, generator=generator)
    A.data.copy_(values)


def dropout_layer(probability: float) -> nn.Module:
    """Return nn.Dropout, or nn.Identity when the probability is zero.

    Args:
        probability: Probability of setting an element to zero.
    """
    if probability > 0:
        return nn.Dropout(probability)
    return nn.Identity()


class LoRALayer(nn.Module):
    """A frozen layer with named adapters: h = W x + Σ s · B A x over the active adapters.

    Without an active adapter the output is exactly W x.

    Args:
        base: The layer to freeze and correct: nn.Linear, NF4Linear, or Conv1D of transformers (its
            weight is stored transposed). With r=None it may be of any kind for which
            `embedding_conv.py` has an adapter.
        r: Rank of the first adapter. None creates the layer without an adapter.
        lora_alpha: Strength α of the first adapter.
        lora_dropout: Dropout probability of the first adapter.
        use_rslora: Use s = α/√r instead of s = α/r.
        name: Name of the first adapter.
        seed: Seed of the first adapter's initial values.

    Attributes:
        base_layer: The frozen layer.
        adapters: All adapters by name.
        active: Names of the active adapters, in the order in which they are applied.
        fused: A function that replaces the steps of `forward`, or None. `inject` sets it to
            `lora_linear` (fused_linear.py), which keeps less memory for backward.
        merged: A function that returns "weight" or "bias" with the active adapters added, for a
            parent that reads it, or None. `inject` sets it to `read_merged` (merging/changes.py).

    Raises:
        ValueError: The base is not linear, or a hyperparameter is outside its range.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int | None = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        name: str = "default",
        seed: int = 0,
    ):
        super().__init__()
        self.base_layer = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.fused: Callable[[LoRALayer, Tensor], Tensor] | None = None
        self.merged: Callable[[LoRALayer, str], Any] | None = None
        self.training = base.training  # take the mode of the base: no dropout while evaluating
        if r is not None:
            in_features, out_features = linear_features(base)
            adapter = LoRAAdapter(
                in_features, out_features, r, lora_alpha, lora_dropout, use_rslora, seed=seed
            )
            self.add_adapter(name, adapter)
            self.use([name])
        base.requires_grad_(False)  # last, so that an error above leaves the base unchanged

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Add an inactive adapter and move it to the device of the base.

        Args:
            name: A new name without a dot. Names of ModuleDict's own methods are not allowed.
            adapter: The adapter module.

        Raises:
            ValueError: The name is empty, contains a dot, or exists already.
        """
        if not name or "." in name or hasattr(self.adapters, name):
            raise ValueError(
                f"adapter {name!r}: expected a new, dotless name that is not a method of "
                f"ModuleDict. This layer has {[*self.adapters]}."
            )
        stored = chain(self.base_layer.parameters(), self.base_layer.buffers())
        device = next((tensor.device for tensor in stored), None)
        adapter.to(device).train(self.training).requires_grad_(False)
        self.adapters[name] = adapter

    def use(self, names: list[str] | tuple[str, ...]) -> None:
        """Make these adapters the active ones. Only they are trainable.

        Args:
            names: Names of adapters, in the order in which they are applied.

        Raises:
            ValueError: The layer has no adapter of one of these names.
        """
        names = tuple(names)
        unknown = set(names) - set(self.adapters)
        if unknown:
            raise ValueError(
                f"unknown adapters {sorted(unknown)}: this layer has {[*self.adapters]}."
            )
        self.active = names
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + Σ s · B A x over the active adapters.

        Args:
            x: Input, (…, in).

        Returns:
            Output h, (…, out).
        """
        if self.fused is not None:
            return self.fused(self, x)
        h = self.base_layer(x)  # (…, out)
        for name in self.active:
            h = self.adapters[name](x, h, self.base_layer)  # (…, out)
        return h

    @property
    def in_features(self) -> int:
        """Size of the base's input."""
        return linear_features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Size of the base's output."""
        return linear_features(self.base_layer)[1]

    @property
    def weight(self):
        """The weight that this layer computes with, read-only; the base's without an adapter."""
        if self.merged is not None and self.active:
            return self.merged(self, "weight")
        return self.base_layer.weight

    @property
    def bias(self):
        """The bias (out,) that this layer computes with, read-only, or None."""
        if self.merged is not None and self.active:
            return self.merged(self, "bias")
        return self.base_layer.bias

    def _replicate_for_data_parallel(self):
        """Refuse nn.DataParallel."""
        raise RuntimeError(
            "nn.DataParallel copies parameters in every step. "
            "Use DistributedDataParallel (DDP) instead."
        )

    def extra_repr(self) -> str:
        """Return the active adapters and the bits of a stored weight for `repr(module)`."""
        dtype = next(chain(self.base_layer.parameters(), self.base_layer.buffers())).dtype
        bits = getattr(self.base_layer, "bits", dtype.itemsize * 8)
        if dtype == torch.uint8 and bits == 8:  # two 4-bit codes in each byte
            bits = 4
        return f"active={self.active}, bits={bits}"


def linear_features(base: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer.

    Args:
        base: The layer.

    Raises:
        ValueError: The layer is not linear.
    """
    for in_name, out_name in (("in_features", "out_features"), ("nx", "nf")):  # nx: Conv1D
        in_features = getattr(base, in_name, None)
        out_features = getattr(base, out_name, None)
        if isinstance(in_features, int) and isinstance(out_features, int):
            return in_features, out_features
    raise ValueError(
        "expected a linear base (Linear, NF4Linear, Conv1D), "
        f"got {type(base).__name__}: use inject."
    )
