"""``load``: the notebook's way in, preprocessing included."""

from __future__ import annotations

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
from project.models.backbone import BackboneFactory
from project.models.grad_cam import heat_maps
from project.task import names_of

Images = Sequence[ImageLike] | np.ndarray | torch.Tensor


class Classifier:
    """A trained classifier that takes images as people have them.

    Images are a list of paths, bytes, open files, PIL images, arrays ``(H, W, C)`` or tensors ``(C, H, W)``; or an
    array ``(B, H, W, C)`` or a tensor ``(B, C, H, W)``. Pixels are uint8, uint16, or floats in [0, 1]. All are read as
    a file with these pixels is. They are computed where the model is.

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
        return self.names(self.predict_proba(images))

    def names(self, probabilities: np.ndarray) -> list[str]:
        """Name the class that each row of probabilities ``(N, C)`` stands out for."""
        return names_of(self.model.task.answer(torch.from_numpy(probabilities)), self.classes_)

    def predict_proba(self, images: Images) -> np.ndarray:
        """Probabilities ``(N, C)``, float32; rows sum to 1."""
        found = [self.model.task.probabilities(self.model(batch)).cpu().numpy() for batch in self._batches(images)]
        return np.concatenate([np.empty((0, len(self.classes_)), np.float32), *found])

    def features(self, images: Images) -> np.ndarray:
        """Features ``(N, D)``, float32."""
        backbone = self.model.backbone
        found = [self.model.refine(self.model.encode(batch)).float().cpu().numpy() for batch in self._batches(images)]
        return np.concatenate([np.empty((0, backbone.feature_dim), np.float32), *found])

    def heat_map(self, images: Images, classes: Sequence[str] | None = None) -> np.ndarray:
        """Where in each image its class is seen: see :func:`project.models.grad_cam.heat_maps`.

        Args:
            images: N of them.
            classes: Name of the class to look for in each; by default the predicted one.

        Returns:
            Float32 ``(N, S, S)`` in [0, 1], pixel by pixel of :meth:`crop`.

        Raises:
            ModelError: The network pools no maps, as a vision transformer does not.
            DataError: There is no class of that name.
            TypeError: There is not one class for each image.
        """
        if classes is not None and (isinstance(classes, str) or len(classes) != len(images)):
            raise TypeError("Give a class for each image, by its name: a list as long as that of the images.")
        size, backbone, found = self.model.backbone.preprocessing.crop, self.model.backbone, []
        wanted = iter(() if classes is None else self._indices(classes))
        for batch in self._batches(images):
            chosen = None if classes is None else torch.tensor([*islice(wanted, len(batch))], device=self.model.device)
            found.append(heat_maps(backbone, self.model.head, self.model.task, batch, chosen).cpu().numpy())
        return np.concatenate([np.empty((0, size, size), np.float32), *found])

    def crop(self, images: Images) -> list[Image.Image]:
        """What the network gets of each image: resized and cropped, ``(S, S)`` pixels."""
        return [image_functions.to_pil_image(image.cpu()) for batch in self._batches(images) for image in batch]

    def _indices(self, classes: Sequence[str]) -> list[int]:
        unknown = [name for name in classes if name not in self.classes_]
        if unknown:
            raise DataError(f"There is no class {unknown[0]!r} here, but {', '.join(self.classes_)}.")
        return [self.classes_.index(name) for name in classes]

    def _batches(self, images: Images) -> Iterator[torch.Tensor]:
        single = isinstance(images, (str, Path, bytes, bytearray, memoryview, Image.Image)) or hasattr(images, "read")
        if single or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim in (2, 3)):
            raise TypeError("Give several images: a list of them, an array (B, H, W, C) or a tensor (B, C, H, W).")
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
    """Load a trained classifier from its checkpoint of kilobytes, and its backbone from where it came from.

    Args:
        path: A checkpoint of a fit; or several, whose classifiers then share each backbone that they have in common.
            Moving one of these to a device moves what they share.
        weights: Where the backbone's weights are, if they are no longer where they were; they have to be the same.
        device: Device that computes, such as ``"cuda"``.

    Returns:
        The classifier, or a list of them, on that device.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, unsafe, or does not fit its backbone.
        WeightsError: The backbone's weights are not to be had on this machine.
    """
    paths = [path] if isinstance(path, (str, Path)) else [*path]
    several = not isinstance(path, (str, Path))
    backbones = BackboneFactory() if several else None
    changes: dict[str, Any] = {"compile": False} if weights is None else {"compile": False, "weights": weights}
    try:
        models = [ImageClassifier.load_from_checkpoint(each, backbones=backbones, **changes) for each in paths]
    except WeightsError as error:
        hint = "Say where they are now: load(path, weights=...)."
        raise WeightsError("{reason} {hint}", path=path, reason=error, hint=hint) from error
    classifiers = [Classifier(model.to(device)) for model in models]
    return classifiers if several else classifiers[0]
