"""Lightning's Trainer, with what the project's verbs take besides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from project.callbacks.feature_cache import FeatureCache
from project.callbacks.predictions import PredictionWriter
from project.classifier import ImageClassifier
from project.data.audit import Audit
from project.data.datamodule import ImageDataModule
from project.data.splits import place
from project.errors import ConfigError, DataError
from project.studies.doctor import examine, show_suspects, write_json
from project.studies.suspects import Suspect, find_suspects
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
        suspects: bool = False,
        top: int = 20,
    ) -> bool:
        """Examine the data: read every image whole, and say what would spoil a result.

        Args:
            model: Whose frozen backbone looks for suspects.
            datamodule: The data.
            json: File for everything that was found, as JSON.
            fix: CSV file for a manifest without the bad images, to be given as data.root; no image is touched.
            suspects: Name the images that look more like another class than like their own.
            top: How many of them.

        Returns:
            Whether there was no problem.
        """
        if top < 1:
            raise ConfigError(f"--top has to be at least 1, not {top}.")
        data = datamodule or ImageDataModule()
        for flag, target in (("--json", json), ("--fix", fix)):  # rather than after all images have been read
            if target is not None and not os.access(Path(target).absolute().parent, os.W_OK):
                raise ConfigError(
                    f"{flag}: {target} cannot be written: there is no folder for it that can be written to."
                )
        if fix is not None and data.source is not None and Path(fix).resolve() == Path(data.root or "").resolve():
            raise ConfigError(f"--fix: {fix} is data.root itself. Name another file.")
        found = examine(data)
        if json is not None:
            write_json(found, None, Path(json))
        if fix is not None:
            kept = found.write_manifest(Path(fix))
            say(f"{fix}: {kept} images, {len(found.bad)} left out. Train on it: --data.root {fix}")
        if suspects:
            assert isinstance(model, ImageClassifier)
            accused = self._suspects(model, data, found, top)
            show_suspects(accused)
            if json is not None:
                write_json(found, accused, Path(json))
        return found.clean

    def _suspects(self, model: ImageClassifier, data: ImageDataModule, found: Audit, top: int) -> list[Suspect]:
        source = data.source
        assert source is not None  # examine() has refused it
        source.require()
        samples = [s for split in source.splits.values() for s in split if not found.facts[s.name].error]
        if not samples:
            raise DataError("--suspects: no image can be read.")
        cache = next((each for each in self.callbacks if isinstance(each, FeatureCache)), None) or FeatureCache()
        rows = cache.supply.rows_of(self, model, data, samples)
        families = [where.family for _, where in place(samples, [found.facts[sample.name] for sample in samples], 0)]
        return find_suspects(rows, samples, families, source.classes, top)
