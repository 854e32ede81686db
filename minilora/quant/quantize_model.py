"""Quantisation of a whole model: every linear layer but those of the head becomes an NF4Linear.

Three kinds of layers stay dense:

    head      the output layer, and the modules next to the body of a transformers model: `lm_head`,
              `score`, `classifier`. Its errors reach the output unweakened, and a classifier's head
              is new and trains.
    tied      a layer that shares its weight with another module
    trained   parts of adapters: PEFT's factors, and modules that train with an adapter
"""

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from minilora.common import (
    ends_with,
    ends_with_any,
    get_submodule,
    is_within,
    left_out,
    named_modules,
    output_layer,
    set_submodule,
    tied_modules,
    unknown_name,
    unwrap_model,
)
from minilora.common.progress import ProgressBar
from minilora.common.wrappers import peft_layers
from minilora.quant.nf4_linear import NF4Linear

CLASSIFIERS = ("score", "classifier")  # names of the heads of sequence classifiers


def quantize_model(
    model: nn.Module,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
) -> list[str]:
    """Replace every nn.Linear of a model by an NF4Linear, in place and one at a time.

    The head stays dense: the output layer and a classifier's `score` or `classifier`. So does a
    layer that shares its weight with another module, and everything that trains with an adapter. A
    warning names the matrices that stay dense for another reason than these and `skip`, with their
    share of the bytes: experts in one parameter, subclasses of nn.Linear, and layers with a shared
    weight.

    Args:
        model: The model to change.
        blocksize: Number of values that share one scale.
        double_quant: Store the scales in 8 bits instead of 32.
        skip: Names, or ends of names, of layers that stay dense.

    Returns:
        Names of the replaced layers.

    Raises:
        ValueError: An entry of `skip` matches no linear layer, or no layer can be quantised. The
            model is then unchanged.
    """
    model = unwrap_model(model)
    names = layers_to_quantize(model, skip)
    _warn_of_dense_matrices(model, names, skip or ())
    replace_layers(model, names, blocksize, double_quant)
    return names


def layers_to_quantize(model: nn.Module, skip: Sequence[str] | None = None) -> list[str]:
    """Return the names of the layers that `quantize_model` replaces.

    Args:
        model: The model, which is not changed.
        skip: Names, or ends of names, of layers that stay dense.

    Raises:
        ValueError: An entry of `skip` matches no linear layer, or no layer can be quantised.
    """
    linears = _linear_layers(model)
    skip = list(skip or ())
    for entry in skip:
        if not any(ends_with(path, entry) for path in linears):
            raise unknown_name("skip", entry, linears)
    dense = _head(model, linears) | _tied(model, linears) | _trained_layers(model, linears)
    names = []
    for path in linears:
        if path not in dense and not ends_with_any(path, skip):
            names.append(path)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantise: the head, layers with a shared "
            "weight and parts of adapters stay dense."
        )
    return names


def replace_layers(
    model: nn.Module, names: Sequence[str], blocksize: int, double_quant: bool
) -> None:
    """Replace layers by NF4Linear, in place and one at a time.

    Args:
        model: The model to change.
        names: Names of its nn.Linear layers.
        blocksize: Number of values that share one scale.
        double_quant: Store the scales in 8 bits instead of 32.
    """
    with ProgressBar("quantize", len(names), "layer") as bar:
        for path in names:
            dense = get_submodule(model, path)  # replaced below, so that the dense weight is freed
            assert isinstance(dense, nn.Linear)
            set_submodule(model, path, NF4Linear.from_linear(dense, blocksize, double_quant))
            bar.update()


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in named_modules(model) if type(module) is nn.Linear}


def _head(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of the linear layers that belong to the head."""
    output = output_layer(model)
    output = getattr(output, "base_layer", output)  # an adapter may be around it
    body = getattr(model, "base_model_prefix", "")  # of a transformers model with a head
    has_body = bool(body) and body in model._modules
    head = set()
    for path, layer in linears.items():
        plain_path = path.removesuffix(".base_layer")
        is_head = layer is output or ends_with_any(plain_path, CLASSIFIERS)
        if is_head or (has_body and not is_within(path, body)):
            head.add(path)
    return head


def _tied(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of the linear layers that share their weight with another module."""
    tied = tied_modules(model)
    return {path for path in linears if path.removesuffix(".base_layer") in tied}


def _trained_layers(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of the linear layers that are parts of adapters, minilora's or PEFT's."""
    from_peft = peft_layers(model)
    has_adapters = bool(from_peft) or any(
        "adapters" in module._modules for _, module in named_modules(model)
    )
    trained = set()
    for path, layer in linears.items():
        in_peft = any(is_within(path, outer) for outer in from_peft)
        # Without adapters every layer requires grad, as transformers loads it.
        trains = has_adapters and layer.get_parameter("weight").requires_grad
        if trains or (in_peft and not path.endswith(".base_layer")):
            trained.add(path)
    return trained


def _warn_of_dense_matrices(model: nn.Module, names: list[str], skip: Sequence[str]) -> None:
    """Warn of matrices that stay dense although neither the caller nor the docstring named them."""
    linears = _linear_layers(model)
    chosen = _head(model, linears) - _tied(model, linears) | _trained_layers(model, linears)
    in_4_bits = list(names)
    for path, module in named_modules(model):
        if isinstance(module, NF4Linear):
            in_4_bits.append(path)
        if ends_with_any(path.removesuffix(".base_layer"), skip) or _is_factor(path):
            chosen.add(path)
    dense = left_out(model, in_4_bits, chosen)
    if dense is not None:
        warnings.warn(
            f"quantize_model replaces {len(names)} layers, and the rest stays dense: {dense}. "
            "Only an nn.Linear that shares its weight with no other module becomes 4-bit.",
            stacklevel=3,
        )


def _is_factor(path: str) -> bool:
    """Return True for the low-rank factors of an adapter, which always stay dense."""
    return ".adapters." in f".{path}."
