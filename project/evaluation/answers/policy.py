"""What a classifier answers for an image: is it known, which classes are possible, is it certain enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from project.evaluation.answers.prediction_sets import prediction_sets
from project.evaluation.answers.temperature import scaled
from project.evaluation.answers.unknown_images import distances


class Answered(NamedTuple):
    """Answers for N images. An array is ``None`` if its limit was not given.

    Attributes:
        probabilities: Calibrated probabilities, float64 ``(N, C)``.
        known: Whether each image resembles the training images, bool ``(N,)``.
        sets: Which classes belong to the set of each image, bool ``(N, C)``.
        answered: Whether the confidence of each image suffices, bool ``(N,)``.
    """

    probabilities: np.ndarray
    known: np.ndarray | None
    sets: np.ndarray | None
    answered: np.ndarray | None


@dataclass(frozen=True)
class AnswerPolicy:
    """Maps probabilities and features to answers; see :meth:`~project.evaluation.answers.calibration.Answers.policy`.

    Attributes:
        temperature: Of the calibrated probabilities.
        set_threshold: Score up to which classes belong to a set; ``None`` for no sets.
        confidence_threshold: Smallest probability of the predicted class that is answered; ``None`` for no abstention.
        distance_thresholds: Largest distance of a known image, by predicted class ``(C,)``; ``None`` for no detection.
        rows: Features of training images, to which distances are measured, int8 ``(M, D)``.
    """

    temperature: float
    set_threshold: float | None
    confidence_threshold: float | None
    distance_thresholds: np.ndarray | None
    rows: np.ndarray

    def __call__(self, probabilities: np.ndarray, features: np.ndarray) -> Answered:
        """Answer N images.

        Args:
            probabilities: Of the classifier, without temperature, ``(N, C)``.
            features: Inputs of the head, ``(N, D)``.
        """
        known = sets = answered = None
        if self.distance_thresholds is not None:
            known = distances(features, self.rows) <= self.distance_thresholds[probabilities.argmax(1)]
        if self.set_threshold is not None:
            sets = prediction_sets(probabilities, self.set_threshold)
        if self.confidence_threshold is not None:
            answered = probabilities.max(1) >= self.confidence_threshold
        return Answered(scaled(probabilities, self.temperature), known, sets, answered)
