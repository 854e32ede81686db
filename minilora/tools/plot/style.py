"""Common look of all pictures, readable without colour.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish, in an order in
which the lightness of neighbours differs by at least 20 of the 100 steps of CIE L*. Series differ
in form as well: lines by dashes, points by markers, areas by hatches.

An SVG file stores its letters as text, which is smaller and can be searched and read by a screen
reader. It contains neither a date nor a random id, so equal figures give equal bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from minilora.common.extras import require

COLOURS = (
    "#56b4e9",
    "#0072b2",
    "#e69f00",
    "#000000",
    "#cc79a7",
    "#f0e442",
    "#d55e00",
    "#cccccc",
    "#009e73",
)
# Hatches of areas. Dots are avoided, because they make files large.
HATCHES = ("", "////", "----", "", "\\\\\\\\", "xxxx", "", "||||", "++++")
# Colours of lines. None of them is too light for a thin line.
LINES = ("#0072b2", "#000000", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9", "#009e73")
DASHES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAP = "cividis"  # colour map from dark to light, also for colour-blind readers
LOOK: Any = {  # matplotlib's rcParams
    "svg.hashsalt": "minilora",
    "svg.fonttype": "none",
    # matplotlib ships the first font, so text has the same width on every machine
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
}


@contextmanager
def canvas(width: float, height: float, path: str | Path | None = None) -> Iterator[Any]:
    """Create an empty Figure, and apply the look inside the block.

    Args:
        width: Width in inches.
        height: Height in inches.
        path: File to save the figure to at the end of the block; None saves nothing.

    Yields:
        The matplotlib Figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require("ml.plot", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        # Jupyter displays Figures only after pyplot was used, so the figure brings its own hook.
        figure.__dict__["_repr_png_"] = partial(_png, figure)
        yield figure
        if path is not None:
            save(figure, path)


def _png(figure: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def save(figure: Any, path: str | Path, description: str | None = None) -> None:
    """Write a figure to a file.

    Args:
        figure: A figure that was drawn inside `canvas`.
        path: File name; its ending (.svg, .png, .pdf …) selects the format.
        description: Text stored in the metadata of an SVG file; None stores none.

    Raises:
        ValueError: If matplotlib does not know the format.
    """
    metadata_by_suffix = {
        ".svg": {"Date": None, "Description": description},  # None leaves the entry out
        ".pdf": {"CreationDate": None},
    }
    metadata = metadata_by_suffix.get(Path(path).suffix.lower())
    figure.savefig(path, metadata=metadata, dpi=150)


def line(number: int) -> dict[str, Any]:
    """Return the look of a line.

    Args:
        number: Index of the series, from 0. The first 35 looks differ.

    Returns:
        Keywords of matplotlib's `plot`.
    """
    return {"color": LINES[number % len(LINES)], "linestyle": DASHES[number % len(DASHES)]}


def area(number: int) -> dict[str, Any]:
    """Return the look of an area. The hatch is white, or black on a light colour.

    Args:
        number: Index of the part, from 0.

    Returns:
        Keywords of matplotlib's `bar`.
    """
    colour = COLOURS[number % len(COLOURS)]
    return {
        "facecolor": colour,
        "hatch": HATCHES[number % len(HATCHES)],
        "edgecolor": ink(colour),
        "linewidth": 0.5,
    }


def ink(colour: str) -> str:
    """Return the colour of text that is easier to read on a background, black or white.

    Args:
        colour: Background as "#rrggbb".

    Returns:
        "black" or "white".

    Source:
        Luma by ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B.
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return "black" if luma > 120 else "white"
