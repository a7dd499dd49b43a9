"""``load``: the notebook's way in, preprocessing included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as image_functions

from project.classifier import ImageClassifier
from project.data.images import read_image
from project.data.transforms import evaluation
from project.errors import WeightsError

Images = Sequence[str | Path | Image.Image] | torch.Tensor


class Classifier:
    """A trained classifier that takes images as people have them.

    Images are paths, PIL images, or a uint8 tensor ``(B, 3, H, W)``.

    Args:
        model: The trained module; it is put in ``eval()``.
        batch_size: Images that go through the network at a time.

    Attributes:
        model: The module itself.
        classes_: Names of the classes, in the order of the columns of :meth:`predict_proba`.
    """

    def __init__(self, model: ImageClassifier, batch_size: int = 32) -> None:
        self.model = model.eval()
        self.classes_ = list(model.classes)
        self.batch_size = batch_size
        self._transform = evaluation(model.backbone.preprocessing)

    def predict(self, images: Images) -> list[str]:
        """Name the class of each image."""
        return [self.classes_[index] for index in self.predict_proba(images).argmax(1)]

    def predict_proba(self, images: Images) -> np.ndarray:
        """Probabilities ``(N, C)``, float32; rows sum to 1."""
        found = [self.model.classify(rows).float().softmax(1).numpy() for rows in self._rows(images)]
        return np.concatenate([np.empty((0, len(self.classes_)), np.float32), *found])

    def features(self, images: Images) -> np.ndarray:
        """Features ``(N, D)``, float32."""
        backbone = self.model.backbone
        found = [backbone.refine(rows).float().numpy() for rows in self._rows(images)]
        return np.concatenate([np.empty((0, backbone.feature_dim), np.float32), *found])

    def _rows(self, images: Images) -> Iterator[torch.Tensor]:
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, torch.Tensor) and images.dim() != 4):
            raise TypeError("Give several images: a list of paths or PIL images, or a tensor (B, 3, H, W).")
        if isinstance(images, torch.Tensor) and images.dtype != torch.uint8:
            raise TypeError(f"A tensor of images has to be uint8, not {images.dtype}.")
        items = iter(images)
        with torch.inference_mode():
            while batch := [self._transform(_as_pil(image)) for image in islice(items, self.batch_size)]:
                yield self.model.encode(torch.stack(batch))


def load(path: str | Path, weights: str | None = None) -> Classifier:
    """Load a trained classifier from its checkpoint of kilobytes, and its backbone from where it came from.

    Args:
        path: A checkpoint of a fit.
        weights: Where the backbone's weights are, if they are no longer where they were; they have to be the same.

    Returns:
        The classifier, on the CPU.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, unsafe, or does not fit its backbone.
        WeightsError: The backbone's weights are not to be had on this machine.
    """
    changes = {"compile": False} if weights is None else {"compile": False, "weights": weights}
    try:
        model = ImageClassifier.load_from_checkpoint(path, **changes)
    except WeightsError as error:
        raise WeightsError(f"{error} Say where they are now: load(path, weights=...).") from error
    return Classifier(model)


def _as_pil(image: str | Path | Image.Image | torch.Tensor) -> Image.Image:
    if isinstance(image, torch.Tensor):
        # By way of PIL, so that a tensor is resized just as the file that it came from would be.
        picture: Image.Image = image_functions.to_pil_image(image)
        return picture.convert("RGB")
    return image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
