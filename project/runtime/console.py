"""Console output: lines, tables and progress bars, printed by rank zero."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from project.runtime.distributed import is_rank_zero

REFRESH_PER_SECOND = 2.0  # each redraw takes about a millisecond from the work that it reports
LINE_INTERVAL = 30.0  # minimum seconds between two progress lines of a non-terminal output
MAX_LINES = 10  # progress lines of one task
FILE_WIDTH = 1000  # columns, where the output is not a terminal
TEXT_COLUMNS = 50  # columns reserved for the text beside a bar

_bar_consoles: list[Console] = []  # consoles that show a bar; other output has to go through them, above the bar


def print_rank_zero(text: str | Table) -> None:
    """Print a line or a table on rank zero."""
    if is_rank_zero():
        _console().print(text, highlight=False, soft_wrap=isinstance(text, str))


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print names and values: as a table on a terminal, as plain lines elsewhere."""
    if not is_terminal():
        print_rank_zero("\n".join([f"{title}:", *(f"  {name}: {value}" for name, value in rows.items())]))
        return
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    print_rank_zero(table)


def _console() -> Console:
    if _bar_consoles:
        return _bar_consoles[-1]
    # In a file, long paths are not wrapped.
    is_file = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # Markup is off: a folder name may contain text such as [bold].
    return _Console(markup=False, width=FILE_WIDTH if is_file else None)


class _Console(Console):
    """Console that raises BrokenPipeError, which the command line handles, instead of exiting."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def is_terminal() -> bool:
    """Whether standard output is a terminal that can redraw lines; always False except on rank zero."""
    can_redraw = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    return can_redraw and is_rank_zero()


class EtaEstimator:
    """Estimates the remaining time from the mean speed since the start.

    The speed of the last interval would be misleading: threads report several items together.
    """

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None
        self._first_done = 0
        self._start_time = self._last_time = time.monotonic()

    def count(self, done: int, total: int | None) -> None:
        """Report progress. The clock restarts until ``done`` first exceeds its initial value."""
        self._last_time = time.monotonic()
        if total != self.total or done <= self._first_done:
            self._first_done, self._start_time = done, self._last_time
        self.done, self.total = done, total

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds; ``None`` while there is no progress or the total is unknown."""
        new = self.done - self._first_done
        if self.total is None or new <= 0:
            return None
        left = (self._last_time - self._start_time) / new * (self.total - self.done)
        return max(0.0, left - (time.monotonic() - self._last_time))


def format_duration(seconds: float | None) -> str:
    """Format seconds as ``H:MM:SS``, and ``None`` as ``-:--:--``."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


class _TimeLeft(ProgressColumn):
    """Column with the time left, or with the elapsed time where the total is unknown.

    rich's ``TimeRemainingColumn`` uses the speed of the last seconds; see :class:`EtaEstimator`.
    """

    def __init__(self, eta: EtaEstimator) -> None:
        super().__init__()
        self._eta = eta

    def render(self, task: Task) -> Text:
        """Render ``H:MM:SS``."""
        text = (
            format_duration(task.elapsed) if task.total is None else f"{format_duration(self._eta.seconds_left)} left"
        )
        return Text(text, no_wrap=True)


class Bar:
    """Progress bar with the time left. A background thread draws it, so updates are cheap.

    Args:
        description: Text before the bar.
    """

    def __init__(self, description: str) -> None:
        self._eta = EtaEstimator()
        self._console = Console(markup=False)
        self._width = max(4, min(30, self._console.width - TEXT_COLUMNS))
        texts = [TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[notes]")]
        columns = texts[0], BarColumn(self._width), _TimeLeft(self._eta), texts[1]
        self._bar = Progress(*columns, console=self._console, refresh_per_second=REFRESH_PER_SECOND, transient=True)
        self._task = self._bar.add_task(description, total=None, notes="")

    def start(self) -> None:
        """Show the bar."""
        _bar_consoles.append(self._console)
        self._bar.start()

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()
        _bar_consoles.remove(self._console)

    def count(self, done: int, total: int | None) -> None:
        """Update the number of finished items and the total."""
        self._eta.count(done, total)
        self._bar.update(self._task, completed=done, total=total)

    def describe(self, description: str, notes: Sequence[str] = ()) -> None:
        """Set the text before the bar, and the notes after it that fit on the line."""
        free = self._console.width - self._width - len(description) - len("0:00:00 left") - 3
        fitting: list[str] = []
        for note in notes:
            if len(note) + 1 <= free:
                fitting.append(note)
                free -= len(note) + 1
        self._bar.update(self._task, description=description, notes=" ".join(fitting))


@contextmanager
def progress_counter(description: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show progress on rank zero: a bar on a terminal, occasional lines elsewhere.

    Args:
        description: Text before the bar.
        enabled: False shows nothing.

    Yields:
        A function of the number of finished items and the total.
    """
    if not enabled:
        yield lambda done, total: None
    elif not is_terminal():
        yield _ProgressLines(description).count
    else:
        bar = Bar(description)

        def count(done: int, total: int) -> None:
            bar.count(done, total)
            bar.describe(description, (f"{done:,}/{total:,}",))

        bar.start()
        try:
            yield count
        finally:
            bar.stop()


class _ProgressLines:
    """Progress as lines of text, at most ``MAX_LINES``; short tasks print none."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._eta = EtaEstimator()
        self._last_line_time = time.monotonic()
        self._next_done = 0.0

    def count(self, done: int, total: int) -> None:
        self._eta.count(done, total)
        now = time.monotonic()
        if now - self._last_line_time < LINE_INTERVAL or done < self._next_done or done >= total:
            return
        self._last_line_time, self._next_done = now, done + total / MAX_LINES
        time_left = format_duration(self._eta.seconds_left)
        print_rank_zero(f"{self._description}: {done:,} of {total:,}, {time_left} left")
