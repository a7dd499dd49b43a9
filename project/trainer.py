"""Lightning's Trainer, with what the project's verbs take besides."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from project.callbacks.predictions import PredictionWriter


class Trainer(pl.Trainer):
    """Lightning's Trainer; ``predict`` writes a CSV file."""

    callbacks: list[pl.Callback]

    def predict(  # type: ignore[override]
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output: str = "predictions.csv",
        weights_only: bool | None = True,
    ) -> None:
        """Predict images, and write a CSV file with a row for each.

        Args:
            model: The classifier.
            dataloaders: Batches of images and their paths, in place of the data module.
            datamodule: The data.
            ckpt_path: Checkpoint whose model predicts.
            output: The CSV file: path, predicted class, its probability, and the next two classes with theirs.
            weights_only: Refuse a checkpoint that holds anything but plain types and tensors.
        """
        writer = PredictionWriter(output)
        self.callbacks.append(writer)
        try:
            super().predict(model, dataloaders, datamodule, False, ckpt_path=ckpt_path, weights_only=weights_only)
        finally:
            self.callbacks.remove(writer)
