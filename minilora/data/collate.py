"""Collation: examples → one padded batch.

    input_ids       (B, T)  padded on the right with the padding token
    labels          (B, T)  padded with -100; not shifted, the loss shifts them
    attention_mask  (B, T)  1 on tokens, 0 on padding

Packed rows have no mask, but ids that keep their documents apart; padding is a document to which no
token attends:

    position_ids    (B, T)  from 0 in each document, and in the padding
    document_ids    (B, T)  0, 1, ... in each row; -1 at padding

T is the longest of these B rows, not of the dataset. Under causal attention no token sees the
tokens on its right, so the decoder needs no mask for padding; the mask is for models of
transformers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.data.loss_mask import IGNORE, Example


def collate(
    examples: Sequence[Example], pad_id: int, pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """Return examples as one batch, padded on the right.

    Args:
        examples: B examples.
        pad_id: the padding token.
        pad_to_multiple_of: T is rounded up to a multiple of this.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("collate: expected at least one example, got none.")
    longest = max(len(example.input_ids) for example in examples)
    T = -(-longest // pad_to_multiple_of) * pad_to_multiple_of  # rounded up
    shape = (len(examples), T)
    batch = {
        "input_ids": torch.full(shape, pad_id),  # (B, T)
        "labels": torch.full(shape, IGNORE),  # (B, T)
        "attention_mask": torch.zeros(shape, dtype=torch.long),  # (B, T)
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["labels"][row, :length] = torch.tensor(example.labels)
        batch["attention_mask"][row, :length] = 1
    if any(example.documents for example in examples):
        del batch["attention_mask"]
        batch |= _document_ids(examples, T)
    return batch


def _document_ids(examples: Sequence[Example], T: int) -> dict[str, Tensor]:
    """Return position ids and document ids of packed rows, padded to T."""
    shape = (len(examples), T)
    position_ids = torch.zeros(shape, dtype=torch.long)  # (B, T)
    document_ids = torch.full(shape, -1)  # (B, T)
    for row, example in enumerate(examples):
        sizes = [size for _, size in example.documents] or [len(example)]
        ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # (length,)
        document_ids[row, : len(ids)] = ids
        padding = T - len(ids)
        position_ids[row] = torch.cat([torch.arange(size) for size in (*sizes, padding)])
    return {"position_ids": position_ids, "document_ids": document_ids}
