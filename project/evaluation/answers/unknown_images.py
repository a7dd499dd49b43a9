"""Unknown images: those whose features are far from the features of all training images.

Source: Y. Sun et al., "Out-of-distribution detection with deep nearest neighbors", ICML 2022, arXiv:2204.06507.

A hundred rows of one byte per value detect nearly as well as all rows of 32 bits: see ``docs/performance.md``.
"""

from __future__ import annotations

import math

import numpy as np

#: Approximate size of the stored rows; many classes need more.
ROW_BYTES = 2**17
MIN_ROWS_PER_CLASS = 2
NEIGHBORS = 5
_LARGEST = 127  # of int8
_CELLS = 2**24  # similarities to compute at once


def select_rows(labels: np.ndarray, width: int) -> np.ndarray:
    """Indices of the training images whose features are stored, int64 ``(M,)``: random, of each class equally many.

    Args:
        labels: Class of each training image, ``(N,)``.
        width: Number D of features.
    """
    classes, inverse = np.unique(labels, return_inverse=True)
    count = max(ROW_BYTES // width, MIN_ROWS_PER_CLASS * len(classes))
    shuffled = np.random.default_rng(0).permutation(len(labels))
    ordered = shuffled[np.argsort(inverse[shuffled], kind="stable")]  # by class, random within a class
    sizes = np.bincount(inverse)
    place = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)  # within the class
    return np.sort(ordered[np.argsort(place, kind="stable")[:count]])


def quantized(features: np.ndarray) -> np.ndarray:
    """Features ``(M, D)`` as int8; the largest value of each row becomes 127."""
    largest = np.maximum(np.abs(features).max(1, keepdims=True), np.finfo(np.float32).tiny)
    rounded: np.ndarray = np.rint(features / largest * _LARGEST).astype(np.int8)
    return rounded


def distances(
    features: np.ndarray, rows: np.ndarray, excluded: np.ndarray | None = None, neighbors: int = NEIGHBORS
) -> np.ndarray:
    """Cosine distance of each image to its k-th nearest stored row, float32 ``(N,)``.

    Args:
        features: ``(N, D)``.
        rows: The stored rows ``(M, D)``, each up to a factor.
        excluded: For training images, the rows that do not count, bool ``(N, M)``: the image itself and those of its
            cross-validation fold, among which are its near-duplicates.
        neighbors: k; the farthest row if there are fewer.
    """
    units, result, size = _unit(rows), np.empty(len(features), np.float32), max(_CELLS // max(len(rows), 1), 1)
    for start in range(0, len(features), size):
        part = slice(start, start + size)
        similarity = _unit(features[part]) @ units.T
        available = np.full(len(similarity), len(rows))
        if excluded is not None:
            similarity[excluded[part]] = -np.inf
            available -= excluded[part].sum(1)
        ordered = -np.sort(-similarity, axis=1)
        result[part] = 1 - ordered[np.arange(len(ordered)), np.clip(available, 1, neighbors) - 1]
    return result


def _unit(values: np.ndarray) -> np.ndarray:
    exact = values.astype(np.float32)
    scaled: np.ndarray = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return scaled


def images_needed(false_alarms: float) -> int:
    """Smallest number of calibration images that can give a threshold."""
    return math.ceil(round(1 / false_alarms - 1, 6))


def distance_thresholds(
    calibration: np.ndarray, predicted: np.ndarray, classes: int, false_alarms: float
) -> np.ndarray:
    """Distance of each predicted class above which an image is unknown, float64 ``(C,)``.

    A new image of a known class, which is predicted as a class, exceeds its threshold with a probability of at most
    ``false_alarms`` (a conformal p-value; V. Vovk, "Conditional validity of inductive conformal predictors", 2012).
    The classes with fewer calibration images than :func:`images_needed` share a threshold: that of all their images
    together, so that the probability also holds for them together. If these are too few, too, it is that of all images.

    Args:
        calibration: Distance of each calibration image, ``(N,)``.
        predicted: Its predicted class, int ``(N,)``.
        classes: Number C of classes.
        false_alarms: In (0, 1).
    """
    is_rare = np.bincount(predicted, minlength=classes) < images_needed(false_alarms)
    common = _threshold(calibration, false_alarms)
    common = _threshold(calibration[is_rare[predicted]], false_alarms, common)
    limits = np.full(classes, common)
    for label in np.flatnonzero(~is_rare):
        limits[label] = _threshold(calibration[predicted == label], false_alarms)
    return limits


def _threshold(values: np.ndarray, false_alarms: float, fallback: float = math.inf) -> float:
    rank = math.ceil(round((len(values) + 1) * (1 - false_alarms), 6))
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else fallback
