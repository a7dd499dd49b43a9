"""Prediction sets: exact coverage, no empty sets, and the classes that they contain."""

import math

import numpy as np
import pytest

from project.evaluation.answers.prediction_sets import class_scores, images_needed, prediction_sets, set_threshold
from tests.evaluation.answers.synthetic import calibrated, sharpened


def coverage_of(sets: np.ndarray, labels: np.ndarray) -> float:
    return float(sets[np.arange(len(labels)), labels].mean())


def true_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return class_scores(probabilities)[np.arange(len(labels)), labels]


def test_the_score_is_the_probability_of_more_probable_classes() -> None:
    scores = class_scores(np.array([[0.2, 0.5, 0.3]]))
    assert scores == pytest.approx(np.array([[0.8, -0.5, 0.5]]))


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("temperature", [1.0, 4.0])  # also of badly calibrated probabilities
def test_sets_cover_exactly_as_often_as_stated(coverage: float, temperature: float) -> None:
    """Over many calibrations with 99 images, whose expected coverage is exactly the stated one."""
    covered = []
    for seed in range(300):
        probabilities, labels = calibrated(199, seed=seed)
        probabilities = sharpened(probabilities, temperature)
        threshold = set_threshold(true_scores(probabilities[:99], labels[:99]), coverage)
        covered.append(coverage_of(prediction_sets(probabilities[99:], threshold, may_be_empty=True), labels[99:]))
    assert np.mean(covered) == pytest.approx(coverage, abs=4 * np.std(covered) / math.sqrt(300) + 1e-3)


def test_a_set_contains_the_predicted_class_unless_it_may_be_empty() -> None:
    probabilities, labels = calibrated(2000, sharpness=8)
    accuracy = float((probabilities.argmax(1) == labels).mean())
    threshold = set_threshold(true_scores(probabilities, labels), 0.7)
    assert accuracy > 0.8  # higher than the stated coverage
    assert coverage_of(prediction_sets(probabilities, threshold), labels) == pytest.approx(accuracy)
    empty = prediction_sets(probabilities, threshold, may_be_empty=True)
    assert coverage_of(empty, labels) == pytest.approx(0.7, abs=0.01)
    uncertain = probabilities.max(1)[~empty.any(1)]
    assert uncertain.max() <= probabilities.max(1)[empty.any(1)].min()  # only the least confident sets are empty


def test_uncertain_images_have_larger_sets() -> None:
    probabilities, labels = calibrated(3000, classes=10, sharpness=1.5)
    sets = prediction_sets(probabilities, set_threshold(true_scores(probabilities, labels), 0.9))
    order = probabilities.max(1).argsort()
    assert sets[order[:500]].sum(1).mean() > 1.5 * sets[order[-500:]].sum(1).mean()


def test_too_few_images_leave_out_no_class() -> None:
    assert images_needed(0.95) == 19 and images_needed(0.9) == 9 and images_needed(0.99) == 99
    probabilities, labels = calibrated(19)
    scores = true_scores(probabilities, labels)
    assert set_threshold(scores, 0.95) == scores.max()
    assert set_threshold(scores[:18], 0.95) == math.inf
    assert prediction_sets(probabilities, math.inf).all()
