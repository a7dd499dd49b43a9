"""Unknown images: stored rows, distances to them, and thresholds with a stated rate of false alarms."""

import math

import numpy as np
import pytest

from project.evaluation.answers import unknown_images
from project.evaluation.answers.unknown_images import (
    distance_thresholds,
    distances,
    images_needed,
    quantized,
    select_rows,
)


def test_stored_rows_are_balanced_over_the_classes() -> None:
    labels = np.r_[np.zeros(1000, int), np.ones(300, int), np.full(20, 2)]
    chosen = select_rows(labels, 1280)
    assert len(chosen) == len(np.unique(chosen)) == unknown_images.ROW_BYTES // 1280 == 102
    counts = np.bincount(labels[chosen])
    assert counts[2] == 20 and abs(counts[0] - counts[1]) <= 1
    assert (select_rows(labels, 1280) == chosen).all()


def test_few_images_are_all_stored_and_many_classes_get_two_each() -> None:
    assert (select_rows(np.array([0, 1, 1]), 1280) == [0, 1, 2]).all()
    assert (np.bincount(np.arange(5000)[select_rows(np.arange(5000) % 500, 1280)] % 500) == 2).all()


def test_the_distance_is_the_cosine_distance_to_the_kth_nearest_row() -> None:
    generator = np.random.default_rng(0)
    features, rows = generator.random((30, 16)), generator.random((12, 16))
    cosine = features @ rows.T / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    expected = np.sort(1 - cosine, axis=1)
    assert distances(features, rows, neighbors=3) == pytest.approx(expected[:, 2], abs=1e-5)
    assert distances(features, rows, neighbors=20) == pytest.approx(expected[:, 11], abs=1e-5)
    assert distances(features, 7 * rows, neighbors=3) == pytest.approx(expected[:, 2], abs=1e-5)


def test_rows_of_the_same_fold_do_not_count() -> None:
    rows = np.eye(4)
    excluded = np.eye(4, dtype=bool)  # each image itself
    assert distances(rows, rows, neighbors=1) == pytest.approx(np.zeros(4))
    assert distances(rows, rows, excluded, neighbors=1) == pytest.approx(np.ones(4))


def test_large_inputs_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    features, rows, excluded = generator.random((50, 8)), generator.random((9, 8)), generator.random((50, 9)) < 0.5
    expected = distances(features, rows, excluded)
    monkeypatch.setattr(unknown_images, "_CELLS", 100)
    assert distances(features, rows, excluded) == pytest.approx(expected)


def test_one_byte_per_value_is_precise_enough() -> None:
    generator = np.random.default_rng(0)
    features, rows = generator.random((100, 256)) ** 3, generator.random((40, 256)) ** 3
    stored = quantized(rows)
    assert stored.dtype == np.int8 and stored.max() == 127
    assert distances(features, stored) == pytest.approx(distances(features, rows), abs=2e-3)
    assert (quantized(np.zeros((1, 4))) == 0).all()


def test_false_alarms_are_as_rare_as_stated_for_each_predicted_class() -> None:
    alarms = np.zeros((200, 2))
    for seed in range(200):
        generator = np.random.default_rng(seed)
        predicted = np.arange(198) % 2
        values = generator.exponential(1 + 4 * predicted)  # the second class is spread wider
        limits = distance_thresholds(values, predicted, 2, 0.05)
        fresh = np.arange(2000) % 2
        exceeds = generator.exponential(1 + 4 * fresh) > limits[fresh]
        alarms[seed] = [exceeds[fresh == label].mean() for label in (0, 1)]
    assert alarms.mean(0) == pytest.approx([0.05, 0.05], abs=0.005)


def test_false_alarms_of_rare_classes_together_are_as_rare_as_stated() -> None:
    rates = []
    for seed in range(100):
        generator = np.random.default_rng(seed)

        def draw(count: int, generator: np.random.Generator = generator) -> tuple[np.ndarray, np.ndarray]:
            """Half of the images are of a common class, and those of 59 rare ones are farther away."""
            is_rare = generator.random(count) < 0.5
            return generator.random(count) + is_rare, np.where(is_rare, generator.integers(1, 60, count), 0)

        values, predicted = draw(600)
        limits = distance_thresholds(values, predicted, 60, 0.05)
        fresh, classes = draw(2000)
        rates.append((fresh > limits[classes]).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.005)  # with the threshold of all images: 0.073


def test_a_class_with_few_images_gets_the_threshold_of_all() -> None:
    assert images_needed(0.05) == 19
    values, predicted = np.arange(1.0, 119), np.r_[np.zeros(100, int), np.ones(18, int)]
    first, second, third = distance_thresholds(values, predicted, 3, 0.05)
    assert first == 96 and second == third == 114
    assert math.isinf(distance_thresholds(values[:5], predicted[:5], 1, 0.05)[0])
