"""Wilson and bootstrap confidence intervals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from project.evaluation.confidence_intervals import bootstrap_f1, wilson
from project.evaluation.metrics import macro_f1


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval_has_the_published_values(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_wilson_interval_contains_the_proportion_and_lies_in_0_to_1(count: int, share: float) -> None:
    successes = round(share * count)
    low, high = wilson(successes, count)
    assert -1e-12 <= low <= successes / count + 1e-12 and successes / count - 1e-12 <= high <= 1 + 1e-12


def test_wilson_interval_covers_the_true_proportion_in_95_percent() -> None:
    draws = np.random.default_rng(0).binomial(40, 0.9, 4000)
    covered = [low <= 0.9 <= high for low, high in (wilson(int(successes), 40) for successes in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def _cells(seed: int, classes: int, count: int) -> np.ndarray:
    """Cell of the confusion matrix of each image; no image has the last class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes - 1, count)
    predicted = np.where(generator.random(count) < 0.7, labels, generator.integers(0, classes - 1, count))
    return labels * classes + predicted


def _matrix(cells: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def _f1(confusion: np.ndarray) -> float:
    counts = torch.from_numpy(confusion)
    return float(macro_f1(counts.diagonal(), counts.sum(1), counts.sum(0)))


def test_bootstrap_interval_contains_the_score_shrinks_with_more_images_and_is_deterministic() -> None:
    few, many = _matrix(_cells(1, 6, 60), 6), _matrix(_cells(1, 6, 6000), 6)
    (low, high), (low_many, high_many) = bootstrap_f1(few), bootstrap_f1(many)
    assert low < _f1(few) < high and low_many < _f1(many) < high_many
    assert high_many - low_many < (high - low) / 5
    assert bootstrap_f1(few) == (low, high)


def test_bootstrap_interval_equals_resampling_of_images() -> None:
    cells = _cells(2, 4, 80)
    generator = np.random.default_rng(3)
    scores = [_f1(_matrix(generator.choice(cells, 80), 4)) for _ in range(1000)]
    confusion = _matrix(cells, 4)
    assert bootstrap_f1(confusion) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])), abs=0.02)
