"""Progress of a task that takes longer than two seconds.

    on a terminal     a bar of tqdm
    in a notebook     a bar in HTML, with curves below it if the task has any
    elsewhere         lines of text, as in the log file of a job: one every ten seconds, or one
                      every `line_every` units

Everything goes to stderr, except for the HTML. Nothing appears in the first two seconds. Then the
task is shown, by a timer if its first unit takes longer. A task inside another one has no bar of
its own: the bar of the outer task shows both. In a process group only the first process shows
anything. TQDM_DISABLE=1 in the environment hides all of it.

Simplified: the bars of one thread must be closed in the reverse order of their opening, as `with`
blocks do.
"""

import html
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist

from minilora.common.notebook import Points, in_notebook, svg_curves

DELAY = 2.0  # seconds before anything is shown
LINE_SECONDS = 10.0  # between two lines of text
REFRESH_SECONDS = 0.5  # between two pictures in a notebook

_innermost: ContextVar[Any] = ContextVar("innermost", default=None)


class ProgressBar:
    """The progress of one task, as a context manager.

    Attributes:
        title: Name of the task, such as "load".
        total: Number of units.
        unit: Name of a unit, such as "row".
        done: Number of units done.
        figures: Further values to show, by name.
        curves: Function that returns the curves for a notebook, or None.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        hidden: bool = False,
        line_every: int | None = None,
        curves: Callable[[], Mapping[str, Points]] | None = None,
    ):
        """Describe the task; its clock starts with the `with` block.

        Args:
            title: Name of the task.
            total: Number of units.
            unit: Name of a unit, in the singular.
            initial: Units that were done before.
            hidden: Show nothing, also of the tasks inside this one.
            line_every: Units between two lines of text where there is neither terminal nor
                notebook; None writes a line every ten seconds.
            curves: Function that returns the points of each curve; None draws none.
        """
        self.title = title
        self.total = total
        self.unit = unit
        self.initial = initial
        self.done = initial
        self.figures: Mapping[str, str] = {}
        self.curves = curves
        self.line_every = line_every
        self.outer: ProgressBar | None = None
        self.hidden = hidden or _is_hidden()
        self._started = time.monotonic()
        self._display: Any = None
        self._timer = threading.Timer(DELAY, self._show_first)
        self._timer.daemon = True
        self._lock = threading.RLock()  # of the display, which the timer's thread may create
        self._closed = False

    def update(self, count: int = 1, figures: Mapping[str, str] | None = None) -> None:
        """Add units, and show the new state if it is time.

        Args:
            count: Units that were done since the last call.
            figures: Values to show, by name; None leaves them.
        """
        self.done += count
        if figures is not None:
            self.figures = figures
        if self.outer is not None:
            self.outer.show_inner(f"{self.title} {self.done}/{self.total}")
        elif not self.hidden:
            self._show()

    def show_inner(self, text: str) -> None:
        """Show the state of a task inside this one.

        Args:
            text: The state of the inner task.
        """
        if self.outer is not None:
            self.outer.show_inner(text)
        elif not self.hidden and self.elapsed() >= DELAY:
            with self._lock:
                self._shown_on().show(self, text, is_step=False)

    def _show(self) -> None:
        """Show the state; a task that ends before anything was shown stays silent."""
        with self._lock:
            is_late = self.elapsed() >= DELAY and self.done < self.total
            if self._display is not None or is_late:
                self._shown_on().show(self, "", is_step=True)

    def _show_first(self) -> None:
        """Show the state if nothing was shown before."""
        with self._lock:
            if self._display is None and self.done < self.total and not self._closed:
                self._shown_on().show(self, "", is_step=False)

    def _shown_on(self) -> Any:
        """Return the display, which is chosen at its first use."""
        if self._display is None:
            if in_notebook():
                self._display = _NotebookDisplay()
            elif sys.stderr.isatty():
                self._display = _TerminalDisplay(self)
            else:
                self._display = _LineDisplay()
        return self._display

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started

    def line(self, inner: str = "") -> str:
        """Return the state as one line of text.

        Args:
            inner: The state of a task inside this one, or "".
        """
        seconds = self.elapsed()
        parts = [f"{self.title}: {self.done}/{self.total} {self.unit}s", f"{seconds:.0f} s"]
        here = self.done - self.initial
        if 0 < here and self.done < self.total:
            left = seconds / here * (self.total - self.done)
            parts.append(f"{left:.0f} s left")
        parts += [f"{name} {value}" for name, value in self.figures.items()]
        if inner:
            parts.append(inner)
        return ", ".join(parts)

    def __enter__(self) -> "ProgressBar":
        self.outer = _innermost.get()
        _innermost.set(self)
        self._started = time.monotonic()
        if self.outer is None and not self.hidden:
            self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        _innermost.set(self.outer)
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._display is not None:
                self._display.close(self)


class _TerminalDisplay:
    """A bar of tqdm."""

    def __init__(self, bar: ProgressBar):
        from tqdm import tqdm  # a late import keeps `import minilora` light

        self.tqdm = tqdm(
            desc=bar.title,
            initial=bar.initial,
            total=bar.total,
            unit=bar.unit,
            dynamic_ncols=True,
            disable=False,
        )
        self.tqdm.start_t -= bar.elapsed()  # the task began before its bar

    def show(self, bar: ProgressBar, inner: str, is_step: bool) -> None:
        shown = [f"{name}={value}" for name, value in bar.figures.items()]
        if inner:
            shown.append(inner)
        self.tqdm.set_postfix_str(", ".join(shown), refresh=bool(inner))
        self.tqdm.update(bar.done - self.tqdm.n)

    def close(self, bar: ProgressBar) -> None:
        self.tqdm.close()


class _NotebookDisplay:
    """A bar in HTML, in the output of the cell."""

    def __init__(self):
        self._handle: Any = None
        self._next = 0.0

    def show(self, bar: ProgressBar, inner: str, is_step: bool) -> None:
        now = time.monotonic()
        if now < self._next and bar.done < bar.total:
            return
        self._next = now + REFRESH_SECONDS
        self._draw(bar, inner)

    def _draw(self, bar: ProgressBar, inner: str) -> None:
        from IPython.display import HTML, display

        page = HTML(notebook_page(bar, inner))
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

    def close(self, bar: ProgressBar) -> None:
        self._draw(bar, "")


class _LineDisplay:
    """Lines of text."""

    def __init__(self):
        self._next = 0.0

    def show(self, bar: ProgressBar, inner: str, is_step: bool) -> None:
        now = time.monotonic()
        due = now >= self._next
        if is_step and bar.line_every is not None:
            due = bar.done % bar.line_every == 0
        if due:
            self._next = now + LINE_SECONDS
            print(bar.line(inner), file=sys.stderr, flush=True)

    def close(self, bar: ProgressBar) -> None:
        pass


def notebook_page(bar: ProgressBar, inner: str = "") -> str:
    """Return the HTML of a bar: its state, and its curves.

    Args:
        bar: The progress.
        inner: The state of a task inside it, or "".
    """
    share = bar.done / bar.total if bar.total else 1.0
    meter = f'<progress value="{share:.4f}" max="1" style="width:20em"></progress>'
    text = html.escape(bar.line(inner))
    picture = "" if bar.curves is None else svg_curves(bar.curves())
    return f"<div>{meter} {text}</div>{picture}"


def _is_hidden() -> bool:
    """Return True if the environment hides progress, or another process shows it."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return True
    return dist.is_available() and dist.is_initialized() and dist.get_rank() != 0
