"""Length of a fit in epochs and in optimizer steps."""

from __future__ import annotations

import math
from typing import Literal

import lightning.pytorch as pl

from project.runtime import lightning_internals


def steps_per_epoch(trainer: pl.Trainer) -> float:
    """Number of optimizer steps in an epoch, after the trainer has set up its data; infinite if it is unknown."""
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    return math.ceil(batches) if math.isfinite(batches) else batches


def fit_length(trainer: pl.Trainer, unit: Literal["epoch", "step"]) -> int | None:
    """Length of the whole fit in epochs or optimizer steps; ``None`` if it is unknown.

    It is 1 for a fit of no epochs, because schedules of length 0 are invalid.
    """
    if trainer.max_epochs == 0:
        return 1
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    if trainer.max_steps <= 0 and (epochs is None or unit == "epoch"):
        return epochs
    steps = trainer.estimated_stepping_batches
    if unit == "step":
        return int(steps) if math.isfinite(steps) else None
    lightning_internals.training_loader(trainer)  # sets up the data
    length = math.ceil(trainer.max_steps / steps_per_epoch(trainer))  # 0 if the length of an epoch is unknown
    return min(filter(None, (epochs, length)), default=None)
