"""Draws what a dashboard shows, when there is time for it, into all loggers of a fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.evaluation.predictions import ValidationPredictions
from project.reporting.thumbnails import Thumbnails
from project.runtime import lightning_internals, logger_adapters

#: Share of a fit's time that drawing may take while it goes on.
SHARE = 0.05
#: Seconds that the first drawing is thought to take.
EXPECTED = 1.0
#: How many times as many epochs have to be over before the next one: a longer history is no better to look at.
FURTHER = 1.5


class FigureLogger:
    """Draws for one fit, in its first process.

    Whatever goes wrong is told as a warning, once for each thing that is drawn, and the fit goes on: a fit of hours
    does not die of a figure.

    Args:
        trainer: The fit's.
        module: What it trains.
    """

    def __init__(self, trainer: pl.Trainer, module: ImageClassifier) -> None:
        self._trainer = trainer
        self._module = module
        self._began = time.perf_counter()
        self._spent = 0.0
        self._cost = EXPECTED
        self._epochs = 0
        self._warned: set[str] = set()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Do something that may fail, and that takes of the time for drawing."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                told = f"{type(error).__name__}: {error}"
                warnings.warn(f"The dashboard lacks {what}, as that could not be logged: {told}", stacklevel=2)
        finally:
            self._spent += time.perf_counter() - began

    def texts(self, folder: str | None) -> None:
        """Log the config and the data in words.

        Args:
            folder: Of the run.
        """
        from project.reporting.run_description import data_report

        config = Path(folder or ".", "config.yaml")
        if config.is_file():
            with self.attempt("config"):
                text = config.read_text(encoding="utf-8")
                logger_adapters.log_text(self._trainer, "config", f"```yaml\n{text}\n```")
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, ImageDataModule) and data.source is not None:
            with self.attempt("data"):
                logger_adapters.log_text(self._trainer, "data", data_report(data))

    def stored_input(self) -> bool:
        """Draw the training images of stored rows, in all their views; says whether there are any."""
        stored, data = self._module.stored_features, getattr(self._trainer, "datamodule", None)
        if stored is None or not stored.examples or not isinstance(data, ImageDataModule) or data.source is None:
            return False
        with self.attempt("train/input"):
            from project.features.views import load_image
            from project.reporting import figures

            views = [view for of_one in stored.examples for view in of_one]
            count = len(stored.examples[0])
            captions = figures.named(torch.tensor([view.sample.label for view in views]), self._module.classes)
            if count > 1:
                captions = [f"{caption}\nview {at % count + 1} of {count}" for at, caption in enumerate(captions)]
            images = [load_image(data.source, view) for view in views]
            self._log("train/input", figures.of_input(images, captions, count if count > 2 else 6))
        return True

    def live_input(self, batch: Sequence[torch.Tensor]) -> None:
        """Draw the first images of a training batch."""
        with self.attempt("train/input"):
            from project.reporting import figures

            images, labels = (part[: figures.INPUTS].cpu() for part in batch[:2])
            self._log("train/input", figures.of_input(list(images), figures.named(labels, self._module.classes)))

    def affords(self, epochs: int) -> bool:
        """Whether there is time to draw an outcome now.

        Args:
            epochs: How many are over.
        """
        allowed = SHARE * (time.perf_counter() - self._began)
        return self._spent + self._cost <= allowed and epochs >= FURTHER * self._epochs

    def outcome(self, outcome: ValidationPredictions, step: int, epochs: int) -> None:
        """Draw the figures and the curves of an outcome.

        Args:
            outcome: Of a validation.
            step: When that was.
            epochs: How many are over.
        """
        if not len(outcome):
            return
        before, self._epochs, classes = self._spent, epochs, self._module.classes
        with self.attempt("figures"):
            from project.reporting import figures

            pictures = figures.of_outcome(outcome, classes, self._thumbnails())
        for name, picture in pictures.items():
            with self.attempt(name):
                self._log(name, picture(), step)
        with self.attempt("curves"):
            for name, (positive, probabilities) in figures.curves_of(outcome, classes).items():
                for logger in self._trainer.loggers:
                    logger_adapters.curves(logger, name, positive, probabilities, step)
        self._cost = self._spent - before

    def points(self, outcome: ValidationPredictions, step: int) -> None:
        """Log an outcome's features for the projector."""
        if len(outcome.feature_indices) < 2:
            return
        with self.attempt("projector"):
            from project.reporting import figures

            found = figures.points_of(outcome, self._module.classes, self._thumbnails())
            for logger in self._trainer.loggers:
                logger_adapters.points(logger, "projector", found, step)

    def _thumbnails(self) -> Thumbnails | None:
        """Of the validation images, where they are the data module's: the user may have given loaders."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if not validates(self._trainer) or data.source is None:
            return None
        return Thumbnails(data.source, data.splits["val"])

    def _log(self, name: str, picture: Any, step: int | None = None) -> None:
        for logger in self._trainer.loggers:
            logger_adapters.image(logger, name, picture, self._trainer.global_step if step is None else step)


def validates(trainer: pl.Trainer) -> bool:
    """Whether a fit validates the images of an ImageDataModule."""
    data = getattr(trainer, "datamodule", None)
    return isinstance(data, ImageDataModule) and lightning_internals.validation_data(trainer) is data
