"""A report of the matrices that a step over a whole model leaves out, for one warning.

`quantize_model` and `inject` with "all-linear" work on layers: modules that multiply by one matrix.
Other modules hold matrices too, and a model can have most of its bytes in them. Mixtral, Qwen3-MoE,
OLMoE and gpt-oss in transformers 5 hold all experts of a layer in one parameter (experts, out, in),
which is not a layer. Embeddings, convolutions and vectors are not counted, because these steps do
not work on them.
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
        if inside or isinstance(module, _NOT_COUNTED) or hasattr(module, "num_embeddings"):
            continue
        for name, tensor in _matrices(module).items():
            full_name = f"{path}.{name}" if path else name
            found[full_name] = tensor
            if _is_layer(module) or _is_stack(tensor):
                is_due = True
    if not found:
        return None
    all_tensors = [*model.parameters(), *model.buffers()]  # a shared one counts once
    share = _count_bytes(found.values()) / max(1, _count_bytes(all_tensors))
    if share < SMALL_SHARE and not is_due:
        return None
    names = _grouped(found)
    return LeftOut(tuple(names), share)


def _grouped(tensors: dict[str, Tensor]) -> list[str]:
    """Return a line for each group of equal names, largest first: "2 × layers.*.up (4, 8, 8)"."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        pattern = re.sub(r"\b\d+\b", "*", name)
        groups.setdefault(pattern, []).append(name)
    sized_lines = []
    for pattern, names in groups.items():
        members = [tensors[name] for name in names]
        label = names[0] if len(names) == 1 else f"{len(names)} × {pattern}"
        shape = tuple(members[0].shape)
        sized_lines.append((_count_bytes(members), f"{label} {shape}"))
    sized_lines.sort(key=lambda pair: pair[0], reverse=True)
    return [line for _, line in sized_lines]


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the matrices that a module itself holds, by name.

    The buffers of a layer with `in_features` count, because GPTQ and AWQ store codes in them. Other
    buffers are masks and tables.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if _is_layer(module):
        tensors |= dict(module.named_buffers(recurse=False))
    matrices = {}
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and min(tensor.shape[-2:]) > 1:
            matrices[name] = tensor
    return matrices


def _is_layer(module: nn.Module) -> bool:
    """Return True for a module with the sizes of a linear layer."""
    for name in ("in_features", "out_features"):
        size = getattr(module, name, None)
        if not isinstance(size, int):
            return False
    return True


def _is_stack(tensor: Tensor) -> bool:
    """Return True for several matrices in one tensor, as experts are: (experts, out, in)."""
    return tensor.dim() >= 3 and tensor.shape[0] > 1


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total += tensor.nbytes
    return total
