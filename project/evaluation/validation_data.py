"""Where the validation images of a fit come from."""

from __future__ import annotations

import lightning.pytorch as pl

from project.data.datamodule import ImageDataModule
from project.runtime import lightning_internals


def validation_module(trainer: pl.Trainer) -> ImageDataModule | None:
    """The ImageDataModule whose images a fit validates; ``None`` if they come from the user's own loaders."""
    data = lightning_internals.validation_data(trainer)
    return data if isinstance(data, ImageDataModule) else None


def validated_images(trainer: pl.Trainer, data: ImageDataModule) -> int:
    """Number of images that all ranks validate together, after the trainer has set up the validation.

    Args:
        trainer: The trainer of a fit.
        data: From :func:`validation_module`.
    """
    size = getattr(data.loaders["val"].rows, "batch_size", data.batch_size)  # stored rows can have another one
    batches = int(sum(trainer.num_val_batches)) * trainer.world_size
    return min(len(data.splits["val"]), batches * size)
