"""Trials of a sweep: their scores, tables, figure and the config of the best one."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table

from project.evaluation import plots
from project.evaluation.confidence_intervals import wilson
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero
from project.runtime.logger_adapters import add_image, add_result
from project.studies.search_space import HeadSettings

LISTED = 10  # trials in the printed table
WINNER = "winner.yaml"
Rule = Literal["simplest", "highest"]
SCORES = ("accuracy", "low", "high", "loss")


@dataclass(frozen=True)
class Trial:
    """A candidate and its scores on the held-out folds.

    Attributes:
        settings: The candidate.
        epochs: Number of epochs with the highest accuracy; 0 for a solved head.
        accuracy: Mean accuracy over the folds.
        loss: Mean loss over the folds.
        images: Number of held-out images, of which the accuracy is the mean.
        effective_images: Number of equally weighted images that would be as precise (Kish, "Survey Sampling", 1965);
            less than ``images`` if the classes have weights.
    """

    settings: HeadSettings
    epochs: int
    accuracy: float
    loss: float
    images: int
    effective_images: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, see :func:`project.evaluation.confidence_intervals.wilson`."""
        return wilson(self.accuracy * self.effective_images, self.effective_images)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.effective_images)

    def row(self) -> dict[str, str | float | int]:
        """The trial in plain types, for tables and HParams."""
        settings = self.settings
        arguments = ", ".join(f"{name}={value}" for name, value in settings.head.init_args.items())
        return {
            "head": f"{settings.head.name}({arguments})" if arguments else settings.head.name,
            "features": settings.features,
            "lr": "solved" if settings.lr is None else settings.lr,
            "weight_decay": "" if settings.weight_decay is None else settings.weight_decay,
            "label_smoothing": settings.label_smoothing,
            "epochs": self.epochs,
            "accuracy": round(self.accuracy, 6),
            "low": round(self.interval[0], 6),
            "high": round(self.interval[1], 6),
            "loss": round(self.loss, 6),
        }

    def model_settings(self) -> dict[str, Any]:
        """Settings of ``model`` that train this candidate."""
        settings = self.settings
        shared: dict[str, Any] = {"features": settings.features, "label_smoothing": settings.label_smoothing}
        shared |= {"head": settings.head.as_dict(), "scheduler": None, "scheduler_frequency": 1}
        if settings.lr is None:
            return {**shared, "head_init": "solved"}
        arguments = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": arguments}
        return {**shared, "head_init": "random", "optimizer": optimizer}


def best_epoch(settings: HeadSettings, scores: torch.Tensor, weights: torch.Tensor) -> Trial:
    """The best epoch of a candidate.

    Args:
        settings: The candidate.
        scores: Accuracy and loss of each fold after each epoch ``(F, E, 2)``.
        weights: Weight of each held-out image in the scores, float64 ``(N,)``, not all 0.
    """
    accuracy, loss = scores.nanmean(0).unbind(1)  # NaN: a fold whose images have no weight in the loss
    best = max(range(len(accuracy)), key=lambda epoch: (float(accuracy[epoch]), -float(loss[epoch])))
    epochs = 0 if settings.lr is None else best + 1
    effective = float(weights.sum() ** 2 / weights.square().sum())
    return Trial(settings, epochs, float(accuracy[best]), float(loss[best]), len(weights), effective)


def choose(trials: Sequence[Trial], rule: Rule) -> Trial:
    """The trial to fit.

    Args:
        trials: All trials, that with the highest accuracy first.
        rule: ``highest``: the first one; ``simplest``: the solved head with the smallest loss, if its accuracy is
            within one standard error of the highest, else the first one.
    """
    solved = [trial for trial in _close(trials) if trial.settings.lr is None] if rule == "simplest" else []
    return min(solved, key=lambda trial: trial.loss, default=trials[0])


def _close(trials: Sequence[Trial]) -> list[Trial]:
    """Trials whose accuracy is within one standard error of that of the first, the first included."""
    limit = trials[0].accuracy - trials[0].standard_error
    return [trial for trial in trials if trial.accuracy >= limit]


def report(trials: Sequence[Trial], chosen: Trial, seconds: float) -> None:
    """Print the best trials, and which one was chosen and why."""
    table = Table(box=None)
    names = [*trials[0].row()]
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name in ("head", "features") else "right")
    listed = [*trials[:LISTED], *([] if chosen in trials[:LISTED] else [chosen])]
    for trial in listed:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.row().values()))
    print_rank_zero(table)
    best = trials[0]
    equivalent = round(best.effective_images)
    weighted = f" (whose weights make them as precise as {equivalent:,})" if equivalent < best.images else ""
    print_rank_zero(
        f"Sweep: {len(trials)} candidates in {seconds:.1f} s, scored on {best.images:,} held-out images{weighted}; "
        f"{len(_close(trials)) - 1} others are within one standard error ({best.standard_error:.4f}) of the best"
    )
    diverged = sum(math.isinf(trial.loss) for trial in trials)
    if diverged:
        print_rank_zero(f"Sweep: {diverged} candidates have diverged; their learning rate is too high")
    reason = "it has the highest accuracy"
    if chosen is not best:
        reason = "its accuracy is within one standard error of the highest (--rule highest takes the first of the list)"
    settings = chosen.settings
    head = "the solved head" if settings.lr is None else f"{settings.head.name} with learning rate {settings.lr:g}"
    print_rank_zero(f"Sweep: fits {head} on {settings.features} features, because {reason}")
    print_rank_zero(
        "Sweep: this accuracy is optimistic, as it was used for the choice; the fit measures the validation images"
    )


def write(folder: Path, trials: Sequence[Trial]) -> None:
    """Write all trials as a CSV file, as a figure, and for TensorBoard's HParams."""
    rows = [trial.row() for trial in trials]
    with atomic_write(folder / "sweep.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    figure = plots.render(plots.sweep(rows))
    with atomic_write(folder / "sweep.png") as temporary:
        figure.save(temporary, "PNG")
    for number, row in enumerate(rows, 1):
        logger = TensorBoardLogger(folder, "trials", f"rank_{number:03d}", default_hp_metric=False)
        settings = {name: value for name, value in row.items() if name not in SCORES}
        add_result(logger, settings, {f"sweep/{name}": float(row[name]) for name in SCORES}, 0)
        if number == 1:
            add_image(logger, "sweep", figure, 0)
        logger.finalize("success")


def write_winner(folder: Path, config: dict[str, Any], trial: Trial) -> Path:
    """Write the config that trains the best trial.

    Args:
        folder: Folder of the sweep.
        config: Config of the sweep without its own settings.
        trial: The best trial.

    Returns:
        Path of the file.
    """
    model = {**config["model"], **trial.model_settings()}
    trainer = {**config["trainer"], "max_epochs": trial.epochs}  # 0 for a solved head
    with atomic_write(folder / WINNER) as temporary:
        temporary.write_text(yaml.safe_dump({**config, "model": model, "trainer": trainer}, sort_keys=False))
    return folder / WINNER
