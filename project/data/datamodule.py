"""ImageDataModule: a source, split, transformed and batched."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from project.data.dataset import LabelledImages, UnlabelledImages
from project.data.images import find_images
from project.data.sources import Folder, Sample, Source
from project.data.splits import split
from project.data.transforms import Augment, Transform, evaluation, training
from project.errors import ConfigError, DataError
from project.preprocessing import Preprocessing


class ImageDataModule(pl.LightningDataModule):
    """Batches of images, uint8 ``(B, 3, H, W)``, and labels ``(B,)``, int64.

    How an image is resized and cropped comes from the backbone's weights: :class:`~project.classifier.ImageClassifier`
    sets :attr:`preprocessing` when Lightning sets both up. Without it, set it yourself.

    Args:
        root: Folder of images, ``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``.
        source: Another source of labelled images, such as ``project.data.sources.Digits``; in place of ``root``.
        predict: An image, or a folder of images at any depth, to predict.
        batch_size: Images a batch.
        num_workers: Processes that read images; by default one fewer than there are cores, one at least, eight at most.
        val_fraction: Share of each class that is held out for validation, where the data has no split of its own.
        test_fraction: The same for the test.
        split_seed: Seed of the hold-out.
        augment: What is done to training images at random: none, flip, or standard (random crop and flip).
        pin_memory: Copy batches into page-locked memory, which makes their way to a GPU faster, where there is one.
    """

    def __init__(
        self,
        root: str | None = None,
        source: Source | None = None,
        predict: str | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        augment: Augment = "none",
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        if root is not None and source is not None:
            raise ConfigError("data.root and data.source are both given: keep one.")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigError("data.val_fraction and data.test_fraction have to be at least 0, their sum less than 1.")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size has to be at least 1, not {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"data.num_workers has to be at least 0, not {num_workers}.")
        self.source = Folder(root) if root is not None else source
        self.name = self.source.name if self.source else "data"
        self.predict_path = predict
        self.batch_size = batch_size
        self.num_workers = min(max((os.cpu_count() or 1) - 1, 1), 8) if num_workers is None else num_workers
        self.augment: Augment = augment
        self.pin_memory = pin_memory and torch.accelerator.is_available()
        self.preprocessing: Preprocessing | None = None
        #: Batches of something else than images, by split, that take the place of those read here.
        self.instead: dict[str, Iterable[Any]] = {}
        self.splits: dict[str, list[Sample]] = (
            split(self.source.splits, val_fraction, test_fraction, split_seed) if self.source else {}
        )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, those of train, in the order of their indices; ``None`` without labelled data."""
        return self.source.classes if self.source else None

    def setup(self, stage: str) -> None:
        """Check that there are images for what is about to be done.

        Raises:
            ConfigError: No data was named.
            DataError: A split is empty.
        """
        if stage == "predict":
            if self.predict_path is None:
                raise ConfigError("Nothing to predict: name an image or a folder with --data.predict PATH.")
            return
        if self.source is None:
            raise ConfigError("No data: name a folder of images with --data.root PATH.")
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for name in needed:
            if not self.splits[name]:
                raise DataError(
                    f"The {name} split has no images. Add a folder {name}/ beside train/, "
                    f"or hold images out of train with --data.{name}_fraction 0.1"
                )

    def training_transform(self) -> Transform:
        """What is done to an image of the train split."""
        return training(self._known(), self.augment)

    def evaluation_transform(self) -> Transform:
        """What is done to an image of any other split."""
        return evaluation(self._known())

    def train_dataloader(self) -> Iterable[Any]:
        """Batches of the train split, shuffled and augmented."""
        instead = self.instead.get("train")
        return (
            self._loader(self._labelled("train", self.training_transform()), shuffle=True)
            if instead is None
            else instead
        )

    def val_dataloader(self) -> Iterable[Any]:
        """Batches of the validation split."""
        instead = self.instead.get("val")
        return self._loader(self._labelled("val", self.evaluation_transform())) if instead is None else instead

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split."""
        return self._loader(self._labelled("test", self.evaluation_transform()))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of images, uint8 ``(B, 3, H, W)``, and their paths.

        Raises:
            DataError: There are none.
        """
        path = Path(str(self.predict_path)).expanduser()
        if not path.exists():
            raise DataError(f"data.predict: there is no file or folder {self.predict_path}.")
        files = find_images(path) if path.is_dir() else [path]
        if not files:
            raise DataError(f"data.predict: there are no images in {self.predict_path}.")
        return self._loader(UnlabelledImages([str(file) for file in files], self.evaluation_transform()))

    def _known(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ConfigError("ImageDataModule.preprocessing is not set: it comes from an ImageClassifier's backbone.")
        return self.preprocessing

    def _labelled(self, split_name: str, transform: Transform) -> LabelledImages:
        assert self.source is not None  # setup() has refused it
        return LabelledImages(self.splits[split_name], self.source.read, transform)

    def _loader(self, dataset: LabelledImages | UnlabelledImages, shuffle: bool = False) -> DataLoader[Any]:
        count = len(dataset)
        alone = shuffle and 1 < self.batch_size < count and count % self.batch_size == 1
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=alone,  # BatchNorm cannot train on one image, and another one is left out in each epoch
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
        )
