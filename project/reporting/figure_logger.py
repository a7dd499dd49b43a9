"""FigureLogger: draws the figures of a dashboard within a time budget and logs them to all loggers of a fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image

from project.callbacks.interpolation import ALPHAS, Curve
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.evaluation.predictions import ValidationPredictions
from project.evaluation.validation_data import validation_module
from project.reporting.run_description import data_report
from project.reporting.thumbnails import Thumbnails
from project.runtime import logger_adapters

#: Share of the elapsed time that drawing may take before the fit ends.
TIME_SHARE = 0.05
#: Estimated seconds of the first drawing.
FIRST_COST = 1.0
#: Growth of the number of epochs before figures are drawn again.
EPOCH_GROWTH = 1.5


class FigureLogger:
    """Logs the figures of one fit, on rank zero.

    A failure causes a warning, once per figure; the fit continues.

    Args:
        trainer: The trainer of the fit.
        module: The model that is trained.
    """

    def __init__(self, trainer: pl.Trainer, module: ImageClassifier) -> None:
        self._trainer = trainer
        self._module = module
        self._start = time.perf_counter()
        self._spent = 0.0
        self._cost = FIRST_COST
        self._drawn_at_epoch = 0
        self._warned: set[str] = set()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turn an error into a warning that names the figure, and charge the time to the budget."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"Dashboard: could not log {name}: {type(error).__name__}: {error}", stacklevel=2)
        finally:
            self._spent += time.perf_counter() - start

    def log_texts(self, folder: str | None) -> None:
        """Log the config and the description of the data.

        Args:
            folder: Folder of the run, with its ``config.yaml``.
        """
        config = Path(folder or ".", "config.yaml")
        if config.is_file():
            with self.attempt("config"):
                text = config.read_text(encoding="utf-8")
                logger_adapters.log_text(self._trainer, "config", f"```yaml\n{text}\n```")
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, ImageDataModule) and data.source is not None:
            with self.attempt("data"):
                logger_adapters.log_text(self._trainer, "data", data_report(data))

    def log_stored_input(self) -> bool:
        """Log the training images behind stored features, in all their views.

        Returns:
            Whether the fit trains on stored features.
        """
        stored, data = self._module.stored_features, getattr(self._trainer, "datamodule", None)
        if stored is None or not stored.examples or not isinstance(data, ImageDataModule) or data.source is None:
            return False
        with self.attempt("train/input"):
            from project.features.views import load_image
            from project.reporting import figures

            views = [view for image_views in stored.examples for view in image_views]
            count = len(stored.examples[0])
            labels = torch.tensor([view.sample.label for view in views])
            captions = figures.class_captions(labels, self._module.classes)
            if count > 1:
                captions = [f"{text}\nview {index % count + 1} of {count}" for index, text in enumerate(captions)]
            images = [load_image(data.source, view) for view in views]
            self._log("train/input", figures.input_grid(images, captions, count if count > 2 else 6))
        return True

    def log_batch_input(self, batch: Sequence[torch.Tensor]) -> None:
        """Log the first images of a training batch."""
        with self.attempt("train/input"):
            from project.reporting import figures

            images, labels = (part[: figures.INPUT_IMAGES].cpu() for part in batch[:2])
            captions = figures.class_captions(labels, self._module.classes)
            self._log("train/input", figures.input_grid(list(images), captions))

    def has_budget(self, epochs: int) -> bool:
        """Whether the time budget allows figures now.

        Args:
            epochs: Number of completed epochs.
        """
        budget = TIME_SHARE * (time.perf_counter() - self._start)
        return self._spent + self._cost <= budget and epochs >= EPOCH_GROWTH * self._drawn_at_epoch

    def log_predictions(self, predictions: ValidationPredictions, step: int, epochs: int) -> None:
        """Log the figures and the precision-recall curves of a validation.

        Args:
            predictions: Predictions of the validation.
            step: Global step of the validation.
            epochs: Number of completed epochs.
        """
        if not len(predictions):
            return
        spent_before, self._drawn_at_epoch, classes = self._spent, epochs, self._module.classes
        drawings: dict[str, Callable[[], Image.Image]] = {}
        with self.attempt("figures"):
            from project.reporting import figures

            drawings = figures.validation_figures(predictions, classes, self._thumbnails())
        for name, draw in drawings.items():
            with self.attempt(name):
                self._log(name, draw(), step)
        with self.attempt("curves"):
            for name, (positive, probabilities) in figures.precision_recall_curves(predictions, classes).items():
                for logger in self._trainer.loggers:
                    logger_adapters.add_pr_curve(logger, name, positive, probabilities, step)
        self._cost = self._spent - spent_before

    def log_interpolation(self, curve: Curve, step: int) -> None:
        """Log the accuracy and the loss of interpolated weights."""
        with self.attempt("interpolation"):
            from project.evaluation import plots

            accuracies, losses = (
                [evaluation.metrics[name] for evaluation in curve.evaluations] for name in ("val/accuracy", "val/loss")
            )
            images, chosen = curve.chosen.images, curve.chosen.interpolated
            assert chosen is not None
            figure = plots.interpolation(ALPHAS, accuracies, losses, images, chosen, curve.end)
            self._log("interpolation", plots.render(figure), step)

    def log_projector(self, predictions: ValidationPredictions, step: int) -> None:
        """Log the features of a validation to the embedding projector."""
        if len(predictions.feature_indices) < 2:
            return
        with self.attempt("projector"):
            from project.reporting import figures

            points = figures.embedding_points(predictions, self._module.classes, self._thumbnails())
            for logger in self._trainer.loggers:
                logger_adapters.add_embedding(logger, "projector", points, step)

    def _thumbnails(self) -> Thumbnails | None:
        """Thumbnails of the validation images; ``None`` if these come from the user's own loaders."""
        data = validation_module(self._trainer)
        if data is None or data.source is None:
            return None
        return Thumbnails(data.source, data.splits["val"])

    def _log(self, name: str, image: Image.Image, step: int | None = None) -> None:
        for logger in self._trainer.loggers:
            logger_adapters.add_image(logger, name, image, self._trainer.global_step if step is None else step)
