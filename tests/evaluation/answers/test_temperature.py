"""Temperature scaling of probabilities whose temperature is known, and its cross-fitted scores."""

import math

import numpy as np
import pytest
import torch

from project.evaluation.answers.temperature import (
    calibration_report,
    calibration_scores,
    cross_fitted,
    fit_temperature,
    random_folds,
    scaled,
)
from project.evaluation.metrics import calibration_bins, calibration_error
from tests.evaluation.answers.synthetic import calibrated, sharpened


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_true_temperature_is_found(temperature: float) -> None:
    probabilities, labels = calibrated(20_000)
    assert fit_temperature(sharpened(probabilities, temperature), labels) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_of_classifiers_without_an_error_is_not_the_lowest() -> None:
    probabilities = np.full((60, 2), 0.1, np.float32)
    probabilities[:, 0] = 0.9
    temperature = fit_temperature(probabilities, np.zeros(60, int))
    confidence = scaled(probabilities, temperature)[0, 0]
    assert confidence == pytest.approx(61 / 62, abs=0.005)  # the rule of succession: 60 of 60 are right
    fewer = fit_temperature(probabilities[:20], np.zeros(20, int))
    assert temperature < fewer < 1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [20, 60])
def test_a_temperature_of_few_images_is_not_overconfident(temperature: float, count: int) -> None:
    new, labels = calibrated(5000, sharpness=5, seed=999)
    truth = calibration_scores(new, labels)["nll"].value
    likelihoods = []
    for seed in range(60):
        chosen = calibrated(count, sharpness=5, seed=seed)
        fitted = fit_temperature(sharpened(chosen[0], temperature), chosen[1])
        values = scaled(sharpened(new, temperature), fitted)
        likelihoods.append(-np.log(values[np.arange(5000), labels]).mean())
    assert np.mean(likelihoods) < truth + 1.0 / count  # without the two images: up to 5 / count more


def test_scaling_equals_dividing_the_logits() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    expected = (logits / 2.5).softmax(1).numpy()
    assert scaled(logits.softmax(1).numpy(), 2.5) == pytest.approx(expected, abs=1e-6)
    assert (scaled(logits.softmax(1).numpy(), 0.3).argmax(1) == logits.argmax(1).numpy()).all()


def test_saturated_probabilities_stay_finite() -> None:
    saturated = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    temperature = fit_temperature(saturated, np.array([0, 1, 1]))
    assert math.isfinite(temperature) and np.isfinite(scaled(saturated, temperature)).all()
    assert all(math.isfinite(score.value) for score in calibration_scores(saturated, np.array([0, 1, 1])).values())


def test_scores_of_hand_computed_predictions() -> None:
    probabilities, labels = np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1])
    scores = calibration_scores(probabilities, labels)
    assert scores["nll"].value == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert scores["brier"].value == pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2)
    assert scores["ece"].value == pytest.approx((0.2 + 0.6) / 2)


def test_the_calibration_error_is_that_of_the_validation() -> None:
    probabilities, labels = calibrated(500)
    confidence, correct = torch.from_numpy(probabilities.max(1)), torch.from_numpy(probabilities.argmax(1) == labels)
    expected = float(calibration_error(calibration_bins(confidence, correct)))
    assert calibration_scores(probabilities, labels)["ece"].value == pytest.approx(expected, abs=1e-6)


def test_cross_fitting_excludes_the_image_itself() -> None:
    probabilities, labels = calibrated(60)
    folds = random_folds(60)
    expected = cross_fitted(probabilities, labels, folds)
    flipped = np.where(folds == 2, (labels + 1) % 4, labels)  # does not change the temperature of fold 2
    assert (cross_fitted(probabilities, flipped, folds)[folds == 2] == expected[folds == 2]).all()
    assert (cross_fitted(probabilities, flipped, folds)[folds == 1] != expected[folds == 1]).any()


def test_the_temperature_repairs_overconfident_probabilities() -> None:
    probabilities, labels = calibrated(3000)
    report = calibration_report(sharpened(probabilities, 3), labels, random_folds(3000))
    for name in ("nll", "brier", "ece"):
        assert report.after[name].interval[1] < report.before[name].interval[0]
        low, high = report.after[name].interval
        assert low < high
    assert report.after["nll"].value == pytest.approx(calibration_scores(probabilities, labels)["nll"].value, rel=0.01)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_interval_of_the_calibration_error_contains_the_true_one(temperature: float) -> None:
    probabilities, labels = calibrated(200_000, seed=99)
    exact = sharpened(probabilities, temperature)
    bins = calibration_bins(torch.from_numpy(exact.max(1)), torch.from_numpy(exact.argmax(1) == labels))
    truth, hits = float(calibration_error(bins)), []
    for seed in range(60):
        probabilities, labels = calibrated(150, seed=seed)
        low, high = calibration_scores(sharpened(probabilities, temperature), labels)["ece"].interval
        hits.append(low <= truth <= high)
    assert np.mean(hits) > 0.87  # an interval of 95 %; a percentile interval never contains a truth of 0
