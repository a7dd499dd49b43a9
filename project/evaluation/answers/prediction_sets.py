"""Prediction sets that contain the right class with a stated probability: split conformal prediction.

The score of a class is the probability of all classes that are more probable; that of the most probable class is its
negative probability. The scores follow the adaptive prediction sets of Y. Romano et al., "Classification with valid and
adaptive coverage", NeurIPS 2020, arXiv:2006.02544, without their random part: an image always gets the same set.
"""

from __future__ import annotations

import math

import numpy as np


def class_scores(probabilities: np.ndarray) -> np.ndarray:
    """Score of each class, float64 ``(N, C)``; smaller scores belong to more probable classes.

    Args:
        probabilities: ``(N, C)``.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, 1).astype(np.float64)
    before = ordered.cumsum(1) - ordered
    before[:, 0] = -ordered[:, 0]
    scores = np.empty_like(before)
    np.put_along_axis(scores, order, before, 1)
    return scores


def images_needed(coverage: float) -> int:
    """Smallest number of calibration images with which sets can leave out a class."""
    return math.ceil(round(coverage / (1 - coverage), 6))


def set_threshold(true_scores: np.ndarray, coverage: float) -> float:
    """Score up to which classes belong to a set; infinite if the images are too few.

    A new image's true class has a score up to this threshold with a probability of at least ``coverage``, if the image
    and the calibration images are exchangeable.

    Args:
        true_scores: Score of the true class of each calibration image, ``(N,)``.
        coverage: In (0, 1).
    """
    rank = math.ceil(round((len(true_scores) + 1) * coverage, 6))
    return float(np.sort(true_scores)[rank - 1]) if 0 < rank <= len(true_scores) else math.inf


def prediction_sets(probabilities: np.ndarray, threshold: float, may_be_empty: bool = False) -> np.ndarray:
    """Which classes belong to the set of each image, bool ``(N, C)``.

    Args:
        probabilities: ``(N, C)``.
        threshold: From :func:`set_threshold`.
        may_be_empty: Leave the set of an uncertain image empty, where the stated coverage is below the accuracy. By
            default, a set always contains the most probable class, and such sets cover more than stated.
    """
    return sets_of_scores(class_scores(probabilities), threshold, may_be_empty)


def sets_of_scores(scores: np.ndarray, threshold: float, may_be_empty: bool = False) -> np.ndarray:
    """See :func:`prediction_sets`, given the scores ``(N, C)`` of :func:`class_scores`."""
    return scores <= (threshold if may_be_empty else max(threshold, 0.0))
