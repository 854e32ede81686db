"""Picture of a packed batch: its documents, its supervised tokens and its attention mask."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.data.loss_mask import IGNORE
from minilora.tools.plot.style import canvas, ink

SHADES = ("#56b4e9", "#f0e442", "#0072b2")  # colours of neighbouring documents


def packed(batch: Mapping[str, Tensor], row: int = 0, path: str | Path | None = None) -> Any:
    """Draw the rows of a packed batch, and the attention mask of one row.

    The left panel shows each row as a strip of documents, with the supervised tokens in black below
    them. The right panel shows which tokens each token of `row` attends to.

    Args:
        batch: A batch that `collate` made of packed rows, with `document_ids` and `labels` (B, T).
        row: Index of the row whose mask is drawn; the first by default.
        path: File to save the figure to; None saves nothing.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: If the batch is not packed, or has no such row.
    """
    for name in ("document_ids", "labels"):
        if name not in batch:
            raise ValueError(
                f"packed: expected a batch of packed rows, got one with no {name}. "
                "Collate the rows that pack(...) returns."
            )
    documents = batch["document_ids"].cpu()  # (B, T)
    labels = batch["labels"].cpu()  # (B, T)
    B, T = documents.shape
    if not 0 <= row < B:
        raise ValueError(f"row: expected 0 to {B - 1}, the rows of this batch, got {row}.")
    with canvas(9, 3.2, path) as figure:
        strips, mask = figure.subplots(1, 2, width_ratios=(5, 3))
        for index in range(B):
            _draw_documents(strips, index, documents[index])
            _draw_supervised(strips, index, labels[index])
        strips.set(xlim=(0, T), yticks=range(B), xlabel="token", ylabel="row of the batch")
        strips.invert_yaxis()
        strips.set_title(_summary(documents, labels))
        _draw_mask(mask, documents[row])
        mask.set(
            xlim=(0, T),
            ylim=(T, 0),
            aspect="equal",
            xlabel="key token",
            ylabel="query token",
        )
        mask.set_title(f"attention mask of row {row}")
    return figure


def _draw_documents(axes: Any, index: int, documents: Tensor) -> None:
    """Draw one row as a strip of documents with their numbers; padding is hatched."""
    T = len(documents)
    for document, start, end in _segments(documents):
        is_padding = document < 0
        shade = "#ffffff" if is_padding else SHADES[document % 3]
        hatch = "////" if is_padding else ""
        axes.barh(
            index,
            end - start,
            0.8,
            start,
            color=shade,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.5,
        )
        if end - start < T / 12:  # too narrow for a label
            continue
        axes.text(
            (start + end) / 2,
            index - 0.1,
            "padding" if is_padding else f"{document}",
            color=ink(shade),
            ha="center",
            va="center",
            bbox={"facecolor": shade, "edgecolor": "none", "pad": 1},
        )


def _draw_supervised(axes: Any, index: int, labels: Tensor) -> None:
    """Draw a black bar below each segment of supervised tokens of one row."""
    for supervised, start, end in _segments(labels != IGNORE):
        if supervised:
            axes.barh(index + 0.3, end - start, 0.2, start, color="black", linewidth=0)


def _draw_mask(axes: Any, documents: Tensor) -> None:
    """Draw the causal attention mask of one row, a triangle for each document."""
    for document, start, end in _segments(documents):
        if document < 0:
            continue
        queries = torch.arange(start, end + 1)  # (n + 1,)
        # query q attends to the keys start … q of its document
        axes.fill_betweenx(
            queries,
            start,
            (queries + 1).clamp(max=end),
            step="post",
            facecolor=SHADES[document % 3],
            edgecolor="black",
            linewidth=0.5,
        )


def _summary(documents: Tensor, labels: Tensor) -> str:
    """Return the title: number of documents, shares of padding and of supervised tokens."""
    real = (documents >= 0).sum().item()
    supervised = (labels != IGNORE).sum().item()
    count = 0
    for ids in documents:
        count += len(set(ids.tolist()) - {-1})
    padding = 1 - real / documents.numel()
    return f"{count} documents; {padding:.0%} padding; supervised (black): {supervised / real:.0%}"


def _segments(values: Tensor) -> list[tuple[int, int, int]]:
    """Return (value, start, end) of each run of equal values in a vector."""
    segment_values, counts = torch.unique_consecutive(values, return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return list(zip(segment_values.tolist(), starts, ends, strict=True))
