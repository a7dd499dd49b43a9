"""Where the validation images of a fit come from."""

from __future__ import annotations

import lightning.pytorch as pl

from project.data.datamodule import ImageDataModule
from project.runtime import lightning_internals


def validation_module(trainer: pl.Trainer) -> ImageDataModule | None:
    """The ImageDataModule whose images a fit validates; ``None`` if they come from the user's own loaders."""
    data = lightning_internals.validation_data(trainer)
    return data if isinstance(data, ImageDataModule) else None
