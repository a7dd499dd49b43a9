"""What a fit says of itself: what is frozen before it begins, and a short table when it is done."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from torch import nn

from project.callbacks import early_stopping_resume
from project.callbacks.model_checkpoint import BestCheckpoint
from project.classifier import ImageClassifier
from project.evaluation.confidence_intervals import wilson
from project.reporting.dashboard import Dashboard
from project.runtime.console import print_rank_zero, print_table
from project.runtime.logger_adapters import log_text

LISTED = 25  # classes whose own recall is printed


class RunSummary(pl.Callback):
    """Says what trains and what is frozen when a fit begins, and what came of it at the end.

    Args:
        dashboard: Whose throughput and parameter counts are reported.
    """

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._began = time.perf_counter()
        self._seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        trains = ", ".join([*pl_module.cut.trainable, "head"])
        count = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        print_rank_zero(f"Trains: {trains} ({count:,} parameters) for {len(pl_module.classes)} classes")
        print_rank_zero(_stages(pl_module))
        frozen = f"{_frozen(pl_module)}, SHA-256 {pl_module.frozen_sha256}"
        print_rank_zero(f"Frozen: {frozen}")
        log_text(trainer, "frozen", frozen)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds = time.perf_counter() - self._began

    def show(self, trainer: pl.Trainer, model: ImageClassifier, card: Path | None = None) -> None:
        """Print the result, once the progress bar is gone.

        Args:
            trainer: The trainer whose fit is done.
            model: What it trained.
            card: Where its model card is.
        """
        why = early_stopping_resume.reason(trainer)
        rows = {} if why is None else {"ended": f"early. {why}"}
        kept, reload = trainer.checkpoint_callbacks, None  # the user's own come before ours
        saved = next((each for each in kept if isinstance(each, BestCheckpoint)), trainer.checkpoint_callback)
        # A resumed fit knows the best checkpoint of an older run, which need not be there any more.
        if isinstance(saved, ModelCheckpoint) and Path(saved.best_model_path).is_file():
            path = _from_here(Path(saved.best_model_path))
            rows |= _best(saved)
            rows["checkpoint"] = f"{path} ({path.stat().st_size / 1000:.0f} kB)"
            reload = f'Reload it: from project import load; load("{path}").predict(["a.jpg"])'
        if card is not None and card.is_file():
            rows["model card"] = str(_from_here(card))
        speed = f"{self._dashboard.images_per_second:,.0f} training images/s"
        rows["time"] = f"{self._seconds:.1f} s, {speed}"
        rows["frozen"] = f"{_frozen(model)}{', unchanged' if model.cut.frozen else ''}"
        rows["SHA-256"] = f"{model.frozen_sha256} before and after"
        if isinstance(trainer.logger, TensorBoardLogger):
            rows["dashboard"] = f"tensorboard --logdir {_from_here(Path(trainer.logger.save_dir))}"
        print_table("Result", rows)
        _report_absent(model, "val")
        if reload:
            print_rank_zero(reload)  # on one line however narrow the terminal, to be copied


def print_evaluation(trainer: pl.Trainer, model: ImageClassifier, stage: str) -> None:
    """Print what an evaluation came to.

    Args:
        trainer: What has evaluated.
        model: What was evaluated.
        stage: ``val`` or ``test``.
    """
    counts = model.epoch_metrics(stage).counts
    images = 0 if counts is None else counts.images
    rows: dict[str, str] = {}
    for name, value in trainer.callback_metrics.items():
        classes = name.startswith(f"{stage}/") and "_of/" in name
        if not classes or (name.startswith(f"{stage}/recall_of/") and len(model.classes) <= LISTED):
            rows[name] = f"{float(value):.4f}"
    accuracy = f"{stage}/accuracy"
    if accuracy in rows and images:
        rows[accuracy] += _interval(float(trainer.callback_metrics[accuracy]), images)
    print_table("Result", rows)
    _report_absent(model, stage)


def _report_absent(model: ImageClassifier, stage: str) -> None:
    """Name the classes without an image, whose scores are undefined."""
    counts = model.epoch_metrics(stage).counts
    support = [] if counts is None else counts.support.tolist()
    absent = [name for name, images in zip(model.classes, support, strict=False) if not images]
    if absent and len(absent) < len(model.classes):
        names = ", ".join(absent[:LISTED]) + (", ..." if len(absent) > LISTED else "")
        print_rank_zero(f"{stage} has no images of {names}: {stage}/f1 is the mean of the other classes.")


def _interval(accuracy: float, images: int) -> str:
    low, high = wilson(accuracy * images, images)
    return f", 95 % interval {low:.3f} to {high:.3f} of {images:,} images"


def _best(saved: ModelCheckpoint) -> dict[str, str]:
    """What the best epoch came to."""
    if saved.best_model_score is None:
        return {}
    score = float(saved.best_model_score)
    rows = {f"best {saved.monitor}": f"{score:.4f}"}
    measured = saved.measured if isinstance(saved, BestCheckpoint) else None
    if measured is not None and measured.epoch is not None:
        if measured.images:
            rows[f"best {saved.monitor}"] += _interval(score, measured.images)
        more = {name: measured.metrics[name] for name in ("val/f1", "val/ece", "val/loss") if name in measured.metrics}
        rows["in epoch"] = ", ".join([str(measured.epoch + 1), *(f"{name} {more[name]:.4f}" for name in more)])
    return rows


def _from_here(path: Path) -> Path:
    """A path as short as it can be said."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _stages(model: ImageClassifier) -> Table:
    """The network by stages: what trains and what does not, and how large it is."""
    parts: dict[str, nn.Module] = {**model.backbone.stages, "head": model.head}
    table = Table(box=None)
    table.add_column("stage")
    table.add_column("")
    table.add_column("parameters", justify="right")
    table.add_column("kB", justify="right")
    for name, part in [*parts.items(), ("all", nn.ModuleDict(parts))]:
        count = sum(parameter.numel() for parameter in part.parameters())
        size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        state = "" if name == "all" else "frozen" if name in model.cut.frozen else "trains"
        table.add_row(name, state, f"{count:,}", f"{size / 1000:,.0f}")
    return table


def _frozen(model: ImageClassifier) -> str:
    backbone = model.backbone
    if not model.cut.frozen:
        return f"nothing of {backbone.name}"
    if not model.cut.trainable:
        return f"all of {backbone.name}"
    return f"{', '.join(model.cut.frozen)} of {backbone.name}"
