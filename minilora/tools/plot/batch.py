"""A packed batch as a picture: whose tokens stand where, what is learned of them, and who sees whom."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.data.loss_mask import IGNORE
from minilora.tools.plot.style import canvas, ink

SHADES = ("#56b4e9", "#f0e442", "#0072b2")  # of neighbouring documents


def packed(batch: Mapping[str, Tensor], row: int = 0, path: str | Path | None = None) -> Any:
    """Rows of a batch as strips of documents, the learned tokens dark below them; beside it the mask of one `row`.

    batch: what `collate` makes of packed rows, with document_ids and labels (B, T). ValueError for any other.
    """
    if missing := [name for name in ("document_ids", "labels") if name not in batch]:
        raise ValueError(f"packed: expected a batch of packed rows, this one has no {missing[0]}: collate pack(...)'s.")
    documents, labels = batch["document_ids"].cpu(), batch["labels"].cpu()  # (B, T)
    B, T = documents.shape
    if not 0 <= row < B:
        raise ValueError(f"row: expected 0 to {B - 1}, the rows of this batch, got {row}.")
    with canvas(9, 3.2, path) as figure:
        strips, mask = figure.subplots(1, 2, width_ratios=(5, 3))
        for place in range(B):
            for document, start, end in _stretches(documents[place]):
                pad, shade = document < 0, "#ffffff" if document < 0 else SHADES[document % 3]
                style = {"color": shade, "hatch": "////" * pad, "edgecolor": "black", "linewidth": 0.5}
                strips.barh(place, end - start, 0.8, start, **style)
                if end - start >= T / 12:  # wide enough for it
                    paper = {"facecolor": shade, "edgecolor": "none", "pad": 1}
                    text, middle = "padding" if pad else f"{document}", (start + end) / 2
                    strips.text(middle, place - 0.1, text, color=ink(shade), ha="center", va="center", bbox=paper)
            for learned, start, end in _stretches(labels[place] != IGNORE):
                if learned:
                    strips.barh(place + 0.3, end - start, 0.2, start, color="black", linewidth=0)
        strips.set(xlim=(0, T), yticks=range(B), xlabel="token", ylabel="row of the batch")
        strips.invert_yaxis()
        real, learned = (documents >= 0).sum().item(), (labels != IGNORE).sum().item()
        count = sum(len(set(ids.tolist()) - {-1}) for ids in documents)
        strips.set_title(f"{count} documents; {1 - real / (B * T):.0%} padding; learned (black): {learned / real:.0%}")
        for document, start, end in _stretches(documents[row]):
            if document >= 0:
                seen = torch.arange(start, end + 1)  # the query in place q sees start … q of its own
                style = {"facecolor": SHADES[document % 3], "edgecolor": "black", "linewidth": 0.5}
                mask.fill_betweenx(seen, start, (seen + 1).clamp(max=end), step="post", **style)
        mask.set(xlim=(0, T), ylim=(T, 0), aspect="equal", xlabel="… sees these", ylabel="a token in place …")
        mask.set_title(f"who sees whom in row {row}")
    return figure


def _stretches(values: Tensor) -> list[tuple[int, int, int]]:
    """(value, start, end) of each run of equal values in a vector."""
    found, counts = torch.unique_consecutive(values, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [*zip(found.tolist(), [0, *ends[:-1]], ends, strict=True)]
