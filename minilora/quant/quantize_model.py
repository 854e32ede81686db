"""Quantisation of a whole model: every linear layer but the output layer becomes an NF4Linear."""

import warnings
from collections.abc import Sequence

from torch import nn

from minilora.common import (
    ends_with,
    ends_with_any,
    left_out,
    output_layer,
    tied_modules,
    unknown_name,
)
from minilora.quant.nf4_linear import NF4Linear


def quantize_model(
    model: nn.Module,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
) -> list[str]:
    """Replace every nn.Linear of a model by an NF4Linear, in place and one at a time.

    The output layer stays dense, and so does a layer that shares its weight with another module. A
    warning names the matrices that stay dense for another reason than `skip`, with their share of
    the bytes: experts in one parameter, subclasses of nn.Linear, and layers with a shared weight.

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
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    skip = list(skip or ())
    for entry in skip:
        if not any(ends_with(path, entry) for path in linears):
            raise unknown_name("skip", entry, linears)
    output = output_layer(model)
    tied = tied_modules(model)
    names = []
    for path, layer in linears.items():
        is_tied = path.removesuffix(".base_layer") in tied
        if layer is not output and not is_tied and not ends_with_any(path, skip):
            names.append(path)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantise (an output layer stays dense)."
        )
    return names


def replace_layers(model: nn.Module, names: Sequence[str], blocksize: int, double_quant: bool):
    """Replace layers by NF4Linear, in place and one at a time.

    Args:
        model: The model to change.
        names: Names of its nn.Linear layers.
        blocksize: Number of values that share one scale.
        double_quant: Store the scales in 8 bits instead of 32.
    """
    for path in names:
        dense = model.get_submodule(path)  # replaced below, so that the dense weight is freed
        assert isinstance(dense, nn.Linear)
        model.set_submodule(path, NF4Linear.from_linear(dense, blocksize, double_quant))


def _warn_of_dense_matrices(model: nn.Module, names: list[str], skip: Sequence[str]) -> None:
    """Warn of matrices that stay dense although the caller did not name them."""
    output = output_layer(model)
    tied = tied_modules(model)
    in_4_bits = list(names)
    chosen = []
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            in_4_bits.append(path)
        is_output = module is output and path not in tied
        if is_output or ends_with_any(path.removesuffix(".base_layer"), skip) or _is_factor(path):
            chosen.append(path)
    dense = left_out(model, in_4_bits, chosen)
    if dense is not None:
        warnings.warn(
            f"quantize_model replaces {len(names)} layers, and the rest stays dense: {dense}. "
            "Only a layer of the class nn.Linear with a weight of its own becomes 4-bit.",
            stacklevel=3,
        )


def _is_factor(path: str) -> bool:
    """Return True for the low-rank factors of an adapter, which always stay dense."""
    return ".adapters." in f".{path}."
