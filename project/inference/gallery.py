"""Gallery: images of a split with features and predictions, for nearest-neighbour search and error analysis."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torchvision.datasets import VisionDataset

from project.checkpoints.metadata import SPLIT_SETTINGS
from project.config.class_path import ClassSpec
from project.data.datamodule import ImageDataModule
from project.data.sources.base import Sample, Source
from project.data.transforms import evaluation
from project.errors import ConfigError, DataError
from project.features.provider import RowProvider
from project.inference.predictor import Classifier
from project.runtime.system import cache_folder

#: Data settings that determine the splits of a run.
DATA_SETTINGS = (*SPLIT_SETTINGS, "on_bad_image")


class Neighbour(NamedTuple):
    """A nearest neighbour in feature space.

    Attributes:
        sample: The neighbour.
        similarity: Cosine similarity of the features, centered on the gallery's mean, in [-1, 1].
    """

    sample: Sample
    similarity: float


class Gallery:
    """Images of one split, with their features and predictions.

    Features are read from the feature store; missing ones are computed and stored.

    Args:
        classifier: The classifier.
        data: The data.
        split: ``train``, ``val`` or ``test``.
        device: Device that computes missing features; by default the CPU.
        precision: Lightning's name of the precision of missing features.
        provider: Provides the features; by default from the store in the user's cache folder.

    Attributes:
        source: Reads the images.
        samples: The N samples of the split.
        labels: int64 ``(N,)``.
        features: float32 ``(N, D)``.
        probabilities: float32 ``(N, C)``; rows sum to 1.

    Raises:
        DataError: The data's classes differ from the classifier's, the split is empty, or an image cannot be read.
        StoreError: The features cannot be stored.
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
            available = [name for name, samples in data.splits.items() if samples]
            raise DataError(f"The split {split!r} has no images. Splits with images: {', '.join(available) or 'none'}.")
        if list(data.source.classes) != classifier.classes_:
            raise DataError(f"The classes of {data.name} differ from the model's.")
        self.source: Source = data.source
        self.samples = data.splits[split]
        self.labels = np.array([sample.label for sample in self.samples])
        device = device or torch.device("cpu")
        provider = provider or RowProvider("auto", "auto", 20.0, cache_folder())
        model = classifier.model.to(device)
        try:
            if model.cut.frozen:
                rows = provider.encode_samples(model.prefix_spec(device, precision), data.source, self.samples)
            else:  # without frozen stages, there are no rows to store
                batches = (self.samples[first : first + 256] for first in range(0, len(self.samples), 256))
                size = evaluation(model.backbone.preprocessing).min_size
                parts = [classifier.features([self.source.read(item, size) for item in batch]) for batch in batches]
                features = torch.from_numpy(np.concatenate(parts))
        finally:
            model.cpu()
        with torch.inference_mode():
            if model.cut.frozen:
                features = torch.cat([model.refine(batch).float() for batch in torch.split(rows, 256)])
            self.features = features.numpy()
            self.probabilities = model.task.probabilities(model.head(features)).numpy()
        self._predictions = model.task.predict(torch.from_numpy(self.probabilities))
        self._mean = self.features.mean(0)
        self._directions = _normalize(self.features - self._mean)

    def nearest(self, features: np.ndarray, count: int = 5) -> list[list[Neighbour]]:
        """The nearest neighbours of query images by cosine similarity, the nearest first.

        Args:
            features: Features of the M queries, ``(M, D)``: see
                :meth:`~project.inference.predictor.Classifier.features`.
            count: Number of neighbours per query.

        Raises:
            ValueError: The shape is wrong, or the count is less than 1.
        """
        if features.ndim != 2 or features.shape[1] != self.features.shape[1] or count < 1:
            raise ValueError(
                f"Expected features (M, {self.features.shape[1]}) and a count >= 1, not {features.shape} and {count}."
            )
        cosines = _normalize(features - self._mean) @ self._directions.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return [
            [Neighbour(self.samples[index], float(row[index])) for index in nearest]
            for row, nearest in zip(cosines, order, strict=True)
        ]

    def mistakes(self) -> np.ndarray:
        """Indices of the misclassified images, int64 ``(M,)``, the most confident error first."""
        wrong = np.flatnonzero(self._predictions.label.numpy() != self.labels)
        confidence: np.ndarray = self._predictions.confidence.numpy()[wrong]
        return wrong[np.argsort(-confidence, kind="stable")]

    def read(self, sample: Sample) -> Image.Image:
        """The image of a sample, in RGB."""
        return self.source.read(sample)


def _normalize(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return unit


def data_of(checkpoint: str | Path) -> ImageDataModule:
    """Open the data that a run was trained on, from the ``config.yaml`` in the run's folder.

    Args:
        checkpoint: ``runs/NAME/version_N/checkpoints/*.ckpt``.

    Raises:
        ConfigError: The file is missing or invalid, or does not name any data.
        DataError: The data no longer exists.
    """
    file = Path(checkpoint).expanduser().resolve().parent.parent / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text())["data"]
        root, source = settings["root"], settings["source"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is missing, or is not the config of a run.") from error
    if root is None and source is None:
        raise ConfigError(f"{file} does not name any data: data.root and data.source are null.")
    factory = None if source is None else ClassSpec.from_dict(source).resolve((Source, VisionDataset))
    return ImageDataModule(root, factory, **{key: settings[key] for key in DATA_SETTINGS if key in settings})
