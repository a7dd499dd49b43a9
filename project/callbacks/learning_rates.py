"""Logs the learning rates of the optimizer's steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor

from project.classifier import ImageClassifier
from project.models.unfreezing import scaled_rates


class LearningRates(LearningRateMonitor):
    """Lightning's LearningRateMonitor, with the warm-up of staged unfreezing; frozen stages have rate 0."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        with _effective(trainer):
            super().on_train_batch_start(trainer, *args, **kwargs)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        with _effective(trainer):
            super().on_train_epoch_start(trainer, *args, **kwargs)


def _effective(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    module, stack = trainer.lightning_module, ExitStack()
    if isinstance(module, ImageClassifier):
        for optimizer in trainer.optimizers:
            stack.enter_context(scaled_rates(optimizer, module.rate_factor))
    return stack
