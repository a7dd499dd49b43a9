"""``load`` and ``Classifier``: inference from Python, including preprocessing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as image_functions

from project.classifier import ImageClassifier
from project.data.image_arrays import ImageLike, to_images
from project.data.transforms import Transform, evaluation
from project.errors import CheckpointError, ConfigError, DataError, WeightsError
from project.evaluation.answers.temperature import scaled
from project.inference.answer import Answer, answers_of
from project.inference.many_tasks import ManyTasks
from project.models.grad_cam import heat_maps

#: Of ``predict(..., unknown="flag")``, unless another rate is given.
FALSE_ALARMS = 0.05
Images = Sequence[ImageLike] | np.ndarray | torch.Tensor


class Classifier:
    """A trained classifier for images in any common form.

    Images are a list of paths, bytes, open files, PIL images, arrays ``(H, W, C)`` or tensors ``(C, H, W)``; or one
    array ``(B, H, W, C)`` or tensor ``(B, C, H, W)``. Pixels are uint8, uint16, or floats in [0, 1]. All are
    preprocessed like image files, but a JPEG file that is at least twice as large as necessary is decoded at a smaller
    size, as in training and in ``predict``. Inference runs on the device of the model.

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
        self._transforms = [evaluation(model.backbone.preprocessing)]

    @overload
    def predict(
        self, images: Images, unknown: Literal["ignore"] = "ignore", false_alarms: float = ...
    ) -> list[str]: ...
    @overload
    def predict(self, images: Images, unknown: Literal["flag"], false_alarms: float = ...) -> list[str | None]: ...
    def predict(
        self, images: Images, unknown: Literal["ignore", "flag"] = "ignore", false_alarms: float = FALSE_ALARMS
    ) -> list[str] | list[str | None]:
        """Predicted class name of each image.

        Args:
            images: N images.
            unknown: With ``"flag"``, images that are unlike the training images get ``None``.
            false_alarms: Share of the images of known classes that is flagged at most.

        Raises:
            ConfigError: The checkpoint has no calibrated answers, or ``unknown`` is another word.
        """
        if unknown == "flag":
            answers = self.answer(images, false_alarms=false_alarms)
            return [answer.label if answer.known else None for answer in answers]
        if unknown != "ignore":
            raise ConfigError(f"unknown must be 'ignore' or 'flag', not {unknown!r}.")
        return self.names(self.predict_proba(images))

    def answer(
        self,
        images: Images,
        coverage: float | None = None,
        max_error: float | None = None,
        false_alarms: float | None = None,
    ) -> list[Answer]:
        """Predictions with what is known about how far to rely on them.

        Args:
            images: N images.
            coverage: Probability that the set of an image contains its class, such as 0.95.
            max_error: Largest share of wrong predictions among those that are answered, such as 0.01.
            false_alarms: Largest share of images of known classes that is called unknown, such as 0.05.

        Raises:
            ConfigError: The checkpoint has no calibrated answers, or too few calibration images for a value.
        """
        policy, answers = self.model.make_policy(coverage, max_error, false_alarms), []
        for batch in self._batches(images):
            outputs = self.model.outputs(self.model.encode(batch), policy)
            assert outputs.answers is not None  # a policy was given
            answers += answers_of(outputs.answers, self.names(outputs.probabilities.cpu().numpy()), self.classes_)
        return answers

    def names(self, probabilities: np.ndarray) -> list[str]:
        """Predicted class name for each row of probabilities ``(N, C)``."""
        labels = self.model.task.predict(torch.from_numpy(probabilities)).label
        return [self.classes_[label] for label in labels.tolist()]

    def predict_proba(self, images: Images, calibrated: bool = False) -> np.ndarray:
        """Probabilities ``(N, C)``, float32; rows sum to 1.

        Args:
            images: N images.
            calibrated: Scale the probabilities by the temperature that the fit has found.

        Raises:
            ConfigError: The checkpoint has no calibrated answers.
        """
        if calibrated:
            temperature = self.model.make_policy().temperature
            return scaled(self.predict_proba(images), temperature).astype(np.float32)
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
        return (batch for (batch,) in _batches(images, self._transforms, self.batch_size, self.model.device))


class Classifiers(Sequence[Classifier]):
    """The classifiers of several checkpoints. Those with a common backbone compute its features once per image.

    It is a sequence of :class:`Classifier`: ``weeds, moths = load([...])``. An item alone runs its backbone itself.

    Args:
        tasks: The trained modules; they are set to ``eval()``.
        batch_size: Images per forward pass.

    Attributes:
        names: Name of each task, unique, derived from the path of its checkpoint.
    """

    def __init__(self, tasks: ManyTasks, batch_size: int = 32) -> None:
        self.names = tasks.names
        self.batch_size = batch_size
        self._tasks = tasks.eval()
        self._classifiers = [Classifier(model, batch_size) for model in tasks.classifiers]
        self._transforms = [evaluation(preprocessing) for preprocessing in tasks.preprocessings]

    @overload
    def __getitem__(self, index: int) -> Classifier: ...
    @overload
    def __getitem__(self, index: slice) -> list[Classifier]: ...
    def __getitem__(self, index: int | slice) -> Classifier | list[Classifier]:
        return self._classifiers[index]

    def __len__(self) -> int:
        return len(self._classifiers)

    def predict(self, images: Images) -> dict[str, list[str]]:
        """Predicted class names of the images, by the name of the task."""
        probabilities = self.predict_proba(images)
        return {name: item.names(probabilities[name]) for name, item in zip(self.names, self, strict=True)}

    def predict_proba(self, images: Images) -> dict[str, np.ndarray]:
        """Probabilities ``(N, C)``, float32, by the name of the task; rows sum to 1."""
        parts = [[np.empty((0, len(classes)), np.float32)] for classes in self._tasks.classes]
        for batch in _batches(images, self._transforms, self.batch_size, self._tasks.device):
            for part, probabilities in zip(parts, self._tasks(batch), strict=True):
                part.append(probabilities.cpu().numpy())
        return {name: np.concatenate(part) for name, part in zip(self.names, parts, strict=True)}


def _batches(
    images: Images, transforms: Sequence[Transform], batch_size: int, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Batches of the images, in each transform."""
    single = isinstance(images, (str, Path, bytes, bytearray, memoryview, Image.Image)) or hasattr(images, "read")
    if single or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim in (2, 3)):
        raise TypeError(
            "Expected several images: a list, such as ['a.jpg'], an array (B, H, W, C) or a tensor (B, C, H, W)."
        )
    items = iter(images)
    with torch.inference_mode():
        sizes = [transform.min_size for transform in transforms]
        while batch := [to_images(image, sizes) for image in islice(items, batch_size)]:
            columns = zip(transforms, zip(*batch, strict=True), strict=True)
            yield [torch.stack([transform(image) for image in column]).to(device) for transform, column in columns]


@overload
def load(  # type: ignore[overload-overlap]  # a str is a Sequence of str too
    path: str | Path, weights: str | None = None, device: str | torch.device = "cpu"
) -> Classifier: ...
@overload
def load(path: Sequence[str | Path], weights: str | None = None, device: str | torch.device = "cpu") -> Classifiers: ...
def load(
    path: str | Path | Sequence[str | Path], weights: str | None = None, device: str | torch.device = "cpu"
) -> Classifier | Classifiers:
    """Load a trained classifier from its checkpoint, and its backbone from the original weights.

    Args:
        path: A checkpoint; or several, whose classifiers then share common backbones: see :class:`Classifiers`. Moving
            one of these to another device moves the shared backbone.
        weights: New location of the backbone's weights, if they have moved; the content has to be the same.
        device: Device for inference, such as ``"cuda"``.

    Returns:
        The classifier on that device; a sequence of classifiers for several paths.

    Raises:
        CheckpointError: The list is empty, or a checkpoint is given twice, missing, damaged, unsafe, or does not match
            its backbone.
        WeightsError: The backbone's weights are not available on this machine.
    """
    changes: dict[str, Any] = {"compile": False} if weights is None else {"compile": False, "weights": weights}
    try:
        if isinstance(path, (str, Path)):
            return Classifier(ImageClassifier.load_from_checkpoint(path, **changes).to(device))
        if not path:
            raise CheckpointError("load([]) has no checkpoint. Pass at least one.")
        return Classifiers(ManyTasks.load([*path], **changes).to(device))
    except WeightsError as error:
        hint = "Pass their new location: load(path, weights=...)."
        raise WeightsError("{reason} {hint}", path=path, reason=error, hint=hint) from error
