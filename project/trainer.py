"""Lightning's Trainer, with what the project's verbs take besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from project.callbacks.predictions import PredictionWriter
from project.data.datamodule import ImageDataModule
from project.studies.doctor import examine, write_json
from project.terminal import say


class Trainer(pl.Trainer):
    """Lightning's Trainer; ``predict`` writes a CSV file, and ``check`` examines the data."""

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

    def check(
        self,
        model: pl.LightningModule | None = None,
        datamodule: ImageDataModule | None = None,
        json: str | None = None,
        fix: str | None = None,
    ) -> bool:
        """Examine the data: read every image whole, and say what would spoil a result.

        Args:
            model: Not needed.
            datamodule: The data.
            json: File for everything that was found, as JSON.
            fix: CSV file for a manifest without the bad images, to be given as data.root; no image is touched.

        Returns:
            Whether there was no problem.
        """
        found = examine(datamodule or ImageDataModule())
        if json is not None:
            write_json(found, Path(json))
        if fix is not None:
            kept = found.write_manifest(Path(fix))
            say(f"{fix}: {kept} images, {len(found.bad)} left out. Train on it: --data.root {fix}")
        return found.clean
