"""Proves where the progress of a long task appears: nowhere at first, then once.

The clock is a counter, so that no test waits. A notebook is a shell with a kernel; its display is
recorded.
"""

import builtins
import io
import re
import sys
from types import SimpleNamespace

import pytest

from minilora.common import progress
from minilora.common.notebook import html_table, note, svg_curves, thinned
from minilora.common.progress import DELAY, LINE_SECONDS, ProgressBar


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return clock


@pytest.fixture
def pages(monkeypatch) -> list[str]:
    """Run the test as in a notebook; return the HTML of each refresh."""
    shown: list[str] = []
    handle = SimpleNamespace(update=lambda page: shown.append(page.data))

    def display(page, display_id):
        shown.append(page.data)
        return handle

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr("IPython.display.display", display)
    return shown


def steps(clock: Clock, count: int, seconds: float, **options) -> None:
    """Do a task of equal steps."""
    with ProgressBar("load", count, "row", **options) as bar:
        for _ in range(count):
            clock.now += seconds
            bar.update()


def test_short_task_shows_nothing(clock, capsys):
    steps(clock, 10, DELAY / 11)
    steps(clock, 1, 10 * DELAY)  # nothing is left to wait for when its only unit is done
    assert capsys.readouterr() == ("", "")


def test_task_is_shown_while_its_first_unit_runs(monkeypatch, capsys):
    """A timer shows it. A task that has ended, or that is inside another, stays silent."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "DELAY", 0.01)
    with ProgressBar("read", 3, "row") as bar:
        bar.update(0, {"reading": "prompts"})
        bar._timer.join(60)
    assert capsys.readouterr().err == "read: 0/3 rows, 0 s, reading prompts\n"
    monkeypatch.setattr(progress, "DELAY", 60)
    with ProgressBar("read", 3, "row") as bar:
        with ProgressBar("inner", 3, "row") as inner:
            assert not inner._timer.is_alive()
        assert bar._timer.is_alive()
    bar._timer.join(60)
    bar._show_first()
    assert capsys.readouterr().err == ""


def test_lines_come_every_ten_seconds(clock, capsys):
    steps(clock, 100, 1.0)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "load: 2/100 rows, 2 s, 98 s left"
    assert len(lines) == 1 + int((100 - DELAY) / LINE_SECONDS)


def test_lines_follow_line_every(clock, capsys):
    steps(clock, 10, 1.0, line_every=4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["load: 4/10 rows", "load: 8/10 rows"]


def test_time_left_of_a_resumed_task_counts_new_units_only(clock):
    with ProgressBar("train", 10, "step", initial=6) as bar:
        clock.now += 4.0
        bar.update(2)
    assert bar.line() == "train: 8/10 steps, 4 s, 4 s left"


def test_inner_task_is_shown_by_the_outer_one(clock, capsys):
    with ProgressBar("train", 3, "step", line_every=1) as outer:
        clock.now += DELAY
        outer.update()
        clock.now += LINE_SECONDS
        steps(clock, 2, 1.0)
        outer.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["train"] * 3
    assert lines[1].endswith("load 1/2")


def test_error_inside_a_task_closes_it(clock):
    with pytest.raises(ValueError), ProgressBar("load", 3, "row"):
        raise ValueError
    with ProgressBar("load", 3, "row") as bar:
        assert bar.outer is None


@pytest.mark.parametrize("way", ["environment", "hidden"])
def test_hidden_progress_shows_nothing(clock, capsys, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    with ProgressBar("train", 9, "step", hidden=way == "hidden") as outer:
        for _ in range(9):
            steps(clock, 3, 10.0)
            outer.update()
    assert capsys.readouterr() == ("", "")


def test_terminal_shows_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    steps(clock, 5, 1.0)
    assert re.search(r"load: +100%.*5/5", terminal.getvalue())


def test_notebook_shows_one_bar_and_its_curve(clock, pages, capsys):
    losses = [(1, 3.0), (2, 1.0), (3, float("nan"))]
    steps(clock, 5, 1.0, curves=lambda: {"<loss>": losses})
    assert capsys.readouterr() == ("", "")
    assert len(pages) == 5  # after 2, 3, 4 and 5 s, and at the end
    assert "load: 5/5 rows" in pages[-1] and pages[-1].count("<polyline") == 1
    assert "&lt;loss&gt;" in pages[-1] and "<loss>" not in pages[-1]


def test_note_goes_to_stdout_in_a_notebook_only(pages, monkeypatch, capsys):
    note("here")
    assert capsys.readouterr() == ("here\n", "")
    monkeypatch.delattr(builtins, "get_ipython")
    note("here")
    assert capsys.readouterr() == ("", "here\n")


def test_curve_is_inside_the_picture_and_keeps_its_mean():
    points = [(step, (step * 37) % 11) for step in range(1001)]
    few = thinned(points[:1000], 200)
    assert len(few) == 200
    mean = sum(y for _, y in points[:1000]) / 1000
    assert sum(y for _, y in few) / 200 == pytest.approx(mean, rel=1e-12)
    drawn = re.search(r'points="([^"]*)"', svg_curves({"loss": points}))
    assert drawn is not None
    numbers = [tuple(map(float, corner.split(","))) for corner in drawn[1].split()]
    assert all(0 <= x <= 480 and 0 <= y <= 120 for x, y in numbers)
    assert svg_curves({"loss": points[:1]}) == ""


def test_html_table_escapes_its_cells():
    table = html_table(["a", "b"], [["<x>", 1]], ["p & q"])
    assert "&lt;x&gt;" in table and "p &amp; q" in table and "<x>" not in table
    assert table.count("<tr>") == 2
