"""The dense weight W of a frozen layer, for every kind of storage that can be read exactly.

    layer                                W
    nn.Linear, nn.Embedding, nn.Conv…    its parameter
    Conv1D of transformers               its parameter, which holds Wᵀ (in, out)
    NF4Linear                            codebook value · absmax of the block
    GGUFLinear                           as in llama.cpp, by the type of its blocks
    Linear4bit of bitsandbytes           the same, or FP4, computed by bitsandbytes
    Linear8bitLt of bitsandbytes         code · absmax of the row / 127
    tensor with its own `dequantize`     its result (torchao)
    everything else                      refused: codes with an unknown scale, or another forward

Merging, the merge report, DoRA, PiSSA and LoftQ need W. Plain LoRA does not, and can be trained on
a layer without a dense W.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import is_conv1d
from minilora.lora.base_layers.linear_forward import (
    holds_codes,
    linear_problem,
    parametrisation_problem,
)
from minilora.lora.layer import linear_features
from minilora.quant.quantized_linear import QuantizedEmbedding, QuantizedLinear

INT8_LARGEST = 127  # the code of the largest value of a row in Linear8bitLt
KEEP_UNMERGED = (
    "Plain LoRA can train on it (no use_dora, init_lora_weights=True) and ml.save_adapter keeps "
    "the adapter. For everything else, load the model without this quantisation, in 16 bits."
)


def bitsandbytes_bits(layer: nn.Module) -> int | None:
    """Return 4 or 8 for a quantised layer of bitsandbytes; None for every other layer.

    Args:
        layer: Any layer, without adapters.
    """
    weight: Any = getattr(layer, "weight", None)
    if not type(weight).__module__.startswith("bitsandbytes.") or not holds_codes(layer):
        return None  # not of bitsandbytes, not quantised yet, or in 8 bits with a dense weight
    return {"Params4bit": 4, "Int8Params": 8}.get(type(weight).__name__)


def is_quantized(layer: nn.Module) -> bool:
    """Return True for a layer that merging makes dense: quantised here or by bitsandbytes.

    Args:
        layer: Any layer, without adapters.
    """
    return (
        isinstance(layer, QuantizedLinear | QuantizedEmbedding)
        or bitsandbytes_bits(layer) is not None
    )


def dense_weight(layer: nn.Module) -> Tensor:
    """Return W in fp32, in the layout of the layer: (out, in) for most, (in, out) for Conv1D.

    Args:
        layer: A layer without adapters.

    Raises:
        ValueError: The dense weight of this kind of layer cannot be read.
    """
    if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
        return layer.dequantize(torch.float32)
    bits = bitsandbytes_bits(layer)
    if bits == 4:
        return _bitsandbytes_4_bit(layer)
    if bits == 8:
        return _bitsandbytes_8_bit(layer)
    problem = no_dense_weight(layer)
    if problem is not None:
        raise ValueError(problem)
    weight = layer.get_parameter("weight").detach()
    if _can_dequantize(weight):
        weight = weight.dequantize()
    return weight.float()


def linear_weight(layer: nn.Module) -> Tensor:
    """Return W (out, in) of a linear layer, dense and in fp32.

    Args:
        layer: A linear layer without adapters.

    Raises:
        ValueError: The dense weight of this kind of layer cannot be read.
    """
    W = dense_weight(layer)
    return W.T if is_conv1d(layer) else W


def no_dense_weight(layer: nn.Module) -> str | None:
    """Return why the dense weight of a layer cannot be read; None if `dense_weight` reads it.

    Args:
        layer: A layer without adapters.
    """
    if is_quantized(layer):
        return None
    if holds_codes(layer) and not _can_dequantize(getattr(layer, "weight", None)):
        weight: Any = getattr(layer, "weight", None)
        dtype = getattr(weight, "dtype", type(weight).__name__)
        return (
            f"{type(layer).__name__} holds codes ({dtype}) and not its weight: only the layer "
            f"itself knows the scale that belongs to them. {KEEP_UNMERGED}"
        )
    try:
        linear_features(layer)
    except ValueError:  # an embedding or a convolution, whose adapter checks the forward
        return parametrisation_problem(layer)
    return linear_problem(layer)


def dense_dtype(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype from which the weight of a layer was made; None if the layer lacks it.

    Args:
        layer: A layer without adapters.
    """
    if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
        return layer.dtype
    bits = bitsandbytes_bits(layer)
    weight: Any = layer.weight
    if bits == 4:
        state = weight.quant_state
        return getattr(state, "original_dtype", state.dtype)  # the layout for CPUs has another
    if bits == 8:
        return None
    return weight.dtype


def _can_dequantize(weight: Any) -> bool:
    """Return True for a tensor subclass that can make itself dense."""
    if not isinstance(weight, Tensor):
        return False
    return type(weight).dequantize is not Tensor.dequantize


def _bitsandbytes_4_bit(layer: nn.Module) -> Tensor:
    """Return W (out, in) of Linear4bit, computed by bitsandbytes in the dtype of its original."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return dequantize_4bit(weight.data, weight.quant_state).float()  # (out, in)
    # After generation on a CPU the codes are in the layout of a product with AVX-512. Its absmax is
    # (in / blocksize, out), dense and in bf16, and is kept: quantising it again would change W.
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)  # the conversion changes it in place
    absmax = state.absmax.T.reshape(-1).float()  # (blocks,)
    state.original_nested = False
    codes, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = absmax
    return dequantize_4bit(codes, state).float()  # (out, in)


def _bitsandbytes_8_bit(layer: nn.Module) -> Tensor:
    """Return W (out, in) of Linear8bitLt: code · absmax of the row / 127."""
    weight: Any = layer.weight
    state: Any = layer.state
    absmax = state.SCB  # after the first forward pass; before it, the weight holds it
    if absmax is None:
        absmax = weight.SCB
    absmax = absmax.to(weight.device).float()  # (out,)
    return weight.data.float() * (absmax / INT8_LARGEST)[:, None]  # (out, in)
