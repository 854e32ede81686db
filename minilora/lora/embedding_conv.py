"""Adapters for embeddings and convolutions, with the keys and shapes of PEFT's files.

    embedding      y = E[ids] + ΔE[ids]               ΔE = s · (B A)ᵀ
    its head       h = E x + ΔE x                     if the output layer shares E and its adapter
    convolution    y = W ∗ x + s · (B ∗ (A ∗ x) + b)  ΔW = s · B A, as flat matrices

    symbol  in the code   embedding              convolution
    A       lora_A        (r, V), zero           (r, in, k…), random
    B       lora_B        (D, r), from N(0, 1)   (out, r/groups, 1…), zero

V is the vocabulary, D the embedding dimension, k… the kernel. In an embedding A starts at zero and
B random, as in PEFT. A column of A is read for its own token only, so the embedding of a token that
training never meets stays exactly as it was. A convolution's A has the kernel, stride and padding
of the base and reads every input channel. B mixes the r results within the groups of the base.
Layers for which PEFT computes something else than the merged layer would are refused here.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.lora.base_layers.linear_forward import linear_problem, parametrisation_problem
from minilora.lora.layer import (
    AdapterBase,
    LoRAAdapter,
    LoRALayer,
    dropout_layer,
    init_down_projection,
    linear_features,
    scaling,
)
from minilora_kernels.quantized_weight import QuantizedWeight

CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the number of dimensions of the weight
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EmbeddingAdapter(AdapterBase):
    """ΔE = s · (B A)ᵀ for an nn.Embedding.

    An output layer that shares the embedding's weight can share the adapter too. Dropout acts only
    on the input of the output layer, as in PEFT, because token ids cannot be dropped.

    Args:
        base: The embedding.
        r: Rank of the correction.
        lora_alpha: Strength α of the correction.
        lora_dropout: Dropout probability.
        use_rslora: Use s = α/√r instead of s = α/r.
        lora_bias: Must be False.
        seed: Seed of the initial B.

    Raises:
        ValueError: The embedding does not compute E[ids] alone, or a hyperparameter is outside its
            range.
    """

    lora_bias = None

    def __init__(
        self,
        base: nn.Embedding,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        lora_bias: bool,
        *,
        seed: int,
    ):
        super().__init__()
        _check_embedding(base, lora_bias)
        self.scaling = scaling(r, lora_alpha, lora_dropout, use_rslora)
        self.r = r
        self.lora_alpha = lora_alpha
        self.dropout = dropout_layer(lora_dropout)
        A = torch.zeros(r, base.num_embeddings, dtype=torch.float32)  # (r, V)
        B = torch.empty(base.embedding_dim, r, dtype=torch.float32)  # (D, r)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        generator = torch.Generator("cpu").manual_seed(seed)  # the same values on every device
        values = torch.randn(
            B.shape, dtype=torch.float32, device="cpu", generator=generator
        )  # (D, r)
        self.lora_B.data.copy_(values)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + ΔE[x] for an embedding, or y + ΔE x for an output layer.

        Args:
            x: Token ids (…) for an embedding; hidden states (…, D) for an output layer.
            y: Output of the layer so far: (…, D) for an embedding, (…, V) for an output layer.
            base: The frozen embedding or output layer.

        Returns:
            The corrected output, with the shape of y.
        """
        if not isinstance(base, nn.Embedding):
            z = F.linear(self.dropout(x), self.lora_B.T.to(x.dtype))  # (…, r)
            return y + F.linear(self.scaling * z, self.lora_A.T.to(x.dtype))  # (…, V)
        z = F.embedding(
            x, self.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )  # (…, r)
        # The embeddings of Gemma and BART multiply E[ids] by embed_scale.
        s = self.scaling * getattr(base, "embed_scale", 1.0)
        return y + F.linear(s * z.to(y.dtype), self.lora_B.to(y.dtype))  # (…, D)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s · (B A)ᵀ, the matrix that merging adds to E and to the weight of a shared head.

        Args:
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (V, D).
        """
        A = self.lora_A.to(dtype)  # (r, V)
        B = self.lora_B.to(dtype)  # (D, r)
        return (self.scaling * B @ A).T  # (V, D)

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """Return the parameters under the names that PEFT's files use.

        Args:
            base: The frozen layer. PEFT gives an output layer a linear adapter, so its A is Bᵀ and
                its B is Aᵀ.

        Returns:
            The live parameters, or views of them.
        """
        if isinstance(base, nn.Embedding):
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        return {"lora_A.weight": self.lora_B.T, "lora_B.weight": self.lora_A.T}


def _check_embedding(base: nn.Embedding, lora_bias: bool) -> None:
    """Raise ValueError for an embedding that does not compute E[ids] alone, and for a bias."""
    has_own_forward = type(base).forward is not nn.Embedding.forward
    problems = []
    if base.max_norm is not None:
        problems.append("max_norm")
    if base.sparse:
        problems.append("sparse")
    if has_own_forward and not hasattr(base, "embed_scale"):
        problems.append("an overridden forward")
    if problems:
        raise ValueError(
            f"an embedding with {problems[0]} computes something else than E[ids]: leave it out."
        )
    if lora_bias:
        raise ValueError(
            "lora_bias: an embedding has no bias, in PEFT neither. Leave it out of target_modules."
        )


class ConvAdapter(AdapterBase):
    """s · (B ∗ (A ∗ x) + b) for nn.Conv1d, nn.Conv2d or nn.Conv3d.

    Args:
        base: The convolution.
        r: Rank of the correction, a multiple of the base's groups.
        lora_alpha: Strength α of the correction.
        lora_dropout: Dropout probability of the adapter's input.
        use_rslora: Use s = α/√r instead of s = α/r.
        lora_bias: Train a bias b with B.
        seed: Seed of the initial A.

    Raises:
        ValueError: The convolution cannot be merged with an adapter in PEFT's format, or a
            hyperparameter is outside its range.
    """

    def __init__(
        self,
        base: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        lora_bias: bool,
        *,
        seed: int,
    ):
        super().__init__()
        _check_convolution(base, r)
        out_channels = base.out_channels
        in_shape = (base.in_channels, *base.kernel_size)
        self.scaling = scaling(r, lora_alpha, lora_dropout, use_rslora)
        self.r = r
        self.lora_alpha = lora_alpha
        self.groups = base.groups
        self.dropout = dropout_layer(lora_dropout)
        A = torch.empty(r, *in_shape, dtype=torch.float32)  # (r, in, k…)
        kernel_of_one = [1] * len(base.kernel_size)
        B = torch.zeros(out_channels, r // base.groups, *kernel_of_one, dtype=torch.float32)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)  # (out, r/groups, 1…)
        self.lora_bias = None
        if lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(out_channels, dtype=torch.float32))  # (out,)
        init_down_projection(self.lora_A, seed)

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """Return y + s · (B ∗ (A ∗ dropout(x)) + b), computed in x.dtype.

        Args:
            x: Input of the layer, (N, in, …).
            y: Output of the layer so far, (N, out, …).
            base: The frozen convolution.

        Returns:
            The corrected output, (N, out, …).
        """
        A = self.lora_A.to(x.dtype)  # (r, in, k…)
        B = self.lora_B.to(x.dtype)  # (out, r/groups, 1…)
        b = None
        if self.lora_bias is not None:
            b = self.scaling * self.lora_bias.to(x.dtype)  # (out,)
        convolve: Any = CONVOLVE[A.dim()]
        z = convolve(self.dropout(x), A, None, base.stride, base.padding)  # (N, r, …)
        return y + convolve(self.scaling * z, B, b, groups=self.groups)  # (N, out, …)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s · B A, the tensor that merging adds to W.

        Args:
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (out, in, k…).

        Raises:
            ValueError: The convolution has groups. ΔW would connect channels that W separates.
        """
        if self.groups > 1:
            raise ValueError(
                f"a convolution with {self.groups} groups cannot hold its adapter, "
                "which reads all input channels: keep it unmerged (save_adapter)."
            )
        A = self.lora_A.to(dtype)  # (r, in, k…)
        B = self.lora_B.to(dtype)  # (out, r, 1…)
        delta = self.scaling * B.flatten(1) @ A.flatten(1)  # (out, in · k…)
        return delta.view(len(B), *A.shape[1:])  # (out, in, k…)


def _check_convolution(base: nn.Conv1d | nn.Conv2d | nn.Conv3d, r: int) -> None:
    """Raise ValueError for a convolution that has no mergeable adapter in PEFT's format."""
    own_forward = type(base).forward not in [kind.forward for kind in _CONVOLUTIONS]
    dilated = any(
        kernel > 1 and dilation > 1
        for kernel, dilation in zip(base.kernel_size, base.dilation, strict=True)
    )
    problems = []
    if base.padding_mode != "zeros":
        problems.append("padding_mode")
    if dilated:
        problems.append("dilation")
    if own_forward:
        problems.append("an overridden forward")
    if problems:
        raise ValueError(
            f"a convolution with {problems[0]} has no adapter in PEFT's format that can be merged: "
            "leave it out."
        )
    if r % base.groups:
        raise ValueError(
            f"r: expected a multiple of the convolution's {base.groups} groups, got {r}."
        )


Adapter = LoRAAdapter | EmbeddingAdapter | ConvAdapter


def unwrapped(layer: nn.Module) -> nn.Module:
    """Return the base of a LoRALayer, or the module itself.

    Args:
        layer: Any module.
    """
    if isinstance(layer, LoRALayer):
        return layer.base_layer
    return layer


def active_adapters(layer: nn.Module) -> list[Adapter]:
    """Return the active adapters of a layer in their order; an empty list for other modules.

    Args:
        layer: Any module.
    """
    if not isinstance(layer, LoRALayer):
        return []
    return [cast(Adapter, layer.adapters[name]) for name in layer.active]


def is_linear(module: nn.Module) -> bool:
    """Return True for nn.Linear, QuantizedLinear, Conv1D, and a LoRALayer around one.

    The output projection of nn.MultiheadAttention is excluded: the attention reads its weight and
    never calls the layer.

    Args:
        module: Any module.
    """
    try:
        linear_features(unwrapped(module))
    except ValueError:
        return False
    base = unwrapped(module)
    has_weight = isinstance(getattr(base, "weight", None), Tensor | QuantizedWeight)
    return has_weight and not isinstance(base, NonDynamicallyQuantizableLinear)


def is_adaptable(module: nn.Module) -> bool:
    """Return True if there is an adapter for this kind of module.

    Args:
        module: Any module.
    """
    return isinstance(unwrapped(module), (nn.Embedding, *_CONVOLUTIONS)) or is_linear(module)


def forward_problem(layer: nn.Module) -> str | None:
    """Return why a layer for which there is a kind of adapter cannot have one; None if it can.

    The adapters of embeddings and convolutions check their layers themselves.

    Args:
        layer: A layer for which `is_adaptable` is true.
    """
    base = unwrapped(layer)
    if isinstance(base, (nn.Embedding, *_CONVOLUTIONS)):
        return parametrisation_problem(base)
    return linear_problem(base)


def new_adapter(
    layer: nn.Module,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    lora_bias: bool,
    *,
    seed: int,
) -> Adapter:
    """Return a new adapter of the kind that fits a layer.

    Args:
        layer: The layer, or a LoRALayer around it.
        r: Rank of the correction.
        lora_alpha: Strength α of the correction.
        lora_dropout: Dropout probability.
        use_rslora: Use s = α/√r instead of s = α/r.
        lora_bias: Train a bias with B.
        seed: Seed of the initial values.

    Raises:
        ValueError: The layer computes something else than its kind, or a hyperparameter does not
            fit the layer.
    """
    base = unwrapped(layer)
    problem = forward_problem(base)
    if problem is not None:
        raise ValueError(problem)
    options = (r, lora_alpha, lora_dropout, use_rslora, lora_bias)
    if isinstance(base, nn.Embedding):
        return EmbeddingAdapter(base, *options, seed=seed)
    if isinstance(base, _CONVOLUTIONS):
        return ConvAdapter(base, *options, seed=seed)
    in_features, out_features = linear_features(base)
    return LoRAAdapter(in_features, out_features, *options, seed=seed)
