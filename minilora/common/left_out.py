"""A report of the matrices that a step over a whole model leaves out, for one warning.

`quantize_model` and `inject` with "all-linear" work on layers: modules that multiply by one matrix.
Other modules hold matrices too, and a model can have most of its bytes in them. Mixtral, Qwen3-MoE,
OLMoE and gpt-oss in transformers 5 hold all experts of a layer in one parameter (experts, out, in),
which is no layer. Embeddings, convolutions and vectors are not counted: nobody expects them here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from minilora.common.wrappers import named_modules

SMALL_SHARE = 0.01  # of the bytes; below it a matrix outside linear layers is not worth a warning
SHOWN = 4  # groups of names in the text
_NOT_COUNTED = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class LeftOut:
    """The matrices of a model that were left out.

    Attributes:
        names: Names of the tensors with their shapes, largest first. Names that differ only in
            numbers are one entry.
        share: Their share of the bytes of all parameters and buffers, from 0 to 1.
    """

    names: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        shown = ", ".join(self.names[:SHOWN])
        if len(self.names) > SHOWN:
            shown += f" and {len(self.names) - SHOWN} more names"
        return f"{self.share:.1%} of the model's bytes are in matrices left out: {shown}"


def left_out(model: nn.Module, covered: Iterable[str], chosen: Iterable[str]) -> LeftOut | None:
    """Return the matrices of a model that were left out; None if there are none worth a warning.

    A warning is due for every linear layer, for every stack of matrices, and for other matrices
    that hold at least 1 % of the bytes.

    Args:
        model: The model, before or after the step.
        covered: Paths of the modules that were included.
        chosen: Paths of the modules that the user, or the documentation, leaves out by name.
    """
    included = (*covered, *chosen)
    prefixes = tuple(f"{path}." for path in included)
    same_paths = set(included)
    found: dict[str, Tensor] = {}
    is_due = False
    for path, module in named_modules(model):
        inside = path in same_paths or path.startswith(prefixes)
        if inside or isinstance(module, _NOT_COUNTED):
            continue
        for name, tensor in _matrices(module).items():
            found[f"{path}.{name}" if path else name] = tensor
            is_due = is_due or _is_layer(module) or _is_stack(tensor)
    share = sum(tensor.nbytes for tensor in found.values()) / max(1, _all_bytes(model))
    if not found or not (is_due or share >= SMALL_SHARE):
        return None
    return LeftOut(tuple(_grouped(found)), share)


def _grouped(tensors: dict[str, Tensor]) -> list[str]:
    """Return a line for each group of equal names, largest first: "2 × layers.*.up (4, 8, 8)"."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    sizes = {key: sum(tensors[name].nbytes for name in names) for key, names in groups.items()}
    lines = []
    for key in sorted(groups, key=lambda key: -sizes[key]):
        first = groups[key][0]
        label = first if len(groups[key]) == 1 else f"{len(groups[key])} × {key}"
        lines.append(f"{label} {tuple(tensors[first].shape)}")
    return lines


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the matrices that a module itself holds, by name.

    The buffers of a layer with `in_features` count, because GPTQ and AWQ store codes in them. Other
    buffers are masks and tables.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if _is_layer(module):
        tensors |= dict(module.named_buffers(recurse=False))
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dim() >= 2 and min(tensor.shape[-2:]) > 1
    }


def _is_layer(module: nn.Module) -> bool:
    """Return True for a module with the sizes of a linear layer."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def _is_stack(tensor: Tensor) -> bool:
    """Return True for several matrices in one tensor, as experts are: (experts, out, in)."""
    return tensor.dim() >= 3 and tensor.shape[0] > 1


def _all_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; a shared one counts once."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        total += tensor.nbytes
    return total
