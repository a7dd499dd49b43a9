"""Intervals hold what was measured, and are those of the literature."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_f1_score

from project.evaluation.confidence_intervals import bootstrap_f1, macro_f1, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0)]
)
def test_wilsons_interval_is_that_of_the_formula(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_wilsons_interval_holds_the_share_and_lies_in_0_to_1(count: int, part: float) -> None:
    right = round(part * count)
    low, high = wilson(right, count)
    assert -1e-12 <= low <= right / count + 1e-12 and right / count - 1e-12 <= high <= 1 + 1e-12


def test_wilsons_interval_covers_the_truth_in_95_of_100() -> None:
    drawn = np.random.default_rng(0).binomial(40, 0.9, 4000)
    covered = [low <= 0.9 <= high for low, high in (wilson(int(right), 40) for right in drawn)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def _confusion(seed: int, classes: int, count: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    true = generator.integers(0, classes - 1, count)  # the last class is not there
    told = np.where(generator.random(count) < 0.7, true, generator.integers(0, classes - 1, count))
    confusion = np.bincount(true * classes + told, minlength=classes**2).reshape(classes, classes)
    return confusion, torch.from_numpy(true), torch.from_numpy(told)


def test_macro_f1_of_a_confusion_matrix_is_that_of_torchmetrics() -> None:
    for seed in range(5):
        confusion, true, told = _confusion(seed, 6, 50)
        expected = multiclass_f1_score(told, true, 6, average="none")[true.unique()].mean()
        assert macro_f1(confusion) == pytest.approx(float(expected), abs=1e-6)


def test_bootstrap_holds_the_score_is_narrower_for_more_images_and_the_same_each_time() -> None:
    few, many = _confusion(1, 6, 60)[0], _confusion(1, 6, 6000)[0]
    (low, high), (low_many, high_many) = bootstrap_f1(few), bootstrap_f1(many)
    assert low < macro_f1(few) < high and low_many < macro_f1(many) < high_many
    assert high_many - low_many < (high - low) / 5
    assert bootstrap_f1(few) == (low, high)


def test_bootstrap_is_that_over_images() -> None:
    confusion, true, told = _confusion(2, 4, 80)
    generator = np.random.default_rng(3)
    scores = []
    for _ in range(1000):
        drawn = generator.integers(0, 80, 80)
        pairs = (true.numpy() * 4 + told.numpy())[drawn]
        scores.append(float(macro_f1(np.bincount(pairs, minlength=16).reshape(4, 4))))
    assert bootstrap_f1(confusion) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])), abs=0.02)
