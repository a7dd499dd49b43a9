"""Scalars of a run that are not metrics of the model: throughput and parameter counts."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl


class Dashboard(pl.Callback):
    """Logs images a second of each training epoch, and how many parameters train and are frozen.

    Attributes:
        images: Training images seen in this fit, by all processes.
        seconds: Time spent in training epochs, their validation left out.
        parameters: How many parameters are ``trainable`` and ``frozen``.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.parameters = {"trainable": 0, "frozen": 0}
        self._epoch_images = 0
        self._epoch_seconds = 0.0
        self._mark = 0.0

    @property
    def images_per_second(self) -> float:
        """Training images a second over the whole fit."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.parameters = {"trainable": 0, "frozen": 0}
        for parameter in pl_module.parameters():
            self.parameters["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
        values = {f"parameters/{kind}": float(count) for kind, count in self.parameters.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self.on_train_epoch_start(trainer, pl_module)  # nobody calls it in an epoch that a fit was resumed within

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_images = 0
        self._mark = time.perf_counter()
        self._epoch_seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch_images += len(batch[0]) * trainer.world_size

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_seconds += time.perf_counter() - self._mark

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = self._epoch_seconds + time.perf_counter() - self._mark
        self.images += self._epoch_images
        self.seconds += seconds
        pl_module.log("train/images_per_second", self._epoch_images / seconds)
