"""Lightning's Trainer, with what the project's verbs take besides."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar

from project.audit.label_issues import suspects_of
from project.audit.report import examine, report
from project.callbacks.exact_resume import ExactResume
from project.callbacks.feature_cache import FeatureCache
from project.callbacks.prediction_writer import PredictionWriter
from project.callbacks.progress_bar import Progress
from project.checkpoints.io import AtomicCheckpointIO
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import ProjectError
from project.features.provider import RowProvider
from project.inference import demo
from project.inference.gallery import Gallery, data_of
from project.inference.predictor import Classifier
from project.runtime.console import say


class Trainer(pl.Trainer):
    """Lightning's Trainer; ``predict`` writes a CSV file, ``check`` examines the data, ``demo`` opens a page.

    Its checkpoints are written whole or not at all, and a fit that goes on from one is the fit that never stopped.
    """

    callbacks: list[pl.Callback]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("callbacks") or []
        given = [*given] if isinstance(given, list) else [given]  # Lightning adds its own to the list
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # not where one was asked for
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        self.callbacks.insert(0, ExactResume())
        bar = self.progress_bar_callback
        if type(bar) is RichProgressBar and bar not in given:
            self.callbacks[self.callbacks.index(bar)] = Progress()

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

        Of several processes that somebody else has started, the first one does it.

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
        if self.global_rank > 0:
            return True
        data = datamodule or ImageDataModule()
        found = examine(data, json, fix)
        if suspects:
            assert isinstance(model, ImageClassifier)
            computation = model.row_computation(self.strategy.root_device, str(self.precision))
            suspected = suspects_of(computation, data, found.facts, self._provider(), top)
            report(found, suspected, json)
        return found.clean

    def demo(
        self,
        model: pl.LightningModule | None = None,
        datamodule: ImageDataModule | None = None,
        ckpt_path: str | None = None,
        port: int = 7860,
        open: bool = True,
    ) -> None:
        """Open a page on this machine to try the classifier on photographs: classes, heat map, nearest training images.

        Args:
            model: The classifier.
            datamodule: Has the training images; by default those that the config.yaml of the checkpoint's run names.
            ckpt_path: Checkpoint whose model answers.
            port: Port of the page on 127.0.0.1; 0 for any that is free.
            open: Show the page in a browser.
        """
        assert isinstance(model, ImageClassifier) and ckpt_path is not None
        checkpoint = read_checkpoint(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        classifier, gallery = Classifier(model), None
        given = datamodule if datamodule is not None and datamodule.source is not None else None
        about = f"{len(model.classes)} classes on {model.backbone.name}: {ckpt_path}"
        try:
            images, device, precision = given or data_of(ckpt_path), self.strategy.root_device, str(self.precision)
            gallery = Gallery(classifier, images, "train", device, precision, self._provider())
        except ProjectError as error:
            if given:
                raise
            lacking = f"No training images are shown: {error} (--data.root PATH shows others)"
            say(f"Demo: {lacking}")
            about += f"\n{lacking}"
        demo.serve(classifier, gallery, about, port, open)

    def _provider(self) -> RowProvider:
        cache = next((each for each in self.callbacks if isinstance(each, FeatureCache)), None) or FeatureCache()
        return cache.provider
