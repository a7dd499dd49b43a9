"""What is reported of a calibration: each image is measured with settings that the other images chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from project.evaluation.answers.abstention import certify
from project.evaluation.answers.held_out import HeldOutImages
from project.evaluation.answers.prediction_sets import class_scores, set_threshold, sets_of_scores
from project.evaluation.answers.prediction_sets import images_needed as images_for_sets
from project.evaluation.answers.temperature import calibration_report, random_folds
from project.evaluation.answers.unknown_images import distance_thresholds
from project.evaluation.answers.unknown_images import images_needed as images_for_alarms

#: Settings that are reported; users can choose others.
COVERAGES = (0.9, 0.95, 0.99)
MAX_ERRORS = (0.01, 0.02, 0.05)
FALSE_ALARMS = (0.01, 0.05)
#: Keys of the results.
REPORT = ("calibration", "sets", "abstention", "unknown")


def measure(images: HeldOutImages) -> dict[str, Any]:
    """Cross-fitted results in plain types; counts are of images that did not choose the settings.

    Args:
        images: The calibration images, at least :data:`~project.evaluation.answers.temperature.FOLDS`.

    Returns:
        ``calibration``: for ``before`` and ``after`` temperature scaling, value and interval of each score;
        ``sets``: stated coverage, number of images and of covered ones, mean number of classes;
        ``abstention``: ``max_error``, share of the images that is answered with the settings of all images (0 if
        nothing can be certified), images ``needed`` to certify anything, and the cross-fitted number of answered
        images and of ``errors`` among them; ``unknown``: stated rate of false alarms, number of images and of alarms.
    """
    folds = random_folds(len(images))
    report = calibration_report(images.probabilities, images.labels, folds)
    scores = {"before": report.before, "after": report.after}
    return {
        "calibration": {
            when: {name: [estimate.value, *estimate.interval] for name, estimate in values.items()}
            for when, values in scores.items()
        },
        "sets": _sets(images, folds),
        "abstention": [_abstention(images, folds, max_error) for max_error in MAX_ERRORS],
        "unknown": [
            _false_alarms(images, folds, rate)
            for rate in FALSE_ALARMS
            if _smallest_part(folds) >= images_for_alarms(rate)
        ],
    }


def _parts(images: HeldOutImages, folds: np.ndarray) -> Iterator[tuple[HeldOutImages, HeldOutImages]]:
    """For each fold, the other images and those of the fold."""
    for fold in np.unique(folds):
        yield images.at(folds != fold), images.at(folds == fold)


def _smallest_part(folds: np.ndarray) -> int:
    return len(folds) - int(np.bincount(folds).max())


def _sets(images: HeldOutImages, folds: np.ndarray) -> list[dict[str, Any]]:
    scores = class_scores(images.probabilities)
    true_scores, entries = scores[np.arange(len(images)), images.labels], []
    for coverage in COVERAGES:
        if _smallest_part(folds) < images_for_sets(coverage):
            continue
        covered, sizes = 0, 0
        for fold in np.unique(folds):
            held_out = folds == fold
            sets = sets_of_scores(scores[held_out], set_threshold(true_scores[~held_out], coverage))
            covered += int(sets[np.arange(len(sets)), images.labels[held_out]].sum())
            sizes += int(sets.sum())
        entries.append({"coverage": coverage, "images": len(images), "covered": covered, "size": sizes / len(images)})
    return entries


def _abstention(images: HeldOutImages, folds: np.ndarray, max_error: float) -> dict[str, Any]:
    answered = errors = 0
    for chosen, held_out in _parts(images, folds):
        threshold = certify(chosen.confidence, chosen.correct, max_error).threshold
        if threshold is not None:
            is_answered = held_out.confidence >= threshold
            answered += int(is_answered.sum())
            errors += int((~held_out.correct[is_answered]).sum())
    overall = certify(images.confidence, images.correct, max_error)
    return {
        "max_error": max_error,
        "share": overall.answered,
        "needed": overall.needed,
        "images": len(images),
        "answered": answered,
        "errors": errors,
    }


def _false_alarms(images: HeldOutImages, folds: np.ndarray, rate: float) -> dict[str, Any]:
    classes, alarms = images.probabilities.shape[1], 0
    for chosen, held_out in _parts(images, folds):
        thresholds = distance_thresholds(chosen.distances, chosen.predicted, classes, rate)
        alarms += int((held_out.distances > thresholds[held_out.predicted]).sum())
    return {"rate": rate, "images": len(images), "alarms": alarms}
