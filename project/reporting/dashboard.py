"""What is to be seen of a fit while it runs and when it is done, in whatever loggers it has."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from project.classifier import ImageClassifier, Step
from project.errors import ConfigError
from project.evaluation.predictions import PredictionCollector, ValidationPredictions, merge_predictions
from project.reporting.figure_logger import FigureLogger, validates
from project.reporting.run_description import parameters
from project.runtime import logger_adapters
from project.runtime.distributed import ProcessGroup
from project.runtime.signals import Interrupted
from project.runtime.system import peak_memory

#: Which numbers share a chart, as regular expressions of their names, by group and title.
CHARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "train and val": {
        "loss": ["train/loss$", "val/loss$"],
        "accuracy": ["train/accuracy$", "val/accuracy$", "val/top5$"],
    },
    "val": {
        "F1, mean of the classes": ["val/f1$"],
        "calibration error": ["val/ece$"],
        "F1 of each class": ["val/f1_of/.*"],
        "recall of each class": ["val/recall_of/.*"],
        "precision of each class": ["val/precision_of/.*"],
    },
    "run": {
        "learning rate of each parameter group": ["lr-.*"],
        "training images a second": ["train/images_per_second$"],
        "memory, MB": ["memory/.*"],
    },
}
#: Of the metrics, those that runs are compared by.
COMPARED = ("accuracy", "f1", "loss", "ece")


class Dashboard(pl.Callback):
    """Logs throughput, memory, texts and the result, and draws figures of the best epoch so far: what best.ckpt does.

    Of a fit that was resumed and has not been better since, they are where they were drawn, in the earlier run.

    Figures are drawn when a fit ends. Before that, whenever validation accuracy has improved, provided that all drawing
    takes less than 5 % of the fit's time and half as many epochs again are over as the last time: a fit of seconds
    draws once, one of a thousand epochs at most 18 times. A drawing is 1.2 MB at most (of 100 classes; 0.3 MB of five),
    and reads 36 images; the projector, which comes at the end, is 3 MB at most, and reads as many images as 2 seconds
    allow. :class:`~project.evaluation.predictions.PredictionCollector` bounds the memory of a validation. What cannot
    be drawn is reported as a warning, once, and the fit continues.

    Args:
        figures: Draw figures, curves, images and the projector; without, there are numbers and texts.
        points: Validation images that the projector shows at most; 0 for no projector.

    Attributes:
        images: Training images seen in this fit, by all processes.
        seconds: Time spent in training epochs, their validation left out.
        parameters: How many parameters are ``trainable`` and ``frozen``.
    """

    def __init__(self, figures: bool = True, points: int = 500) -> None:
        if points < 0:
            raise ConfigError(f"dashboard.points has to be at least 0, not {points}.")
        self._figures = figures
        self._points = points
        self._before: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.parameters = {"trainable": 0, "frozen": 0}
        self._began = self._mark = time.perf_counter()
        self._epoch_images = 0
        self._epoch_seconds = 0.0
        self._logs = False
        self._painter: FigureLogger | None = None  # in the first process alone
        self._shows_input = False
        self._collector: PredictionCollector | None = None
        self._overall: dict[str, Any] = {"score": -math.inf, "values": {}}
        self._best: tuple[ValidationPredictions, int] | None = None
        self._drawn = True

    @property
    def images_per_second(self) -> float:
        """Training images a second over the whole fit."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()
        if self._before is not None:
            self._overall, self._before = self._before, None
        if trainer.loggers and isinstance(pl_module, ImageClassifier) and not getattr(trainer, "fast_dev_run", False):
            self._logs = True
            if trainer.is_global_zero:
                self._painter = FigureLogger(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            self.parameters["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
        values = {f"parameters/{kind}": float(count) for kind, count in self.parameters.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self.on_train_epoch_start(trainer, pl_module)  # nobody calls it in an epoch that a fit was resumed within
        folder = trainer.log_dir if self._logs else None  # all processes ask for it together
        if self._painter is None:
            return
        with self._painter.attempt("charts"):
            for logger in trainer.loggers:
                logger_adapters.layout(logger, CHARTS)
        self._painter.texts(folder)
        self._shows_input = self._figures and not self._painter.stored_input()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_images = 0
        self._mark = time.perf_counter()
        self._epoch_seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch_images += len(batch[0]) * trainer.world_size
        if self._shows_input and self._painter is not None:
            self._shows_input, began = False, time.perf_counter()
            self._painter.live_input(batch)
            self._mark += time.perf_counter() - began  # it is no training

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = self._epoch_seconds + time.perf_counter() - self._mark
        self.images += self._epoch_images
        self.seconds += seconds
        values = {"train/images_per_second": self._epoch_images / seconds}
        memory = peak_memory()
        if memory is not None:
            values["memory/process_peak_mb"] = memory / 1e6
        if pl_module.device.type == "cuda":
            values["memory/gpu_peak_mb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e6
        pl_module.log_dict(values)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_seconds += time.perf_counter() - self._mark
        if not self._logs or not self._figures or trainer.sanity_checking:
            return
        assert isinstance(pl_module, ImageClassifier)
        expected = _expected(trainer)
        ranks, classes = ProcessGroup(), len(pl_module.classes)
        self._collector = PredictionCollector(expected, self._points, classes, ranks.rank, ranks.size)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if self._collector is not None and isinstance(outputs, Step):
            self._collector.batch(outputs.probabilities, outputs.features)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        collector, self._collector = self._collector, None
        score = float(trainer.callback_metrics.get("val/accuracy", -math.inf))
        if self._logs and not trainer.sanity_checking and score > self._overall["score"]:  # the same in all processes
            self._overall = {"score": score, "values": _compared(trainer, "best")}
            if collector is not None:
                assert isinstance(pl_module, ImageClassifier)
                outcomes = ProcessGroup().gather(collector.outcome(pl_module.epoch_metrics("val").each))
                self._best, self._drawn = (merge_predictions(outcomes), trainer.global_step), False
                epochs = trainer.current_epoch + 1
                if self._painter is not None and self._painter.affords(epochs):
                    self._painter.outcome(*self._best, epochs)
                    self._drawn = True
        self._mark = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._painter is None:
            return
        if self._best is not None:
            if not self._drawn:
                self._painter.outcome(*self._best, trainer.current_epoch)
            self._painter.points(*self._best)
        self._log_result(trainer, pl_module)
        self._best = None  # its tensors

    def _log_result(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        painter = self._painter
        if painter is None:
            return
        assert isinstance(module, ImageClassifier)
        with painter.attempt("result"):
            result = {**self._overall["values"], **_compared(trainer, "last")}
            result["result/images_per_second"] = self.images_per_second
            result["result/seconds"] = time.perf_counter() - self._began
            made_with = parameters(trainer, module)
            for logger in trainer.loggers:
                logger_adapters.result(logger, made_with, result, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the best epoch, which may be one before a fit was resumed."""
        return self._overall

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them: no epoch is drawn that is not better."""
        values = {str(name): float(value) for name, value in state_dict["values"].items()}
        self._before = {"score": float(state_dict["score"]), "values": values}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._collector = None
        if isinstance(exception, Interrupted) and trainer.state.fn == "fit":  # figures would take of the time to leave
            self._log_result(trainer, pl_module)


def _expected(trainer: pl.Trainer) -> int | None:
    """How many images of this process are validated, padding included; ``None`` where nobody knows."""
    if not validates(trainer):
        return None
    every: int = len(trainer.datamodule.order("val"))  # type: ignore[attr-defined]
    batches, size = sum(trainer.num_val_batches), getattr(trainer.val_dataloaders, "batch_size", None)
    return min(every, int(batches) * size) if size and math.isfinite(batches) else every


def _compared(trainer: pl.Trainer, when: str) -> dict[str, float]:
    """The present values of the metrics that runs are compared by; those that there are."""
    values = {name: float(trainer.callback_metrics.get(f"val/{name}", math.nan)) for name in COMPARED}
    if when == "last":  # that of an epoch is not known yet when it is validated
        values["train_loss"] = float(trainer.callback_metrics.get("train/loss", math.nan))
    return {f"result/{when}_{name}": value for name, value in values.items() if math.isfinite(value)}
