"""Predictions of images that a classifier was not trained on: what its answers are calibrated with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from project.evaluation.answers.prediction_sets import class_scores

#: With fewer validation images, out-of-fold predictions of training images are added.
FEW_IMAGES = 1000
#: More images are not kept: the intervals are narrow already.
MAX_IMAGES = 4000
#: Of many classes, fewer images are kept: so many probabilities, but at least :data:`FEW_IMAGES` images.
MAX_PROBABILITIES = 2**23
#: One-sided 10 % quantile of the normal distribution.
Z_10 = 1.2815515655446004


@dataclass(frozen=True)
class HeldOutImages:
    """Predictions of N held-out images.

    Attributes:
        probabilities: Float32 ``(N, C)``.
        labels: True classes, int64 ``(N,)``.
        distances: Distance to the nearest stored rows, float32 ``(N,)``, see
            :func:`~project.evaluation.answers.unknown_images.distances`.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    distances: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class of each image, int64 ``(N,)``."""
        classes: np.ndarray = self.probabilities.argmax(1)
        return classes

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, bool ``(N,)``."""
        equal: np.ndarray = self.predicted == self.labels
        return equal

    @property
    def confidence(self) -> np.ndarray:
        """Probability of each predicted class, float32 ``(N,)``."""
        values: np.ndarray = self.probabilities.max(1)
        return values

    @property
    def true_scores(self) -> np.ndarray:
        """Conformal score of the true class of each image, float64 ``(N,)``."""
        scores: np.ndarray = class_scores(self.probabilities)[np.arange(len(self.labels)), self.labels]
        return scores

    def at(self, index: np.ndarray) -> HeldOutImages:
        """The images at some indices."""
        return HeldOutImages(self.probabilities[index], self.labels[index], self.distances[index])

    @classmethod
    def concatenated(cls, parts: Sequence[HeldOutImages], classes: int) -> HeldOutImages:
        """The images of all parts, whose number may be 0.

        Args:
            parts: Images.
            classes: Number C of classes.
        """
        none = cls(np.empty((0, classes), np.float32), np.empty(0, np.int64), np.empty(0, np.float32))
        columns = zip(*((part.probabilities, part.labels, part.distances) for part in (none, *parts)), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def limited(self) -> HeldOutImages:
        """At most :func:`max_images` of the images, drawn at random; always the same ones."""
        count = max_images(self.probabilities.shape[1])
        if len(self) <= count:
            return self
        return self.at(np.sort(np.random.default_rng(0).permutation(len(self))[:count]))


def max_images(classes: int) -> int:
    """Number of images to keep at most of the validation images, and of those with out-of-fold predictions."""
    return min(MAX_IMAGES, max(MAX_PROBABILITIES // classes, FEW_IMAGES))


class Calibration(NamedTuple):
    """The images that answers are calibrated with: those of the validation first.

    Attributes:
        images: All images.
        validation: Number of validation images.
        note: Why out-of-fold predictions are not used, a clause; empty if they are, or are not needed.
    """

    images: HeldOutImages
    validation: int
    note: str = ""

    @property
    def out_of_fold(self) -> int:
        """Number of training images with out-of-fold predictions."""
        return len(self.images) - self.validation


def combine(validation: HeldOutImages, out_of_fold: HeldOutImages | None) -> Calibration:
    """Add out-of-fold predictions where the validation images are few, unless they are too optimistic.

    Args:
        validation: Predictions of validation images.
        out_of_fold: Predictions of training images by heads that were not trained on them; ``None`` if there are none.
    """
    kept = validation.limited()
    if out_of_fold is None or len(validation) >= FEW_IMAGES:
        return Calibration(kept, len(kept))
    if is_less_accurate(validation.correct, out_of_fold.correct):
        accuracies = f"{out_of_fold.correct.mean():.3f} and not {validation.correct.mean():.3f}"
        note = f"out-of-fold predictions of training images are significantly more accurate, {accuracies}"
        return Calibration(kept, len(kept), note)
    return Calibration(
        HeldOutImages.concatenated([kept, out_of_fold.limited()], kept.probabilities.shape[1]), len(kept)
    )


def is_less_accurate(correct: np.ndarray, others: np.ndarray) -> bool:
    """Whether predictions are less accurate than others: one-sided test of two proportions with pooled variance.

    The level is 10 %, and not 5 %, because a false alarm costs images only, while a miss makes answers too optimistic.

    Args:
        correct: Whether each prediction is right, bool ``(N,)``.
        others: The same of other images, bool ``(M,)``.
    """
    pooled = float(np.concatenate([correct, others]).mean())
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / len(correct) + 1 / len(others)))
    return float(others.mean() - correct.mean()) > Z_10 * deviation
