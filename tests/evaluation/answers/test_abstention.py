"""Abstention: the guarantee holds for predictions whose error is known, and binomial tests are exact."""

import math
from fractions import Fraction

import numpy as np
import pytest

from project.evaluation.answers import abstention
from project.evaluation.answers.abstention import certify
from project.evaluation.answers.binomial import binomial_cdf, trials_to_certify


@pytest.mark.parametrize(("errors", "count"), [(0, 5), (2, 5), (4, 5), (5, 5), (7, 400)])
def test_the_distribution_is_the_binomial_one(errors: int, count: int) -> None:
    rate = Fraction(1, 20)
    terms = (math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(errors + 1))
    assert binomial_cdf(errors, count, 0.05) == pytest.approx(float(sum(terms)), rel=1e-9)


def test_the_number_of_trials_is_the_smallest() -> None:
    assert trials_to_certify(0, 0.01, 0.1) == 230  # .99 ** 229 is .1001
    for errors in (0, 1, 6):
        count = trials_to_certify(errors, 0.02, 0.05)
        assert binomial_cdf(errors, count, 0.02) <= 0.05 < binomial_cdf(errors, count - 1, 0.02)


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform confidences c, and predictions that are wrong with probability (1 - c) / 5."""
    generator = np.random.default_rng(seed)
    confidence = generator.random(count)
    return confidence, generator.random(count) > (1 - confidence) / 5


def true_error(threshold: float) -> float:
    """Error of the answered images: the mean of (1 - c) / 5 above the threshold."""
    return (1 - threshold) / 10


@pytest.mark.parametrize("count", [1000, 3000])
def test_the_true_error_exceeds_the_stated_one_rarely(count: int) -> None:
    thresholds = [certify(*draw(count, seed), 0.03).threshold for seed in range(200)]
    exceeds = [threshold is not None and true_error(threshold) > 0.03 for threshold in thresholds]
    assert np.mean([threshold is not None for threshold in thresholds]) > 0.2
    assert np.mean(exceeds) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 200)


def test_more_images_answer_more() -> None:
    shares = [np.mean([certify(*draw(count, seed), 0.03).answered for seed in range(40)]) for count in (200, 800, 5000)]
    assert shares[0] < shares[1] < shares[2] < 0.3  # at a threshold of .7, the error is exactly .03


def test_an_accurate_classifier_answers_everything() -> None:
    confidence = np.linspace(0.5, 1, 500)
    result = certify(confidence, np.ones(500, bool), 0.01)
    assert result.answered == 1 and result.threshold == 0.5 and result.errors == 0


def test_too_few_images_certify_nothing_and_say_how_many_are_needed() -> None:
    result = certify(np.linspace(0.5, 1, 229), np.ones(229, bool), 0.01)
    assert result.threshold is None and result.answered == 0 and result.needed == 230
    assert certify(np.linspace(0.5, 1, 230), np.ones(230, bool), 0.01).images == 230


def test_images_of_equal_confidence_are_answered_together() -> None:
    confidence = np.r_[np.ones(300), np.full(100, 0.6)]
    correct = np.ones(400, bool)
    correct[280:300] = False  # 20 of the 300 images with confidence 1 are wrong
    assert certify(confidence, correct, 0.05).threshold is None
    correct[:] = True
    assert certify(confidence, correct, 0.01).images in (300, 400)


def test_a_single_confident_error_does_not_prevent_certification() -> None:
    correct = np.ones(2000, bool)
    correct[-1] = False  # the most confident one
    result = certify(np.linspace(0, 1, 2000), correct, 0.01)
    assert result.answered > 0.9 and result.errors == 1


def test_large_errors_of_many_images_need_few_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = []

    def counted(errors: int, images: int, rate: float) -> float:
        tests.append(images)
        return binomial_cdf(errors, images, rate)

    monkeypatch.setattr(abstention, "binomial_cdf", counted)
    result = certify(np.linspace(0, 1, 8000), np.arange(8000) % 20 > 0, 0.6)
    assert result.answered == 1 and tests[-1] == 8000
    assert len(tests) < 2500  # one for each error: 19,000
