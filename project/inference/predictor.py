"""``load`` and ``Classifier``: inference from Python, including preprocessing."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as image_functions

from project.classifier import ImageClassifier
from project.data.image_arrays import ImageLike, to_image
from project.data.transforms import evaluation
from project.errors import DataError, WeightsError
from project.models.backbone import load_backbone
from project.models.grad_cam import heat_maps

Images = Sequence[ImageLike] | np.ndarray | torch.Tensor


class Classifier:
    """A trained classifier for images in any common form.

    Images are a list of paths, bytes, open files, PIL images, arrays ``(H, W, C)`` or tensors ``(C, H, W)``; or one
    array ``(B, H, W, C)`` or tensor ``(B, C, H, W)``. Pixels are uint8, uint16, or floats in [0, 1]. All are
    preprocessed like image files. Inference runs on the device of the model.

    Args:
        model: The trained module; it is set to ``eval()``.
        batch_size: Images per forward pass.

    Attributes:
        model: The module.
        classes_: Class names, in the order of the columns of :meth:`predict_proba`.
    """

    def __init__(self, model: ImageClassifier, batch_size: int = 32) -> None:
        self.model = model.eval()
        self.classes_ = list(model.classes)
        self.batch_size = batch_size
        self._transform = evaluation(model.backbone.preprocessing)

    def predict(self, images: Images) -> list[str]:
        """Predicted class name of each image."""
        return self.names(self.predict_proba(images))

    def names(self, probabilities: np.ndarray) -> list[str]:
        """Predicted class name for each row of probabilities ``(N, C)``."""
        labels = self.model.task.predict(torch.from_numpy(probabilities)).label
        return [self.classes_[label] for label in labels.tolist()]

    def predict_proba(self, images: Images) -> np.ndarray:
        """Probabilities ``(N, C)``, float32; rows sum to 1."""
        batches = [self.model.task.probabilities(self.model(batch)).cpu().numpy() for batch in self._batches(images)]
        return np.concatenate([np.empty((0, len(self.classes_)), np.float32), *batches])

    def features(self, images: Images) -> np.ndarray:
        """Features ``(N, D)``, float32."""
        batches = [self.model.refine(self.model.encode(batch)).float().cpu().numpy() for batch in self._batches(images)]
        return np.concatenate([np.empty((0, self.model.backbone.feature_dim), np.float32), *batches])

    def heat_map(self, images: Images, classes: Sequence[str] | None = None) -> np.ndarray:
        """Grad-CAM heat map of each image: see :func:`project.models.grad_cam.heat_maps`.

        Args:
            images: N images.
            classes: Class name to explain, one per image; by default the predicted class.

        Returns:
            Float32 ``(N, S, S)`` in [0, 1], aligned with the pixels of :meth:`crop`.

        Raises:
            ModelError: The backbone has no spatial feature maps, such as a vision transformer.
            DataError: A class name is unknown.
            TypeError: The number of classes is not the number of images.
        """
        if classes is not None and (isinstance(classes, str) or len(classes) != len(images)):
            raise TypeError("classes must be a list with one class name per image.")
        backbone = self.model.backbone
        size, batches = backbone.preprocessing.crop, []
        indices = iter(() if classes is None else self._indices(classes))
        for batch in self._batches(images):
            targets = (
                None if classes is None else torch.tensor([*islice(indices, len(batch))], device=self.model.device)
            )
            batches.append(heat_maps(backbone, self.model.head, self.model.task, batch, targets).cpu().numpy())
        return np.concatenate([np.empty((0, size, size), np.float32), *batches])

    def crop(self, images: Images) -> list[Image.Image]:
        """The network's input for each image: resized and cropped to ``(S, S)`` pixels."""
        return [image_functions.to_pil_image(image.cpu()) for batch in self._batches(images) for image in batch]

    def _indices(self, classes: Sequence[str]) -> list[int]:
        unknown = [name for name in classes if name not in self.classes_]
        if unknown:
            raise DataError(f"Unknown class {unknown[0]!r}. Classes: {', '.join(self.classes_)}.")
        return [self.classes_.index(name) for name in classes]

    def _batches(self, images: Images) -> Iterator[torch.Tensor]:
        single = isinstance(images, (str, Path, bytes, bytearray, memoryview, Image.Image)) or hasattr(images, "read")
        if single or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim in (2, 3)):
            raise TypeError("Expected several images: a list, an array (B, H, W, C) or a tensor (B, C, H, W).")
        items = iter(images)
        with torch.inference_mode():
            while batch := [self._transform(to_image(image)) for image in islice(items, self.batch_size)]:
                yield torch.stack(batch).to(self.model.device)


@overload
def load(  # type: ignore[overload-overlap]  # a str is a Sequence of str too
    path: str | Path, weights: str | None = None, device: str | torch.device = "cpu"
) -> Classifier: ...
@overload
def load(
    path: Sequence[str | Path], weights: str | None = None, device: str | torch.device = "cpu"
) -> list[Classifier]: ...
def load(
    path: str | Path | Sequence[str | Path], weights: str | None = None, device: str | torch.device = "cpu"
) -> Classifier | list[Classifier]:
    """Load a trained classifier from its checkpoint, and its backbone from the original weights.

    Args:
        path: A checkpoint; or several, whose classifiers then share common backbones. Moving one of these to another
            device moves the shared backbone.
        weights: New location of the backbone's weights, if they have moved; the content has to be the same.
        device: Device for inference, such as ``"cuda"``.

    Returns:
        The classifier on that device; a list of classifiers for several paths.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, unsafe, or does not match its backbone.
        WeightsError: The backbone's weights are not available on this machine.
    """
    paths = [path] if isinstance(path, (str, Path)) else [*path]
    several = not isinstance(path, (str, Path))
    backbones = functools.cache(load_backbone) if several else None
    changes: dict[str, Any] = {"compile": False} if weights is None else {"compile": False, "weights": weights}
    try:
        models = [ImageClassifier.load_from_checkpoint(item, backbones=backbones, **changes) for item in paths]
    except WeightsError as error:
        hint = "Pass their new location: load(path, weights=...)."
        raise WeightsError("{reason} {hint}", path=path, reason=error, hint=hint) from error
    classifiers = [Classifier(model.to(device)) for model in models]
    return classifiers if several else classifiers[0]
