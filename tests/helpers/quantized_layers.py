"""What the tests of both kinds of quantised linear layers share: casts, and copies of a layer."""

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import nn

CASTS = [
    nn.Module.half,
    nn.Module.bfloat16,
    lambda m: m.to(torch.bfloat16),
    lambda m: m.to("cpu", torch.float16),
]


def copies(
    layer: nn.Module, other: Callable[[], nn.Module], on_meta: Callable[[], nn.Module]
) -> list[nn.Module]:
    """Return copies of a layer: by copy, pickle and file, and into a layer that had no memory.

    Args:
        layer: the layer.
        other: makes a layer of the same sizes with other weights.
        on_meta: makes such a layer on the meta device.
    """
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = other()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assigned = on_meta()
    assigned.load_state_dict(layer.state_dict(), assign=True)
    emptied = on_meta().to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    return [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, assigned, emptied]
