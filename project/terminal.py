"""What is said to people: lines, tables, and a bar for what takes its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@rank_zero_only
def say(what: str | Table) -> None:
    """Print a line or a table, from one process of a distributed run."""
    # No markup: a folder of the user's may be called [bold].
    Console(markup=False, soft_wrap=isinstance(what, str)).print(what, highlight=False)


@contextmanager
def counting(what: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, from the first process of a distributed run; elsewhere nothing.

    Args:
        what: Is counted.
        enabled: Whether there is one at all.

    Yields:
        A function that takes how many of how many are done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    shown = enabled and console.is_terminal and getattr(rank_zero_only, "rank", 0) == 0
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)
