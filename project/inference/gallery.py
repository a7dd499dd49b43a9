"""A run's images with what its classifier makes of them: the nearest ones to a picture, and the mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torchvision.datasets import VisionDataset

from project.config.class_path import ClassSpec
from project.data.datamodule import ImageDataModule
from project.data.sources.base import Sample, Source
from project.errors import ConfigError, DataError
from project.features.provider import RowProvider
from project.inference.predictor import Classifier
from project.runtime.system import cache_folder

#: What a run's config says of which images it had, and which of them it held out.
SETTINGS = ("val_fraction", "test_fraction", "fold", "split_seed", "on_bad_image")


class Neighbour(NamedTuple):
    """An image that is like another one.

    Attributes:
        sample: Which.
        similarity: Cosine of the angle between their features, from the mean of the gallery's, in [-1, 1].
    """

    sample: Sample
    similarity: float


class Gallery:
    """Images of one split. Their rows come from the feature store; those that are not there are computed, and kept.

    Args:
        classifier: Looks at them.
        data: Has them.
        split: ``train``, ``val`` or ``test``.
        device: Computes what is not stored; by default the CPU.
        precision: Lightning's name of the precision that it is computed in.
        provider: Provides the rows; by default from the store in the user's cache folder.

    Attributes:
        source: Reads them.
        samples: N of them.
        labels: int64 ``(N,)``.
        features: float32 ``(N, D)``.
        probabilities: float32 ``(N, C)``; rows sum to 1.

    Raises:
        DataError: The data's classes are not the classifier's, the split is empty, or an image cannot be read.
        StoreError: The rows cannot be kept.
    """

    def __init__(
        self,
        classifier: Classifier,
        data: ImageDataModule,
        split: str = "train",
        device: torch.device | None = None,
        precision: str = "32-true",
        provider: RowProvider | None = None,
    ) -> None:
        if data.source is None or not data.splits.get(split):
            there = [name for name, samples in data.splits.items() if samples]
            raise DataError(f"The data has no images in {split!r}, but in {', '.join(there) or 'no split at all'}.")
        if list(data.source.classes) != classifier.classes_:
            raise DataError(f"The classes of {data.name} are not the model's.")
        self.source: Source = data.source
        self.samples = data.splits[split]
        self.labels = np.array([sample.label for sample in self.samples])
        device = device or torch.device("cpu")
        provider = provider or RowProvider("auto", "auto", 20.0, cache_folder())
        model = classifier.model.to(device)  # where what is not stored is computed
        try:
            rows = provider.rows_of(model.row_computation(device, precision), data.source, self.samples)
        finally:
            model.cpu()
        with torch.inference_mode():
            features = torch.cat([model.refine(batch).float() for batch in torch.split(rows, 256)])
            self.features = features.numpy()
            self.probabilities = model.task.probabilities(model.head(features)).numpy()
        self.answers = model.task.answer(torch.from_numpy(self.probabilities))
        self._mean = self.features.mean(0)
        self._directions = _unit(self.features - self._mean)

    def nearest(self, features: np.ndarray, count: int = 5) -> list[list[Neighbour]]:
        """The images that are most like others, the nearest first.

        Args:
            features: Of the others, ``(M, D)``: what :meth:`~project.inference.predictor.Classifier.features` gives.
            count: How many for each.

        Raises:
            ValueError: They are not of that shape, or the count is less than 1.
        """
        if features.ndim != 2 or features.shape[1] != self.features.shape[1] or count < 1:
            raise ValueError(
                f"Give features (M, {self.features.shape[1]}), not {features.shape}, and a count from 1 on."
            )
        cosines = _unit(features - self._mean) @ self._directions.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return [
            [Neighbour(self.samples[at], float(row[at])) for at in best]
            for row, best in zip(cosines, order, strict=True)
        ]

    def mistakes(self) -> np.ndarray:
        """Indices of the images that are taken for another class, int64 ``(M,)``; the surest mistake comes first."""
        wrong = np.flatnonzero(self.answers.label.numpy() != self.labels)
        sure: np.ndarray = self.answers.confidence.numpy()[wrong]
        return wrong[np.argsort(-sure, kind="stable")]

    def read(self, sample: Sample) -> Image.Image:
        """The image of a sample, in RGB."""
        return self.source.read(sample)


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return found


def data_of(checkpoint: str | Path) -> ImageDataModule:
    """The data that a checkpoint's run was trained on: what the ``config.yaml`` in its folder names.

    Args:
        checkpoint: ``runs/NAME/version_N/checkpoints/*.ckpt``.

    Raises:
        ConfigError: There is no such file beside it, or it names no data.
        DataError: The data is no longer there.
    """
    file = Path(checkpoint).expanduser().resolve().parent.parent / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text())["data"]
        root, source = settings["root"], settings["source"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is not there, or is no run's config.") from error
    if root is None and source is None:
        raise ConfigError(f"{file} names no data.")
    factory = None if source is None else ClassSpec.from_dict(source).resolve((Source, VisionDataset))
    return ImageDataModule(root, factory, **{key: settings[key] for key in SETTINGS if key in settings})
