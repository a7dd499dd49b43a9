"""Console output of a fit and of an evaluation: trainable and frozen stages, and a table of results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from torch import nn

from project.callbacks import early_stopping_resume
from project.callbacks.model_checkpoint import BestCheckpoint
from project.classifier import ImageClassifier
from project.evaluation.candidates import STAGES, best_weights
from project.evaluation.confidence_intervals import wilson
from project.reporting.dashboard import Dashboard
from project.reporting.limitations import pluralize
from project.reporting.run_description import (
    format_drift,
    format_weights,
    frozen_parts,
    starting_checkpoint,
    trained_parameters,
    trained_parts,
)
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero, print_table
from project.runtime.logger_adapters import log_text

MAX_CLASSES = 25  # with more, per-class recall is not printed


class FitFigures(NamedTuple):
    """Validation accuracies of a fit.

    Attributes:
        initial: That of epoch 0; ``None`` if the fit did not validate its initial head.
        last: That of the last epoch; ``None`` without an epoch.
        best: The highest one.
        epochs: Number of completed epochs.
        train_images: Number of training images.
        val_images: Number of validation images.
        stopped_by: Metric by which EarlyStopping has chosen the last epoch; ``None`` if it has not.
        start: Checkpoint whose weights the result depends on; ``None`` for none.
    """

    initial: float | None
    last: float | None
    best: float | None
    epochs: int
    train_images: int
    val_images: int
    stopped_by: str | None
    start: str | None

    @property
    def last_is_chosen(self) -> bool:
        """Whether the validation images have chosen the last epoch."""
        return self.stopped_by is not None and self.stopped_by.startswith("val/")


class RunSummary(pl.Callback):
    """Prints trainable and frozen stages when training starts, and the result of the fit.

    Args:
        dashboard: Measures the training throughput.
    """

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._start = time.perf_counter()
        self._seconds = 0.0
        #: Epoch, from 1, or 0 before the first one; and accuracy of the raw weights, of each validation.
        self._accuracies: list[tuple[int, float]] = []
        self._best: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()
        self._accuracies, self._best = [], None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and accuracy is not None:
            self._accuracies.append((lightning_internals.epochs(trainer).ready, float(accuracy)))
            best = trainer.callback_metrics[f"{STAGES[best_weights(trainer.callback_metrics)]}/accuracy"]
            self._best = float(best) if self._best is None else max(self._best, float(best))

    def figures(self, trainer: pl.Trainer, model: ImageClassifier) -> FitFigures:
        """Validation accuracies of a fit that has ended. Epochs before a resume are counted, but not known."""
        data: Any = getattr(trainer, "datamodule", None)
        counts, epochs = model.epoch_metrics("val").counts, trainer.current_epoch
        by_epoch = dict(self._accuracies)  # of several validations of an epoch, the last one
        return FitFigures(
            by_epoch.get(0),
            by_epoch.get(epochs) if epochs else None,
            self._best,
            epochs,
            len(getattr(data, "splits", {}).get("train", ())),
            0 if counts is None else counts.images,
            early_stopping_resume.stop_metric(trainer),
            starting_checkpoint(trainer, model),
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        count = trained_parameters(pl_module)
        trained = f"{trained_parts(pl_module)} ({count:,} parameters)" if count else "nothing"
        print_rank_zero(f"Trainable: {trained}, {len(pl_module.classes)} classes")
        print_rank_zero(_stage_table(pl_module))
        frozen = f"{frozen_parts(pl_module)}, SHA-256 {pl_module.frozen_sha256}"
        print_rank_zero(f"Frozen: {frozen}")
        log_text(trainer, "frozen", frozen)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds = time.perf_counter() - self._start

    def show(self, trainer: pl.Trainer, model: ImageClassifier, card: Path | None = None) -> None:
        """Print the result of a fit. Call it after the progress bar has closed.

        Args:
            trainer: The trainer of the fit.
            model: The trained model.
            card: Path of the model card.
        """
        reason = early_stopping_resume.stop_reason(trainer)
        rows = {} if reason is None else {"stopped early": reason}
        load_command = None
        # Prefer ours: the user's own checkpoint callbacks come first in the list.
        best = lightning_internals.find_callback(trainer, BestCheckpoint) or trainer.checkpoint_callback
        # A resumed fit may name the best checkpoint of an earlier run, which may have been deleted.
        if isinstance(best, ModelCheckpoint) and Path(best.best_model_path).is_file():
            path = _relative(Path(best.best_model_path))
            rows |= _best_epoch(best)
            if isinstance(best, BestCheckpoint):
                if model.validates_average and best.evaluation is not None:
                    rows.setdefault("weights", format_weights(best.evaluation.weights))
                rows |= _selection(self.figures(trainer, model), best.validations)
                rows |= {} if best.gain is None else {"gain over the initial head": str(best.gain)}
            rows["checkpoint"] = f"{path} ({path.stat().st_size / 1000:.0f} kB)"
            load_command = f'To load it: from project import load; load("{path}").predict(["a.jpg"])'
        if card is not None and card.is_file():
            rows["model card"] = str(_relative(card))
        rate = self._dashboard.images_per_second
        rows["time"] = f"{self._seconds:.1f} s{f', {rate:,.0f} training images/s' if rate else ''}"
        rows["frozen"] = f"{frozen_parts(model)}{', unchanged' if model.has_frozen_tensors else ''}"
        rows["SHA-256"] = f"{model.frozen_sha256} before and after"
        if isinstance(trainer.logger, TensorBoardLogger):
            rows["dashboard"] = f"tensorboard --logdir {_relative(Path(trainer.logger.save_dir))}"
        print_table("Result", rows)
        _report_absent_classes(model, "val")
        if load_command:
            print_rank_zero(load_command)  # outside the table, which would wrap it, so that it can be copied


def print_evaluation(trainer: pl.Trainer, model: ImageClassifier, stage: str) -> None:
    """Print the metrics of an evaluation.

    Args:
        trainer: The trainer that ran the evaluation.
        model: The evaluated model.
        stage: ``val`` or ``test``.
    """
    counts = model.epoch_metrics(stage).counts
    images = 0 if counts is None else counts.images
    rows: dict[str, str] = {}
    for name, value in trainer.callback_metrics.items():
        per_class = name.startswith(f"{stage}/") and "_of/" in name
        if not per_class or (name.startswith(f"{stage}/recall_of/") and len(model.classes) <= MAX_CLASSES):
            rows[name] = f"{float(value):.4f}"
    accuracy = f"{stage}/accuracy"
    if accuracy in rows and images:
        rows[accuracy] += _interval(float(trainer.callback_metrics[accuracy]), images)
    print_table("Result", rows)
    _report_absent_classes(model, stage)


def _report_absent_classes(model: ImageClassifier, stage: str) -> None:
    """Print the classes without images: their metrics are undefined."""
    counts = model.epoch_metrics(stage).counts
    support = [] if counts is None else counts.support.tolist()
    absent = [name for name, images in zip(model.classes, support, strict=False) if not images]
    if absent and len(absent) < len(model.classes):
        names = ", ".join(absent[:MAX_CLASSES]) + (", ..." if len(absent) > MAX_CLASSES else "")
        print_rank_zero(f"{stage} has no images of {names}: {stage}/f1 is the mean over the other classes.")


def _interval(accuracy: float, images: int) -> str:
    low, high = wilson(accuracy * images, images)
    return f", 95 % interval {low:.3f} to {high:.3f} on {pluralize(images, 'image')}"


def _best_epoch(best: ModelCheckpoint) -> dict[str, str]:
    if best.best_model_score is None:
        return {}
    score, key = float(best.best_model_score), f"best {best.monitor}"
    rows = {key: f"{score:.4f}"}
    evaluation = best.evaluation if isinstance(best, BestCheckpoint) else None
    if evaluation is not None and evaluation.epoch is not None:
        if evaluation.images:
            rows[key] += _interval(score, evaluation.images)
        names = [name for name in ("val/f1", "val/ece", "val/loss") if name in evaluation.metrics]
        metrics = [f"{name} {evaluation.metrics[name]:.4f}" for name in names]
        rows["best epoch"] = ", ".join([str(evaluation.epoch + 1), *metrics])
        if evaluation.interpolated is not None:
            end = "the moving average of this epoch" if evaluation.weights == "ema" else "this epoch"
            rows["weights"] = f"interpolated: alpha {evaluation.interpolated} between the start (0) and {end} (1)"
        similarity = format_drift(evaluation)
        if similarity is not None:
            rows["features"] = similarity
    return rows


def _selection(figures: FitFigures, validations: int) -> Mapping[str, str]:
    """What the validation images have chosen, and the figures that they have not."""
    if not figures.val_images:
        return {}
    images = "this image" if figures.val_images == 1 else f"these {figures.val_images:,} images"
    rows = {"chosen by": f"nothing: it is the only validation of {images}"}
    if validations > 1:
        rows["chosen by"] = f"{images}, from {validations} validations, so it is optimistic"
        if figures.initial is not None:
            rows["epoch 0"] = f"val/accuracy {figures.initial:.4f}, not chosen by {images}"
        if figures.last is not None:
            chosen = "chosen by EarlyStopping" if figures.last_is_chosen else f"not chosen by {images}"
            rows["last epoch"] = f"{figures.epochs}, val/accuracy {figures.last:.4f}, {chosen}"
    if figures.start is not None:
        rows["start"] = f"{figures.start}, which another fit may have chosen by some of the validation images"
    return rows


def _relative(path: Path) -> Path:
    """The path relative to the working directory, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _stage_table(model: ImageClassifier) -> Table:
    parts: dict[str, nn.Module] = {**model.backbone.stages, "head": model.head}
    suffix = "trainable" if model.backbone.adapter is None else "adapted"
    states = {name: "frozen" if name in model.cut.frozen else suffix for name in model.backbone.stages}
    states["head"] = "trainable"
    table = Table(box=None)
    table.add_column("stage")
    table.add_column("")
    table.add_column("parameters", justify="right")
    table.add_column("kB", justify="right")
    for name, part in [*parts.items(), ("total", nn.ModuleList(parts.values()))]:
        count = sum(parameter.numel() for parameter in part.parameters())
        size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        table.add_row(name, states.get(name, ""), f"{count:,}", f"{size / 1000:,.0f}")
    return table
