"""What is said to people: lines, tables, and a bar for what takes its time."""

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

REFRESH = 2.0  # times a second that a bar is drawn: a drawing takes a millisecond of what is being counted
QUIET = 30.0  # seconds, at least, between two lines that stand in for a bar
STEPS = 10  # such lines, at most
WIDE = 1000  # columns of what is no terminal
BESIDE = 50  # columns that are kept for what stands beside a bar

_shown: list[Console] = []  # the one that has a bar on it: what is said meanwhile goes above that


def print_rank_zero(what: str | Table) -> None:
    """Print a line or a table, from one process of a distributed run."""
    if is_rank_zero():
        _console().print(what, highlight=False, soft_wrap=isinstance(what, str))


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print a word and what there is to say to it, row by row: a table on a terminal, lines elsewhere."""
    if not on_a_terminal():
        print_rank_zero("\n".join([f"{title}:", *(f"  {word}: {value}" for word, value in rows.items())]))
        return
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for word, value in rows.items():
        table.add_row(word, value)
    print_rank_zero(table)


def _console() -> Console:
    if _shown:
        return _shown[-1]
    # A file has no edge at which a path would have to be broken in two.
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # No markup: a folder of the user's may be called [bold].
    return _Console(markup=False, width=WIDE if wide else None)


class _Console(Console):
    """A console that leaves it to the command line to end where nobody reads the output."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def on_a_terminal() -> bool:
    """Whether there is one that can draw a line anew; of a distributed run, the first process's alone counts."""
    drawable = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    return drawable and is_rank_zero()


class Pace:
    """How long something still takes, at its mean pace since it began.

    A mean from the beginning: threads hand in what they have done two or more at a time, so that the time between the
    last two counts says nothing.
    """

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None
        self._first = 0
        self._began = self._told = time.monotonic()

    def count(self, done: int, total: int | None) -> None:
        """Tell how many of how many are done; the clock starts with the last count that is not more than the first."""
        self._told = time.monotonic()
        if total != self.total or done <= self._first:
            self._first, self._began = done, self._told
        self.done, self.total = done, total

    @property
    def left(self) -> float | None:
        """Seconds, or ``None`` as long as nothing is known."""
        fresh = self.done - self._first
        if self.total is None or fresh <= 0:
            return None
        rest = (self._told - self._began) / fresh * (self.total - self.done)
        return max(0.0, rest - (time.monotonic() - self._told))


def clock(seconds: float | None) -> str:
    """Seconds as ``H:MM:SS``."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


class _TimeLeft(ProgressColumn):
    """The time left, at the mean pace; the time spent, where nobody knows how much there is to do.

    Not rich's own ``TimeRemainingColumn``: its pace is of the last seconds, in which threads hand in several at once.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        """Seconds as ``H:MM:SS``."""
        text = clock(task.elapsed) if task.total is None else f"{clock(self._pace.left)} left"
        return Text(text, no_wrap=True)


class Bar:
    """A bar with the time left, drawn a few times a second by a thread of its own: to count costs next to nothing.

    Args:
        what: Is counted.
    """

    def __init__(self, what: str) -> None:
        self._pace = Pace()
        self._screen = Console(markup=False)
        self._width = max(4, min(30, self._screen.width - BESIDE))
        words = [TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[notes]")]
        columns = words[0], BarColumn(self._width), _TimeLeft(self._pace), words[1]
        self._bar = Progress(*columns, console=self._screen, refresh_per_second=REFRESH, transient=True)
        self._task = self._bar.add_task(what, total=None, notes="")

    def start(self) -> None:
        """Show it."""
        _shown.append(self._screen)
        self._bar.start()

    def stop(self) -> None:
        """Take it away."""
        self._bar.stop()
        _shown.remove(self._screen)

    def count(self, done: int, total: int | None) -> None:
        """Tell how many of how many are done."""
        self._pace.count(done, total)
        self._bar.update(self._task, completed=done, total=total)

    def tell(self, what: str, notes: Sequence[str] = ()) -> None:
        """Tell what is being counted, and more for which there may be room."""
        free = self._screen.width - self._width - len(what) - len("0:00:00 left") - 3
        fitting: list[str] = []
        for note in notes:
            if len(note) + 1 <= free:
                fitting.append(note)
                free -= len(note) + 1
        self._bar.update(self._task, description=what, notes=" ".join(fitting))


@contextmanager
def progress_counter(what: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line now and then of what takes long. From one process of a distributed run.

    Args:
        what: Is counted.
        enabled: Whether there is any of it.

    Yields:
        A function that takes how many of how many are done.
    """
    if not enabled:
        yield lambda done, count: None
    elif not on_a_terminal():
        yield _Lines(what).count
    else:
        bar = Bar(what)

        def count(done: int, total: int) -> None:
            bar.count(done, total)
            bar.tell(what, (f"{done:,}/{total:,}",))

        bar.start()
        try:
            yield count
        finally:
            bar.stop()


class _Lines:
    """What stands in for a bar in a file of a run's output: few lines, and none of what is done soon."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._pace = Pace()
        self._said = time.monotonic()
        self._next = 0.0

    def count(self, done: int, total: int) -> None:
        self._pace.count(done, total)
        now = time.monotonic()
        if now - self._said < QUIET or done < self._next or done >= total:
            return
        self._said, self._next = now, done + total / STEPS
        print_rank_zero(f"{self._what}: {done:,} of {total:,}, {clock(self._pace.left)} left")
