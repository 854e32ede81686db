"""Attention masks of the decoder: one for each kind of layer.

Shapes: B rows, T new tokens, S keys (T and those in the cache).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minilora.models.config import SLIDING, DecoderConfig
from minilora_kernels.ops.attention import Documents, causal_mask, window_masks

Mask = Tensor | Mapping[str, Tensor] | None
LayerMask = Tensor | Documents | None


def layer_masks(
    config: DecoderConfig,
    mask: Mask,
    shape: tuple[int, int],
    document_ids: Tensor | None,
    runs: list[tuple[int, bool]] | None,
    device: torch.device,
) -> Mapping[str, LayerMask]:
    """Return the mask of each kind of layer, by the kind's name in `config.layer_types`.

    None stands for plain causal attention, the fast path. Documents stands for the same, one
    document at a time. Every other mask is a bool tensor (B or 1, 1, T, S).

    Args:
        config: the shape of the model.
        mask: the mask that the caller gave, (B or 1, 1, T, S), or one for each kind of layer.
        shape: T and S.
        document_ids: documents of the keys, (B, S), or None for one document.
        runs: a pair for each stretch of equal document ids, row after row: its number of tokens,
            and True for a document or False for padding. None if a mask must express them.
        device: device of the masks.

    Raises:
        ValueError: one mask was given, and the kinds of layers need different ones.
    """
    if isinstance(mask, Mapping):
        return mask
    masks: dict[str, LayerMask] = dict.fromkeys(config.layer_types, mask)
    if mask is not None:
        if len(masks) > 1:
            raise ValueError(
                "some layers have a window: give a mask for each kind of layer, "
                f"{' and '.join(masks)}."
            )
        return masks
    for kind in masks:
        window = config.sliding_window if kind == SLIDING else None
        if window is not None and window >= shape[1]:
            window = None  # no key is that far back yet
        if runs is not None:
            masks[kind] = Documents(runs, window_masks(runs, window, device))
        elif window is not None or document_ids is not None:
            masks[kind] = causal_mask(
                *shape, window=window, document_ids=document_ids, device=device
            )
    return masks
