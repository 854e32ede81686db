"""Recorded steps by name, layer by layer, with their tables as text and as HTML.

t["q_proj"]            the layer whose path ends in q_proj: a dict of steps
t["q_proj"]["xA"]      one step: its maths, shape, dtype and range; `.tensor` where tensors are kept
t["xA"]                the same, if only one layer was traced
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.common import column_widths, ends_with, unknown_name

# Phase of a step -> its heading in the table.
PHASES = {
    "weight": "the weight",
    "forward": "forward",
    "backward": "backward",
    "update": "the optimiser's step",
}
COLUMNS = ("name", "maths", "shape", "dtype", "min … max", "rms", "first values")
# Steps whose rms shows how the layers of a model learn.
SUMMARY = ("x", "xW", "sxAB", "h", "dh", "dx", "dA", "dB", "update A", "update B")
# Steps that need the weight before it was quantised.
BEFORE = ("block", "absmax", "normalised", "centred absmax", "error")
STYLE = """\
.minilora-trace{overflow-x:auto}
.minilora-trace table{border-collapse:collapse;font-size:90%;color:inherit;background:none}
.minilora-trace th,.minilora-trace td{text-align:left;padding:2px 9px;white-space:pre;border:0;color:inherit}
.minilora-trace td{font-family:monospace}
.minilora-trace .phase th{padding-top:9px;border-bottom:1px solid currentColor}
.minilora-trace tbody tr:hover{background:#8883}
.minilora-trace caption{text-align:left;font-weight:bold;white-space:nowrap;caption-side:top;color:inherit}"""


@dataclass(frozen=True, repr=False)
class Step:
    """One intermediate tensor. NaN values show in `min`, `max` and `rms`.

    Attributes:
        name: Name of the value.
        maths: Equation that made it.
        phase: A key of PHASES.
        shape: Shape of the tensor.
        dtype: dtype of the tensor.
        min: Smallest value.
        max: Largest value.
        rms: Root of the mean of squares.
        first: First values in row-major order, at most four.
        kept: Copy of the tensor, or None.
    """

    name: str
    maths: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    min: float
    max: float
    rms: float
    first: tuple[float, ...]
    kept: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, value: Tensor, name: str, maths: str, phase: str, keep: bool) -> "Step":
        """Summarise a tensor.

        Args:
            value: A tensor of any shape and dtype.
            name: Name of the value.
            maths: Equation that made it.
            phase: A key of PHASES.
            keep: Keep a copy of the tensor.

        Returns:
            The step.
        """
        value = value.detach()
        low = float("nan")
        high = float("nan")
        if value.numel():
            low, high = (extreme.item() for extreme in value.aminmax())
        precise = value
        if not value.is_floating_point() or value.dtype.itemsize < 4:
            precise = value.float()
        return cls(
            name=name,
            maths=maths,
            phase=phase,
            shape=tuple(value.shape),
            dtype=value.dtype,
            min=low,
            max=high,
            rms=torch.linalg.vector_norm(precise).item() / max(value.numel(), 1) ** 0.5,
            first=tuple(value.reshape(-1)[:4].tolist()),
            kept=value.clone() if keep else None,
        )

    @property
    def tensor(self) -> Tensor:
        """Full tensor.

        Raises:
            ValueError: If the tensor was not kept.
        """
        if self.kept is None:
            raise ValueError(
                f"{self.name!r}: of several traced layers only figures are kept. Trace its layer "
                "alone (layers=…), or give tensors=True, which takes memory for all tensors."
            )
        return self.kept

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table, in the order of COLUMNS."""
        first = [f"{value:.3g}" for value in self.first]
        if torch.Size(self.shape).numel() > len(self.first):
            first.append("…")
        return (
            self.name,
            self.maths,
            str(self.shape),
            str(self.dtype).removeprefix("torch."),
            f"{self.min:.3g} … {self.max:.3g}",
            f"{self.rms:.3g}",
            "  ".join(first),
        )

    def __repr__(self) -> str:
        text = "   ".join(self.cells())
        return text if self.kept is None else f"{text}\n{self.kept}"


class _Content(NamedTuple):
    """Content of a table: title, head, and rows under the heading of their phase."""

    title: str
    head: Sequence[str]
    parts: list[tuple[str, list[tuple[str, ...]]]]


class _Table:
    """Base class of objects that are shown as a table, in text and in HTML."""

    def table(self) -> _Content:
        raise NotImplementedError

    def __str__(self) -> str:
        title, head, parts = self.table()
        all_rows = [head]
        for _, rows in parts:
            all_rows += rows
        widths = column_widths(all_rows)
        lines = [title, _text_row(head, widths)]
        for heading, rows in parts:
            if heading:
                lines.append(f" {heading}")
            lines += [_text_row(row, widths) for row in rows]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        title, head, parts = self.table()
        body = []
        for heading, rows in parts:
            if heading:
                text = html.escape(heading)
                body.append(f'<tr class="phase"><th colspan="{len(head)}">{text}</th></tr>')
            body += [_html_row("td", row) for row in rows]
        table = (
            f"<table><caption>{html.escape(title)}</caption>"
            f"<thead>{_html_row('th', head)}</thead><tbody>{''.join(body)}</tbody></table>"
        )
        return f'<div class="minilora-trace"><style>{STYLE}</style>{table}</div>'


def _text_row(row: Sequence[str], widths: list[int]) -> str:
    """Return a row of the text table."""
    return "  " + "  ".join(map(str.ljust, row, widths)).rstrip()


def _rms_cell(layer: "LayerTrace", name: str) -> str:
    """Return the rms of a step, or an empty cell if the layer has no such step."""
    return f"{layer[name].rms:.3g}" if name in layer else ""


def _html_row(tag: str, row: Sequence[str]) -> str:
    """Return a row of the HTML table."""
    cells = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row]
    return f"<tr>{''.join(cells)}</tr>"


class LayerTrace(_Table, dict[str, Step]):
    """Steps of one layer by name: those of its weight, and those of its last call.

    Args:
        name: Path of the layer.
        kind: Description of the layer.
        keep: Keep full tensors.

    Attributes:
        calls: Number of calls of the layer.
        open: False after the end of the trace; further steps are not recorded.
    """

    def __init__(self, name: str, kind: str, keep: bool):
        super().__init__()
        self.name = name
        self.kind = kind
        self.keep = keep
        self.calls = 0
        self.open = True

    def begin(self) -> None:
        """Count a call, and delete the steps of the previous one."""
        self.calls += 1
        outdated = [name for name, step in self.items() if step.phase != "weight"]
        for name in outdated:
            del self[name]

    def add(self, value: Tensor, name: str, maths: str, phase: str) -> None:
        """Record a step, unless the trace has ended.

        Args:
            value: The tensor.
            name: Name of the value.
            maths: Equation that made it.
            phase: A key of PHASES.
        """
        if self.open:
            self[name] = Step.of(value, name, maths, phase, self.keep)

    def __missing__(self, name: str) -> Step:
        message = str(unknown_name(f"{self.name}: step", name, self))
        if not self.calls:
            message += " The layer was not called."
        if name in BEFORE:
            message += " Give `source`, the weight before quantising, to record it."
        raise ValueError(message)

    def table(self) -> _Content:
        """Return the content of the table, with a row for each step."""
        state = f"call {self.calls}" if self.calls else "not called"
        title = f"{self.name}: {self.kind}; {state}"
        kept_bytes = sum(step.kept.nbytes for step in self.values() if step.kept is not None)
        if kept_bytes:
            title += f", {kept_bytes / 1e6:,.1f} MB kept"
        parts = []
        for phase, heading in PHASES.items():
            rows = [step.cells() for step in self.values() if step.phase == phase]
            if rows:
                parts.append((heading, rows))
        return _Content(title, COLUMNS, parts)


class Trace(_Table, dict[str, LayerTrace]):
    """Traced layers by path, in the order of the model."""

    def __missing__(self, name: str) -> "LayerTrace | Step":
        matches = [path for path in self if ends_with(path, name)]
        if len(self) == 1 and not matches:
            (layer,) = self.values()
            return layer[name]
        if len(matches) > 1:
            raise ValueError(
                f"layer {name!r} is {len(matches)} layers, {matches[0]!r} the first. "
                "Give more of its name."
            )
        if not matches:
            raise unknown_name("layer", name, self)
        return self[matches[0]]

    def table(self) -> _Content:
        """Return the content of the table: a row for each layer, with the rms of its main steps."""
        if len(self) == 1:
            (layer,) = self.values()
            return layer.table()
        names = self._summary_names()
        rows = []
        for path, layer in self.items():
            cells = [_rms_cell(layer, name) for name in names]
            rows.append((path, *cells))
        title = f"{len(self)} layers; t[name] shows one with all its steps"
        return _Content(title, ("rms of", *names), [("", rows)])

    def _summary_names(self) -> list[str]:
        """Return the recorded steps of SUMMARY, for every adapter, in its order."""
        recorded = dict.fromkeys(name for layer in self.values() for name in layer)
        names = []
        for summary_name in SUMMARY:
            names += [name for name in recorded if name.rpartition(".")[2] == summary_name]
        return names
