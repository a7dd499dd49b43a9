"""Table of the fits of a series: what each measured, and which figures are chosen on the validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from rich.table import Table

from project.reporting.limitations import pluralize
from project.reporting.run_summary import FitFigures
from project.runtime.console import print_rank_zero


class SeriesRow(NamedTuple):
    """One fit of a series.

    Attributes:
        fold: Fold, such as 2/5; empty without folds.
        seed: Seed of the fit.
        figures: Its validation accuracies.
        run: Its run folder; ``None`` if it has none.
    """

    fold: str
    seed: int
    figures: FitFigures
    run: Path | None


#: Columns of accuracies: title, and the value of a fit.
ACCURACIES: dict[str, Callable[[FitFigures], float | None]] = {
    "epoch 0": lambda figures: figures.initial,
    "last epoch": lambda figures: figures.last,
    "best epoch": lambda figures: figures.best,
}


def print_series(rows: Sequence[SeriesRow], total: int) -> None:
    """Print the accuracies of each fit, and their means and standard deviations.

    Args:
        rows: The completed fits; may be empty.
        total: Number of fits of the series.
    """
    if not rows:
        return
    columns = {
        title: values
        for title, value in ACCURACIES.items()
        if (values := [value(row.figures) for row in rows]) and any(value is not None for value in values)
    }
    table = Table(box=None)
    for title in ("fold", "seed", "train / val", *columns, "run"):
        table.add_column(title, justify="left" if title == "run" else "right")
    for index, row in enumerate(rows):
        cells = [_accuracy(values[index]) for values in columns.values()]
        images = f"{row.figures.train_images:,} / {row.figures.val_images:,}"
        table.add_row(row.fold, str(row.seed), images, *cells, row.run.name if row.run else "")
    for name, statistic in (("mean", mean), ("sd", lambda values: stdev(values) if len(values) > 1 else math.nan)):
        known = ([value for value in values if value is not None] for values in columns.values())
        table.add_row("", "", name, *(f"{statistic(values):.4f}".replace("nan", "") for values in known), "")
    done = f"{len(rows)} of {total} fits" if len(rows) < total else f"{total} fits"
    folder = f" in {rows[0].run.parent}" if rows[0].run else ""
    print_rank_zero(f"val/accuracy of {done}{folder}:")
    print_rank_zero(table)
    print_rank_zero(
        "train / val: number of images. Epoch 0 and the last epoch are not chosen by the validation images. The best "
        "epoch is, so its figure is optimistic. The fits share training images, so sd is not a standard error."
    )
    stopped = sum(row.figures.last_is_chosen for row in rows)
    if stopped:
        print_rank_zero(
            f"EarlyStopping chose the last epoch of {pluralize(stopped, 'fit')}: the figure is optimistic, too."
        )


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
