"""The check that a linear layer computes W x + b, and nothing else.

An adapter adds s · B A x to the output of its base, and merging adds s · B A to W. Both are the
same only if the base computes W x + b. These layers have `in_features` and a weight, but compute
something else:

    subclass with its own forward   a scaled or activated output, or fake quantisation
    router of experts               returns several tensors
    parametrised layer              weight_norm and spectral_norm compute W in every forward pass

nn.Linear, QuantizedLinear and Conv1D of transformers are known. A layer with another forward is
tried: it runs on three random inputs in fp32. Some classes, such as FalconLinear, compute W x + b
in other words and pass. A layer that stores codes (FP8, int8, 4 bits) is not tried, because its
forward reads scales that are unknown here. It can have an adapter, but no dense weight
(dense_weight.py).
"""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minilora.common import is_conv1d
from minilora.quant.quantized_linear import QuantizedLinear

INPUT_SCALES = (1.0, 30.0, 1000.0)  # one input each, because a layer may clip large values
TOLERANCE = 1e-4  # of the norm of an output in fp32, far above rounding, far below 8 bits
LEAVE_OUT = "Leave it out of target_modules, or name it in exclude_modules."

# The errors of a forward that is called with an input that it does not take.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# The result of `_try` for each layer that was tried.
_tried: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def holds_codes(layer: nn.Module) -> bool:
    """Return True if the weight of a layer is no floating-point tensor of 16 bits or more.

    Args:
        layer: A layer with a weight.
    """
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or getattr(weight, "quant_state", None) is not None:
        return True  # a QuantizedWeight, or 4 bits of bitsandbytes, which may be stored as bf16
    return not weight.is_floating_point() or weight.dtype.itemsize < 2


def parametrisation_problem(layer: nn.Module) -> str | None:
    """Return why a layer with a computed weight cannot have an adapter; None for other layers.

    Args:
        layer: Any layer, without adapters.
    """
    if isinstance(layer, QuantizedLinear):
        return None
    stored = "weight" in layer._parameters or "weight" in layer._buffers
    if stored and not parametrize.is_parametrized(layer):
        return None
    return (
        f"{type(layer).__name__} computes its weight in every forward pass (weight_norm, "
        "spectral_norm or another parametrisation), so it is not frozen and cannot be saved or "
        'merged. Make it plain before inject: parametrize.remove_parametrizations(layer, "weight"), '
        'or remove_weight_norm, remove_spectral_norm or prune.remove(layer, "weight") for the older '
        "forms, all in torch.nn.utils. "
        f"{LEAVE_OUT}"
    )


def linear_problem(layer: nn.Module) -> str | None:
    """Return why a linear layer cannot have an adapter; None if it computes W x + b.

    Args:
        layer: A layer with `in_features` and `out_features`, or Conv1D of transformers.
    """
    problem = parametrisation_problem(layer)
    if problem is not None or _has_known_forward(layer) or holds_codes(layer):
        return problem
    if layer not in _tried:
        _tried[layer] = _try(layer)
    return _tried[layer]


def _has_known_forward(layer: nn.Module) -> bool:
    """Return True if the forward of a layer is known to compute W x + b."""
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook"):
        return False  # replaced on this object; _hf_hook: accelerate moves the weight, no more
    forward = type(layer).forward
    if forward in (nn.Linear.forward, QuantizedLinear.forward):
        return True
    if is_conv1d(layer):
        return forward.__module__ == "transformers.pytorch_utils"
    return forward.__module__.startswith("bitsandbytes.")  # W x + b with a quantised W or x


@torch.no_grad()
def _try(layer: nn.Module) -> str | None:
    """Run a copy of a layer in fp32 and compare it with W x + b; return the difference in words."""
    name = type(layer).__name__
    weight = layer.get_parameter("weight")
    W = weight.T if is_conv1d(layer) else weight  # (out, in)
    x = torch.randn(
        len(INPUT_SCALES),
        W.shape[1],
        dtype=torch.float32,
        device="cpu",
        generator=torch.Generator("cpu").manual_seed(0),
    )  # (3, in)
    x = x * torch.tensor(INPUT_SCALES, dtype=torch.float32, device="cpu")[:, None]
    x = x.to(W.device)
    y = _output(layer, x[None])
    if isinstance(y, Exception):
        y = _output(layer, x)  # some layers take no batches of sequences
    if isinstance(y, Exception):
        return (
            f"{name} has its own forward, which fails for an input of shape {tuple(x.shape)} "
            f"({type(y).__name__}: {y}), so it is no layer that computes W x + b. {LEAVE_OUT}"
        )
    if not isinstance(y, Tensor):
        return (
            f"{name} has its own forward, which returns {type(y).__name__} and not one tensor, "
            f"as a router of experts does. {LEAVE_OUT}"
        )
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias = bias.float()  # (out,)
    expected = F.linear(x, W.float(), bias)  # (3, out)
    right_shape = y.shape[-2:] == expected.shape and y.numel() == expected.numel()
    if right_shape and (y.is_meta or _rows_agree(y.float().view_as(expected), expected)):
        return None
    return (
        f"{name} has its own forward, which computes something else than W x + b, so an adapter "
        f"could not be merged into its weight. {LEAVE_OUT}"
    )


def _output(layer: nn.Module, x: Tensor) -> Any:
    """Return the output of a copy of a layer in eval mode and in fp32, or the error it raises."""
    shared: Any = {id(parameter): parameter for parameter in layer.parameters()}
    try:
        copied = copy.deepcopy(layer, shared).eval()  # the forward may change buffers
        tensors = {}
        for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        with torch.autocast(x.device.type, enabled=False), torch.random.fork_rng(devices=[]):
            return torch.func.functional_call(copied, tensors, (x,))
    except _ERRORS as error:
        return error


def _rows_agree(found: Tensor, expected: Tensor) -> bool:
    """Return True if each row differs by at most TOLERANCE of its norm."""
    errors = torch.linalg.vector_norm(found - expected, dim=1)  # (3,)
    norms = torch.linalg.vector_norm(expected, dim=1)  # (3,)
    return bool((errors <= TOLERANCE * norms).all())  # False for NaN
