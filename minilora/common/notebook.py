"""Output in notebooks: notes in plain text, tables and a curve in HTML.

A notebook shows everything that goes to stderr in a red box, like an error. `note` therefore writes
to stdout there. All texts in HTML are escaped.
"""

import builtins
import html
import math
import sys
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

CURVE_POINTS = 200  # of a drawn curve; a longer one is averaged in groups
WIDTH = 480  # of the picture, in pixels
HEIGHT = 120
# Of Okabe and Ito, for colour-blind readers; then the colour of the text.
COLOURS = ("#0072b2", "#d55e00", "currentColor")


def in_notebook() -> bool:
    """Return True if the code runs in a cell of Jupyter or of a service like it."""
    # IPython defines this function for the cells; a terminal's IPython has no kernel.
    get_shell = getattr(builtins, "get_ipython", None)
    if get_shell is None:
        return False
    return hasattr(get_shell(), "kernel")


def note(text: str) -> None:
    """Print an ordinary note, such as the dtype that was chosen.

    Args:
        text: The note, one line. It goes to stderr, or to stdout in a notebook.
    """
    stream = sys.stdout if in_notebook() else sys.stderr
    print(text, file=stream, flush=True)


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], remarks: Sequence[str] = ()
) -> str:
    """Return a table in HTML, without a style sheet.

    Args:
        header: The titles of the columns; empty for a table without titles.
        rows: The cells of each row. The first column is aligned to the left, the others to the
            right.
        remarks: Lines of text below the table.
    """
    parts = ["<table>"]
    if header:
        parts.append(f"<thead>{_row('th', header)}</thead>")
    parts.append("<tbody>")
    for cells in rows:
        parts.append(_row("td", cells))
    parts.append("</tbody></table>")
    for remark in remarks:
        parts.append(f"<p>{html.escape(remark)}</p>")
    return "".join(parts)


def html_text(text: str) -> str:
    """Return text in HTML with its line breaks and columns.

    Args:
        text: The text as it is printed.
    """
    return f"<pre>{html.escape(text)}</pre>"


def _row(tag: str, cells: Sequence[object]) -> str:
    """Return one row of a table."""
    parts = []
    for number, cell in enumerate(cells):
        side = "right" if number else "left"
        text = html.escape(str(cell))
        parts.append(f'<{tag} style="text-align:{side}">{text}</{tag}>')
    return f"<tr>{''.join(parts)}</tr>"


def svg_curves(curves: Mapping[str, Points]) -> str:
    """Return the curves as one picture in SVG, with the range of the values as labels.

    Args:
        curves: For each name, points (x, y). A point whose y is not finite is left out.

    Returns:
        The picture, or "" without a curve of at least two points.
    """
    drawn = {}
    for name, points in curves.items():
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if len(finite) > 1:
            drawn[name] = thinned(finite, CURVE_POINTS)
    if not drawn:
        return ""
    xs = []
    ys = []
    for points in drawn.values():
        xs += [x for x, _ in points]
        ys += [y for _, y in points]
    low = min(ys)
    high = max(ys)
    x_range = (min(xs), max(xs))
    margin = WIDTH + 6
    parts = []
    for number, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        corners = _corners(points, x_range, (low, high))
        line = f'points="{corners}" fill="none" stroke="{colour}" stroke-width="1.5"'
        height = HEIGHT / 2 + 14 * number
        place = f'x="{margin}" y="{height:.0f}" fill="{colour}"'
        parts.append(f"<polyline {line}/><text {place}>{html.escape(name)}</text>")
    parts.append(f'<text x="{margin}" y="8" fill="currentColor">{high:.4g}</text>')
    parts.append(f'<text x="{margin}" y="{HEIGHT}" fill="currentColor">{low:.4g}</text>')
    width = WIDTH + 90
    height = HEIGHT + 4
    box = f'viewBox="0 0 {width} {height}" style="width:{width}px;max-width:100%"'
    font = 'font-size="11" font-family="sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {font}>{"".join(parts)}</svg>'


def _corners(points: Points, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    """Return the places of some points in the picture, as SVG writes them: "0.0,120.0 4.8,110.2"."""
    left, right = x_range
    low, high = y_range
    width = (right - left) or 1
    height = (high - low) or 1
    corners = []
    for x, y in points:
        across = WIDTH * (x - left) / width
        down = HEIGHT * (high - y) / height
        corners.append(f"{across:.1f},{down:.1f}")
    return " ".join(corners)


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """Return at most `most` points: the means of groups of neighbours.

    Args:
        points: Points (x, y) in the order of x.
        most: Largest number of points to return.
    """
    size = -(-len(points) // most)  # of a group, rounded up
    means = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        x_sum = sum(x for x, _ in group)
        y_sum = sum(y for _, y in group)
        means.append((x_sum / len(group), y_sum / len(group)))
    return means
