"""DoRA for embeddings and convolutions, with the arithmetic and the file keys of PEFT.

    embedding      y = g ∘ (E[ids] + s (B A)ᵀ[ids])              m, g (D,)
    convolution    y = b + g ∘ (W ∗ x + s · B ∗ (A ∗ x))         m, g (out,)

g = m / n as in dora.py. n has one norm for each row of a matrix:

    embedding      n = ‖(E + s (B A)ᵀ)ᵀ‖, of (D, V)      one length a dimension, over all tokens
    convolution    n = ‖W + s B A‖, of (out, in · k…)    one length an output channel

V is the vocabulary, D the embedding dimension, k… the kernel. The lengths of an embedding are those
of the columns of E. Therefore m changes the embeddings of all tokens, and training also changes
the tokens that it never meets. An embedding with an embed_scale multiplies by it after the norm.
Dropout does not act on token ids, as in PEFT.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.base_layers.dense_weight import dense_weight
from minilora.lora.embedding_conv import (
    CONVOLVE,
    Adapter,
    ConvAdapter,
    EmbeddingAdapter,
    unwrapped,
)
from minilora.lora.variants.dora import DoRAAdapter


class DoRAEmbeddingAdapter(DoRAAdapter):
    """A, B and the column lengths m (D,) of one embedding, in fp32.

    Args:
        plain: A plain adapter, whose A, B and hyperparameters are taken over.
        base: The frozen embedding.
    """

    def flat_weight(self, base: nn.Module) -> Tensor:
        """Return Eᵀ, the matrix whose rows have the lengths m: (D, V), fp32.

        Args:
            base: The frozen embedding.
        """
        return dense_weight(base).T

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """Return y + (g − 1) ∘ y + g ∘ s (B A)ᵀ[ids], computed in y.dtype, with g in fp32.

        Args:
            x: Token ids, (…).
            y: Output of the frozen embedding, (…, D).
            base: The frozen embedding.

        Returns:
            The corrected output, (…, D).
        """
        g = self.lora_magnitude_vector / self.norms(base)  # (D,)
        z = F.embedding(
            x, self.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )  # (…, r)
        # y contains the embed_scale of Gemma and BART already.
        s = self.scaling * getattr(base, "embed_scale", 1.0)
        BA = F.linear(s * z.to(y.dtype), self.lora_B.to(y.dtype))  # (…, D), contains s
        return y + (g - 1).to(y.dtype) * y + g.to(y.dtype) * BA

    def delta_beside(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return g ∘ (E + s (B A)ᵀ) − E, the matrix that merging adds to E.

        Args:
            base: The frozen embedding.
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (V, D).
        """
        return super().delta_beside(base, dtype).T  # (V, D)

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """Return the parameters under the names that PEFT's files use.

        Args:
            base: The frozen embedding, which is not read.

        Returns:
            The live parameters, not copies of them.
        """
        return {
            "lora_embedding_A": self.lora_A,
            "lora_embedding_B": self.lora_B,
            "lora_magnitude_vector": self.lora_magnitude_vector,
        }


class DoRAConvAdapter(DoRAAdapter):
    """A, B and the lengths m (out,) of the output channels of one convolution, in fp32.

    Args:
        plain: A plain adapter, whose A, B and hyperparameters are taken over.
        base: The frozen convolution.

    Raises:
        ValueError: The convolution has groups.
    """

    def __init__(self, plain: ConvAdapter, base: nn.Module):
        if plain.groups > 1:
            raise ValueError(
                f"use_dora: a convolution with {plain.groups} groups has no sum W + s B A whose "
                "lengths could train, because its adapter reads channels that W separates. "
                "Leave it out of target_modules, or leave use_dora out."
            )
        super().__init__(plain, base)

    def flat_weight(self, base: nn.Module) -> Tensor:
        """Return W as the matrix whose rows have the lengths m: (out, in · k…), fp32.

        Args:
            base: The frozen convolution.
        """
        return dense_weight(base).flatten(1)

    def low_rank_output(self, x: Tensor, base: Any) -> Tensor:
        """Return s · B ∗ (A ∗ x), computed in x.dtype.

        Args:
            x: Input of the layer after dropout, (N, in, …).
            base: The frozen convolution.

        Returns:
            The output of the low-rank part alone, (N, out, …).
        """
        A = self.lora_A.to(x.dtype)  # (r, in, k…)
        B = self.lora_B.to(x.dtype)  # (out, r, 1…)
        convolve: Any = CONVOLVE[A.dim()]
        z = convolve(x, A, None, base.stride, base.padding)  # (N, r, …)
        return convolve(self.scaling * z, B)  # (N, out, …)

    def delta_beside(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return g ∘ (W + s B A) − W, the tensor that merging adds to W.

        Args:
            base: The frozen convolution.
            dtype: Dtype of the computation and of the result.

        Returns:
            The change of the weight, (out, in, k…).
        """
        delta = super().delta_beside(base, dtype)  # (out, in · k…)
        return delta.view(len(delta), *self.lora_A.shape[1:])  # (out, in, k…)

    def tensors(self, base: nn.Module) -> dict[str, Tensor]:
        """Return the parameters under the names and with the shapes that PEFT's files use.

        Args:
            base: The frozen convolution, which is not read.

        Returns:
            The live parameters, or views of them. m is (1, out, 1…) in a file.
        """
        positions = [1] * (self.lora_A.dim() - 2)
        m = self.lora_magnitude_vector.view(1, -1, *positions)  # (1, out, 1…)
        return super().tensors(base) | {"lora_magnitude_vector": m}


def begin(plain: Adapter, layer: nn.Module) -> DoRAAdapter:
    """Return a DoRA adapter that changes nothing yet.

    Args:
        plain: A new plain adapter of any kind.
        layer: The layer, or a LoRALayer around it.

    Raises:
        ValueError: The layer is a convolution with groups.
    """
    base = unwrapped(layer)
    if isinstance(plain, EmbeddingAdapter):
        return DoRAEmbeddingAdapter(plain, base)
    if isinstance(plain, ConvAdapter):
        return DoRAConvAdapter(plain, base)
    return DoRAAdapter(plain, base)
