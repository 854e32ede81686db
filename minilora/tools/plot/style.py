"""One look for every picture: what is told apart by colour is told apart in grey and by form as well.

Colours are Okabe and Ito's, which the colour-blind tell apart, in an order in which neighbours differ in lightness by
20 of CIE's 100 steps or more; lines have dashes, points markers, areas hatches. An SVG keeps its letters as text, which
is smaller and can be read aloud and searched, and holds no date and no random id: equal figures, equal bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

COLOURS = ("#56b4e9", "#0072b2", "#e69f00", "#000000", "#cc79a7", "#f0e442", "#d55e00", "#cccccc", "#009e73")
HATCHES = ("", "////", "----", "", "\\\\\\\\", "xxxx", "", "||||", "++++")  # of areas; of dots a file would be large
LINES = ("#0072b2", "#000000", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9", "#009e73")  # none too light for a line
DASHES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAP = "cividis"  # dark to light, alike for all eyes
LOOK: Any = {  # of rcParams
    "svg.hashsalt": "minilora",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # the first comes with matplotlib: equal widths everywhere
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
}


@contextmanager
def canvas(width: float, height: float, path: str | Path | None = None) -> Iterator[Any]:
    """An empty Figure of so many inches, in this look inside the block; saved to `path`, if given, at its end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("ml.plot draws with matplotlib: pip install 'minilora[plot]'") from error
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.__dict__["_repr_png_"] = partial(_png, figure)  # notebooks know Figures only once pyplot has drawn one
        yield figure
        if path is not None:
            save(figure, path)


def _png(figure: Any) -> bytes:
    figure.savefig(file := BytesIO(), format="png")
    return file.getvalue()


def save(figure: Any, path: str | Path, description: str | None = None) -> None:
    """Write a figure made inside `canvas`; `description` is kept in an SVG. ValueError for an unknown kind of file."""
    svg = {"Date": None, "Description": description}  # None leaves an entry out
    metadata = {".svg": svg, ".pdf": {"CreationDate": None}}.get(Path(path).suffix.lower())
    figure.savefig(path, metadata=metadata, dpi=150)


def line(number: int) -> dict[str, Any]:
    """How the line of a series looks; 35 of them differ."""
    return {"color": LINES[number % len(LINES)], "linestyle": DASHES[number % len(DASHES)]}


def area(number: int) -> dict[str, Any]:
    """How the area of a part looks, its hatch in white, or in black on what is light."""
    colour = COLOURS[number % len(COLOURS)]
    return {"facecolor": colour, "hatch": HATCHES[number % len(HATCHES)], "edgecolor": ink(colour), "linewidth": 0.5}


def ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour "#rrggbb" (its luma by Rec. 601)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"
