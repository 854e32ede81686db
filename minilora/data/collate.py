"""Examples → one padded batch.

    input_ids       (B, T)  filled up on the right with the padding token
    labels          (B, T)  filled up with -100: not shifted, the loss shifts
    attention_mask  (B, T)  1 on tokens, 0 on padding

Packed rows have no mask, but what keeps their documents apart; padding is a document that nobody looks at:

    position_ids    (B, T)  from 0 in each document, and in the padding
    document_ids    (B, T)  0, 1, ... in each row; -1 at padding

T is the longest of these B rows, not of the dataset. Under causal attention no token sees what stands to its right, so
the decoder needs no mask for it; the mask is for models of transformers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.data.loss_mask import IGNORE, Example


def collate(examples: Sequence[Example], pad_id: int, pad_to_multiple_of: int = 1) -> dict[str, Tensor]:
    """Pad on the right to the longest example, rounded up to a multiple of `pad_to_multiple_of`."""
    if not examples:
        raise ValueError("collate: expected at least one example, got none.")
    longest = max(len(example.input_ids) for example in examples)
    T = -(-longest // pad_to_multiple_of) * pad_to_multiple_of  # rounded up
    shape = len(examples), T
    batch = {
        "input_ids": torch.full(shape, pad_id),  # (B, T)
        "labels": torch.full(shape, IGNORE),  # (B, T)
        "attention_mask": torch.zeros(shape, dtype=torch.long),  # (B, T)
    }
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        batch["input_ids"][row, :n] = torch.tensor(example.input_ids)
        batch["labels"][row, :n] = torch.tensor(example.labels)
        batch["attention_mask"][row, :n] = 1
    if any(example.documents for example in examples):
        del batch["attention_mask"]
        batch |= {"position_ids": torch.zeros(shape, dtype=torch.long), "document_ids": torch.full(shape, -1)}
        for row, example in enumerate(examples):
            sizes = [size for _, size in example.documents] or [len(example)]
            ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # (n,)
            batch["document_ids"][row, : len(ids)] = ids
            batch["position_ids"][row] = torch.cat([torch.arange(size) for size in (*sizes, T - len(ids))])
    return batch
