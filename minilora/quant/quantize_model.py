"""Quantisation of a whole model: every linear layer but the output layer becomes an NF4Linear."""

from collections.abc import Sequence

from torch import nn

from minilora.common import ends_with, ends_with_any, output_layer, tied_modules, unknown_name
from minilora.quant.nf4_linear import NF4Linear


def quantize_model(
    model: nn.Module,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
) -> list[str]:
    """Replace every nn.Linear of a model by an NF4Linear, in place and one at a time.

    The output layer stays dense, and so does a layer that shares its weight with another module.

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
    for path in names:
        dense = linears.pop(path)  # the last reference, so that the dense weight is freed
        model.set_submodule(path, NF4Linear.from_linear(dense, blocksize, double_quant))
    return names
