"""Proves that every picture is readable: in grey, at a small size, with no text cut or covered.

Property: no text leaves its figure or overlaps another, series differ without colour, and equal
figures have equal bytes. Round trip: the pictures in docs/ are those that the script draws.
"""

import pickle
from itertools import combinations, pairwise
from typing import Any

import pytest

import minilora as ml
from benchmarks.docs import pictures
from helpers.drawn import figures
from helpers.source import ROOT
from minilora.tools.memory_plan.plan import PARTS
from minilora.tools.plot import style

# ---- property: readable


def texts(figure) -> list[tuple[str, Any]]:
    """Return (text, box in pixels) for every visible text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    with_look = canvas.get_renderer()
    canvas.draw()
    hidden = set()
    # ticks outside the limits of the axis are hidden
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    found = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()
    ]
    return [(t.get_text(), t.get_window_extent(with_look)) for t in found if t not in hidden]


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = ml.plot.codebook()
    for one in (figure, pickle.loads(pickle.dumps(figure))):
        png = one._repr_png_()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 10_000


def test_no_text_is_cut_or_covered_by_another():
    for name, figure in figures().items():
        written = texts(figure)
        assert len(written) > 5, name
        for text, box in written:
            inside = (
                box.x0 >= 0
                and box.y0 >= 0
                and box.x1 <= figure.bbox.x1
                and box.y1 <= figure.bbox.y1
            )
            assert inside, f"{name}: {text!r} is cut"
        for (text, box), (other, second) in combinations(written, 2):
            width = min(box.x1, second.x1) - max(box.x0, second.x0)
            height = min(box.y1, second.y1) - max(box.y0, second.y0)
            # boxes are a pixel larger than letters
            assert min(width, height) < 1, f"{name}: {text!r} overlaps {other!r}"


def lightness(colour: str) -> float:
    """Return CIE L* of "#rrggbb", 0 to 100: the lightness that a grey copy keeps."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_neighbours_differ_in_grey():
    assert len(set(style.COLOURS)) == len(style.COLOURS) >= len(PARTS)
    for one, other in pairwise(style.COLOURS):
        assert abs(lightness(one) - lightness(other)) >= 20, (one, other)
    for i, j in combinations(range(len(style.LINES)), 2):
        one, other = style.line(i), style.line(j)
        told = one["linestyle"] != other["linestyle"]
        assert told or abs(lightness(one["color"]) - lightness(other["color"])) >= 20, (i, j)
    assert len({str(style.line(i)) for i in range(35)}) == 35
    assert max(map(lightness, style.LINES)) < 75  # visible on white
    for one, other in combinations(ml.plot.batch.SHADES, 2):
        assert abs(lightness(one) - lightness(other)) >= 15  # a black line separates them


def test_areas_and_lines_differ_without_colour():
    axes = figures()["memory"].axes[0]
    looks = [
        (c.patches[0].get_hatch(), round(lightness_of(c.patches[0].get_facecolor()), -1))
        for c in axes.containers
    ]
    assert len(set(looks)) == len(looks)
    for name in ("spectra", "codebook", "runs"):
        lines = [
            ln
            for ln in figures()[name].axes[0 if name != "codebook" else 1].lines
            if ln.get_linestyle() != "None"
        ]
        lines = [ln for ln in lines if not ln.get_label().startswith("_")]
        assert len(
            {(str(ln.get_linestyle()), str(ln._dash_pattern), ln.get_marker()) for ln in lines}
        ) == len(lines)


def lightness_of(rgba: tuple[float, ...]) -> float:
    return lightness("#" + "".join(f"{round(255 * c):02x}" for c in rgba[:3]))


def test_equal_figures_are_equal_bytes_small_and_searchable(tmp_path):
    for name in ("one.svg", "two.svg"):
        ml.plot.codebook(path=tmp_path / name)
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text() and len(svg) < 60_000
    assert ">error of rounding to the nearest level</text>" in svg and "<dc:date>" not in svg
    ml.plot.codebook(path=tmp_path / "one.png")
    ml.plot.codebook(path=tmp_path / "one.pdf")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "one.pdf"
    ).read_bytes()[:4] == b"%PDF"


def test_every_picture_without_measured_figures_is_checked():
    assert {*pictures.PLAIN} == {"codebook", "packed", "roofline", "plan"}


def test_a_plot_leaves_the_settings_of_matplotlib_unchanged():
    import matplotlib

    before = dict(matplotlib.rcParams)
    ml.plot.codebook()
    # matplotlib chooses its backend at the first plot
    assert {name for name in before if before[name] != matplotlib.rcParams[name]} <= {"backend"}


# ---- round trip


@pytest.mark.strict
@pytest.mark.parametrize(
    "name", ["codebook", "packed", "roofline", pytest.param("plan", marks=pytest.mark.slow)]
)
def test_the_pictures_of_the_docs_are_what_the_script_draws(name: str, tmp_path):
    pictures.PLAIN[name](tmp_path / "again.svg")
    kept = ROOT / "docs" / f"{name}.svg"
    assert (tmp_path / "again.svg").read_bytes() == kept.read_bytes(), (
        "run python benchmarks/docs/pictures.py"
    )
    assert kept.stat().st_size < 60_000
