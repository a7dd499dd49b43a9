"""Dashboard: logs throughput, memory, texts, figures and the result of a fit to all of its loggers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.interpolation import Interpolation
from project.classifier import ImageClassifier
from project.errors import ConfigError
from project.evaluation.candidates import STAGES, best_weights
from project.evaluation.predictions import PredictionCollector, ValidationPredictions, merge_predictions
from project.evaluation.step_outputs import StepOutput
from project.evaluation.validation_data import validation_module
from project.reporting.figure_logger import FigureLogger
from project.reporting.run_description import format_weights, hyperparameters
from project.runtime import lightning_internals, logger_adapters
from project.runtime.distributed import ProcessGroup
from project.runtime.signals import Interrupted
from project.runtime.system import peak_memory

#: Layout of TensorBoard's custom scalars: group, chart title, and regular expressions of the tags in the chart.
CHARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "train and val": {
        "loss": ["train/loss$", "val/loss$", "val_ema/loss$"],
        "accuracy": ["train/accuracy$", "val/accuracy$", "val_ema/accuracy$", "val/top5$"],
    },
    "val": {
        "macro F1": ["val/f1$"],
        "expected calibration error": ["val/ece$"],
        "F1 per class": ["val/f1_of/.*"],
        "recall per class": ["val/recall_of/.*"],
        "precision per class": ["val/precision_of/.*"],
    },
    "run": {
        "learning rate per parameter group": ["lr-.*"],
        "training images per second": ["train/images_per_second$"],
        "memory (MB)": ["memory/.*"],
    },
}
#: Validation metrics in the result of a run.
RESULT_METRICS = ("accuracy", "f1", "loss", "ece")


class Dashboard(pl.Callback):
    """Logs throughput, memory, texts and the result, and figures of the best epoch so far, as in ``best.ckpt``.

    A resumed fit that does not improve logs no figures: those of its best epoch are in the earlier run.

    Figures are logged when a fit ends, and earlier whenever the validation accuracy has improved, as long as drawing
    takes less than 5 % of the fit's time and the number of epochs has grown by half since the last time. A fit of
    seconds logs them once, one of 1,000 epochs at most 18 times. One set of figures reads 36 images and takes at most
    1.2 MB (100 classes; 0.3 MB with 5). The projector is logged at the end, takes at most 3 MB, and reads as many
    images as 2 seconds allow. :class:`~project.evaluation.predictions.PredictionCollector` bounds the memory of a
    validation. A figure that cannot be logged causes one warning, and the fit continues.

    Args:
        figures: Log figures, curves, images and the projector; otherwise only scalars and texts.
        points: Maximum number of validation images in the projector; 0 disables it.

    Attributes:
        images: Number of training images processed in this fit, over all ranks.
        seconds: Time spent in training epochs, without validation.
        parameters: Number of ``trainable`` and of ``frozen`` parameters.
    """

    def __init__(self, figures: bool = True, points: int = 500) -> None:
        if points < 0:
            raise ConfigError(f"dashboard.points must be at least 0, not {points}.")
        self._figures = figures
        self._points = points
        self._restored: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.parameters = {"trainable": 0, "frozen": 0}
        self._fit_start = self._training_start = time.perf_counter()
        self._epoch_images = 0
        self._epoch_seconds = 0.0
        self._enabled = False
        self._figure_logger: FigureLogger | None = None  # on rank zero only
        self._input_pending = False
        self._collectors: dict[str, PredictionCollector] = {}  # by stage
        self._best_result: dict[str, Any] = {"score": -math.inf, "values": {}, "weights": "raw"}
        self._best_predictions: tuple[ValidationPredictions, int] | None = None
        self._drawn = True

    @property
    def images_per_second(self) -> float:
        """Training throughput of the whole fit."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        if self._restored is not None:
            self._best_result, self._restored = self._restored, None
        if trainer.loggers and isinstance(pl_module, ImageClassifier) and not getattr(trainer, "fast_dev_run", False):
            self._enabled = True
            if trainer.is_global_zero:
                self._figure_logger = FigureLogger(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            self.parameters["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
        values = {f"parameters/{kind}": float(count) for kind, count in self.parameters.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self.on_train_epoch_start(trainer, pl_module)  # Lightning skips it when a fit resumes within an epoch
        folder = (
            trainer.log_dir if self._enabled else None
        )  # a collective call, so before the return of the other ranks
        if self._figure_logger is None:
            return
        with self._figure_logger.attempt("charts"):
            for logger in trainer.loggers:
                logger_adapters.add_chart_layout(logger, CHARTS)
        self._figure_logger.log_texts(folder)
        self._input_pending = self._figures and not self._figure_logger.log_stored_input()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_images = 0
        self._training_start = time.perf_counter()
        self._epoch_seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch_images += len(batch[0]) * trainer.world_size
        if self._input_pending and self._figure_logger is not None:
            self._input_pending, start = False, time.perf_counter()
            self._figure_logger.log_batch_input(batch)
            self._training_start += time.perf_counter() - start  # drawing is not training

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = self._epoch_seconds + time.perf_counter() - self._training_start
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
        self._epoch_seconds += time.perf_counter() - self._training_start
        if not self._enabled or not self._figures or trainer.sanity_checking:
            return
        assert isinstance(pl_module, ImageClassifier)
        group, classes = ProcessGroup(), len(pl_module.classes)
        self._collectors = {
            stage: PredictionCollector(_validation_images(trainer), self._points, classes, group.rank, group.size)
            for stage in (STAGES.values() if pl_module.validates_average else [STAGES["raw"]])
        }

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if isinstance(outputs, StepOutput):
            for collector, output in zip(self._collectors.values(), (outputs, outputs.averaged), strict=False):
                if output is not None:
                    collector.update(output.probabilities, output.features)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        collectors, self._collectors = self._collectors, {}
        weights = best_weights(trainer.callback_metrics)
        stage = STAGES[weights]
        score = float(trainer.callback_metrics.get(f"{stage}/accuracy", -math.inf))
        # All ranks compute the same score, so either all or none of them call gather.
        if self._enabled and not trainer.sanity_checking and score > self._best_result["score"]:
            values = _result_metrics(trainer, "best", stage)
            self._best_result = {"score": score, "values": values, "weights": weights}
            if stage in collectors:
                assert isinstance(pl_module, ImageClassifier)
                parts = ProcessGroup().gather(collectors[stage].compute(pl_module.epoch_metrics(stage).predictions))
                self._best_predictions, self._drawn = (merge_predictions(parts), trainer.global_step), False
                epochs = lightning_internals.epochs(trainer).ready
                if self._figure_logger is not None and self._figure_logger.has_budget(epochs):
                    self._figure_logger.log_predictions(*self._best_predictions, epochs)
                    self._drawn = True
        self._training_start = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._figure_logger is not None and self._best_predictions is not None:
            if not self._drawn:
                self._figure_logger.log_predictions(*self._best_predictions, trainer.current_epoch)
            self._figure_logger.log_projector(*self._best_predictions)
        interpolation = lightning_internals.find_callback(trainer, Interpolation)
        if self._figures and self._figure_logger and interpolation and interpolation.curve:
            self._figure_logger.log_interpolation(interpolation.curve, trainer.global_step)
        self._log_result(trainer, pl_module)
        self._best_predictions = None  # frees its tensors

    def _log_result(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._figure_logger is None:
            return
        assert isinstance(module, ImageClassifier)
        with self._figure_logger.attempt("result"):
            result = {**self._best_result["values"], **_result_metrics(trainer, "last")}
            result["result/images_per_second"] = self.images_per_second
            result["result/seconds"] = time.perf_counter() - self._fit_start
            if module.hparams["ema"] is not None:
                logger_adapters.log_text(trainer, "weights", format_weights(self._best_result["weights"]))
            hparams = hyperparameters(trainer, module)
            for logger in trainer.loggers:
                logger_adapters.add_result(logger, hparams, result, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Score, metrics and weights of the best epoch, including those before a fit was resumed."""
        return self._best_result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, so that only better epochs log figures."""
        values = {str(name): float(value) for name, value in state_dict["values"].items()}
        weights = "ema" if state_dict.get("weights") == "ema" else "raw"  # earlier versions had no average
        self._restored = {"score": float(state_dict["score"]), "values": values, "weights": weights}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._collectors = {}
        if isinstance(exception, Interrupted) and trainer.state.fn == "fit":  # no figures: they would delay the exit
            self._log_result(trainer, pl_module)


def _validation_images(trainer: pl.Trainer) -> int | None:
    """Number of images that this rank validates, including padding; ``None`` if unknown."""
    data = validation_module(trainer)
    if data is None:
        return None
    count = len(data.order("val"))
    batches, size = sum(trainer.num_val_batches), getattr(trainer.val_dataloaders, "batch_size", None)
    return min(count, int(batches) * size) if size and math.isfinite(batches) else count


def _result_metrics(trainer: pl.Trainer, prefix: str, stage: str = "val") -> dict[str, float]:
    """Current values of the metrics in the result, as ``result/PREFIX_NAME``; metrics without a value are omitted."""
    values = {name: float(trainer.callback_metrics.get(f"{stage}/{name}", math.nan)) for name in RESULT_METRICS}
    if prefix == "last":  # while an epoch is validated, its training loss is not known yet
        values["train_loss"] = float(trainer.callback_metrics.get("train/loss", math.nan))
    return {f"result/{prefix}_{name}": value for name, value in values.items() if math.isfinite(value)}
