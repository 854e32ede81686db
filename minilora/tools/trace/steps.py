"""What a trace holds: steps by name, layer by layer. Printed, it is a table; in a notebook, one in HTML.

t["q_proj"]            the layer whose name ends so: a dict of steps
t["q_proj"]["xA"]      one Step: its maths, shape, dtype, range; `.tensor` where whole tensors are kept
t["xA"]                the same, if only one layer was traced
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minilora.common import ends_with, unknown

PHASES = {"weight": "the weight", "forward": "forward", "backward": "backward", "update": "the optimiser's step"}
COLUMNS = ("name", "maths", "shape", "dtype", "min … max", "rms", "first values")
SUMMARY = ("x", "xW", "sxAB", "h", "dh", "dx", "dA", "dB", "update A", "update B")  # whose rms tells how layers learn
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
    """One intermediate. `min`, `max`, `rms` and `first` are of its values as they were; NaN shows in all of them."""

    name: str
    maths: str  # the line that made it
    phase: str  # of PHASES
    shape: tuple[int, ...]
    dtype: torch.dtype
    min: float
    max: float
    rms: float  # √(mean of squares)
    first: tuple[float, ...]  # up to four values, row by row
    kept: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, value: Tensor, name: str, maths: str, phase: str, keep: bool) -> "Step":
        """A tensor of any shape and dtype, looked at; copied if it is to be kept."""
        value = value.detach()
        low, high = (t.item() for t in value.aminmax()) if value.numel() else (float("nan"),) * 2
        wide = value if value.is_floating_point() and value.dtype.itemsize >= 4 else value.float()
        rms = torch.linalg.vector_norm(wide).item() / max(value.numel(), 1) ** 0.5
        first = tuple(value.reshape(-1)[:4].tolist())
        shape = tuple(value.shape)
        return cls(name, maths, phase, shape, value.dtype, low, high, rms, first, value.clone() if keep else None)

    @property
    def tensor(self) -> Tensor:
        """All its values. ValueError where only figures were kept."""
        if self.kept is None:
            remedy = "Trace its layer alone (layers=…), or give tensors=True and the memory that it takes."
            raise ValueError(f"{self.name!r}: of several traced layers only figures are kept. {remedy}")
        return self.kept

    def cells(self) -> tuple[str, ...]:
        """As COLUMNS has it."""
        numbers = [f"{value:.3g}" for value in (self.min, self.max, self.rms, *self.first)]
        first = "  ".join(numbers[3:] + ["…"] * (torch.Size(self.shape).numel() > len(self.first)))
        dtype, spread = str(self.dtype).removeprefix("torch."), " … ".join(numbers[:2])
        return self.name, self.maths, str(self.shape), dtype, spread, numbers[2], first

    def __repr__(self) -> str:
        return "   ".join(self.cells()) + ("" if self.kept is None else f"\n{self.kept}")


class _Table:
    """What is shown as text and as HTML: a title, a head, rows by phase."""

    table: Callable[[], tuple[str, Sequence[str], list[tuple[str, list[tuple[str, ...]]]]]]

    def __str__(self) -> str:
        title, head, parts = self.table()
        columns = [*zip(head, *(row for _, rows in parts for row in rows), strict=True)]
        widths = [max(map(len, column)) for column in columns]
        text = [title, _line(head, widths)]
        for part, rows in parts:
            text += [f" {part}"] * bool(part) + [_line(row, widths) for row in rows]
        return "\n".join(text)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title, head, parts = self.table()
        body = ""
        for part, rows in parts:
            body += f'<tr class="phase"><th colspan="{len(head)}">{html.escape(part)}</th></tr>' if part else ""
            body += "".join(_cells("td", row) for row in rows)
        table = f"<caption>{html.escape(title)}</caption><thead>{_cells('th', head)}</thead><tbody>{body}</tbody>"
        return f'<div class="minilora-trace"><style>{STYLE}</style><table>{table}</table></div>'


def _line(row: Sequence[str], widths: list[int]) -> str:
    return "  " + "  ".join(map(str.ljust, row, widths)).rstrip()


def _cells(tag: str, row: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"


class LayerTrace(_Table, dict[str, Step]):
    """The steps of one layer by name: of the weight, and of the last of its `calls`."""

    def __init__(self, name: str, kind: str, keep: bool):
        super().__init__()
        self.name, self.kind, self.keep = name, kind, keep
        self.calls, self.open = 0, True

    def begin(self) -> None:
        """Forget the call before."""
        self.calls += 1
        for name in [name for name, step in self.items() if step.phase != "weight"]:
            del self[name]

    def add(self, value: Tensor, name: str, maths: str, phase: str) -> None:
        """Note a step, unless the context has ended."""
        if self.open:
            self[name] = Step.of(value, name, maths, phase, self.keep)

    def __missing__(self, name: str) -> Step:
        hint = "" if self.calls else " The layer was not called."
        hint += " It is there if `source`, the weight before quantising, is given." if name in BEFORE else ""
        raise ValueError(f"{unknown(f'{self.name}: step', name, self)}{hint}")

    def table(self):
        """A row a step."""
        kept = sum(step.kept.nbytes for step in self.values() if step.kept is not None)
        state = f"call {self.calls}" if self.calls else "not called"
        title = f"{self.name}: {self.kind}; {state}" + (f", {kept / 1e6:,.1f} MB kept" if kept else "")
        parts = [(PHASES[p], [s.cells() for s in self.values() if s.phase == p]) for p in PHASES]
        return title, COLUMNS, [(phase, rows) for phase, rows in parts if rows]


class Trace(_Table, dict[str, LayerTrace]):
    """The traced layers by name, in model order."""

    def __missing__(self, name: str) -> "LayerTrace | Step":
        found = [path for path in self if ends_with(path, name)]
        if len(self) == 1 and not found:
            return next(iter(self.values()))[name]
        if len(found) > 1:
            raise ValueError(f"layer {name!r} is {len(found)} layers, {found[0]!r} the first. Give more of its name.")
        if not found:
            raise unknown("layer", name, self)
        return self[found[0]]

    def table(self):
        """A row a layer: the rms of what tells whether it learns."""
        if len(self) == 1:
            return next(iter(self.values())).table()
        names = dict.fromkeys(name for layer in self.values() for name in layer)
        names = [name for last in SUMMARY for name in names if name.rpartition(".")[2] == last]  # of all adapters
        rows = [(path, *(f"{t[n].rms:.3g}" if n in t else "" for n in names)) for path, t in self.items()]
        return f"{len(self)} layers; t[name] shows one with all its steps", ("rms of", *names), [("", rows)]
