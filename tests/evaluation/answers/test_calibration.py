"""Answers: calibration images, the policy for new images, the state in checkpoints, and refused settings."""

from typing import Any

import numpy as np
import pytest
import torch

from project.errors import CheckpointError, ConfigError
from project.evaluation.answers.calibration import TENSORS, Answers
from project.evaluation.answers.held_out import (
    FEW_IMAGES,
    MAX_IMAGES,
    Calibration,
    HeldOutImages,
    combine,
    is_less_accurate,
    max_images,
)
from project.evaluation.answers.unknown_images import distances, quantized
from tests.evaluation.answers.synthetic import calibrated, sharpened

DIRECTIONS = np.random.default_rng(7).random((4, 24))  # of the features of each class


def features_of(labels: np.ndarray, seed: int, spread: float = 0.3) -> np.ndarray:
    return DIRECTIONS[labels] + spread * np.random.default_rng(seed).random((len(labels), 24))


ROWS = quantized(features_of(np.arange(40) % 4, 1))


def images(count: int, seed: int = 0, sharpness: float = 3.0) -> HeldOutImages:
    probabilities, labels = calibrated(count, sharpness=sharpness, seed=seed)
    return HeldOutImages(probabilities, labels, distances(features_of(labels, seed), ROWS))


def fitted(count: int, sharpness: float = 3.0) -> Answers:
    return Answers.fit(combine(images(count, sharpness=sharpness), None), ROWS)


def test_the_policy_gives_what_is_asked_for() -> None:
    answers, new = fitted(1000), images(2000, seed=5)
    features = features_of(new.labels, 5)
    nothing = answers.policy()(new.probabilities, features)
    assert (nothing.known, nothing.sets, nothing.answered) == (None, None, None)
    all_limits = answers.policy(coverage=0.95, max_error=0.1, false_alarms=0.05)(new.probabilities, features)
    assert all_limits.known is not None and all_limits.sets is not None and all_limits.answered is not None
    assert all_limits.sets[np.arange(2000), new.labels].mean() == pytest.approx(0.95, abs=0.02)
    assert (~new.correct)[all_limits.answered].mean() <= 0.1 and 0.2 < all_limits.answered.mean() < 1
    assert all_limits.known.mean() == pytest.approx(0.95, abs=0.03)
    strangers = np.random.default_rng(3).standard_normal((50, 24))
    assert not answers.policy(false_alarms=0.05)(new.probabilities[:50], strangers).known.any()  # type: ignore[union-attr]


def test_probabilities_are_calibrated() -> None:
    probabilities, labels = calibrated(2000)
    sharp = HeldOutImages(sharpened(probabilities, 2), labels, np.zeros(2000, np.float32))
    answers = Answers.fit(combine(sharp, None), ROWS)
    assert answers.temperature == pytest.approx(2, rel=0.1)
    result = answers.policy()(sharp.probabilities, np.ones((2000, 24)))
    assert result.probabilities == pytest.approx(probabilities, abs=0.05)


def test_the_state_restores_the_same_policy() -> None:
    answers, new = fitted(300), images(100, seed=5)
    state = answers.state()
    restored = Answers.from_state(state, 4, 24)
    assert restored is not None and restored.report == answers.report and len(restored) == 300
    limits: dict[str, Any] = {"coverage": 0.9, "max_error": 0.2, "false_alarms": 0.1}
    expected, actual = (
        item.policy(**limits)(new.probabilities, features_of(new.labels, 5)) for item in (answers, restored)
    )
    for before, after in zip(expected, actual, strict=True):
        assert (before == after).all()
    assert Answers.from_state(None, 4, 24) is None


def test_sets_of_saturated_probabilities_cover_as_much_as_stated() -> None:
    def saturated(seed: int) -> HeldOutImages:
        """Images of a network that is certain of each answer, and wrong in 4 % of them."""
        generator = np.random.default_rng(seed)
        logits = generator.normal(0, 3, (4000, 10)) + np.r_[22, np.zeros(9)]
        probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
        labels = np.where(generator.random(4000) < 0.04, generator.integers(0, 10, 4000), probabilities.argmax(1))
        return HeldOutImages(probabilities, labels, np.zeros(4000, np.float32))

    shares = []
    for seed in range(10):
        policy, new = Answers.fit(combine(saturated(seed), None), ROWS).policy(coverage=0.99), saturated(100 + seed)
        sets = policy(new.probabilities, np.ones((4000, 24))).sets
        assert sets is not None
        shares.append(sets[np.arange(4000), new.labels].mean())
    assert np.mean(shares) > 0.987


def test_stored_scores_are_not_below_the_exact_ones() -> None:
    exact = images(500).true_scores
    stored = fitted(500).true_scores
    assert stored.dtype == np.float32 and (stored >= exact).all() and stored == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in TENSORS),
        {"rows": torch.zeros(3, 23, dtype=torch.int8)},
        {"confidence": torch.zeros(4)},
        {"predicted": torch.full((300,), 4, dtype=torch.int32)},
        {"temperature": -1.0},
        {"temperature": "1"},
        {"classes": 5},
        {"temperature": float("inf")},
        {"validation": None},
        {"validation": 301},
        {"report": None},
        {"report": {}},
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="its calibrated answers are invalid"):
        Answers.from_state({**fitted(300).state(), **change}, 4, 24)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"coverage": 1.0}, "coverage must be between 1e-06 and 0.999999, not 1.0"),
        ({"max_error": 0}, "max_error must be between 1e-06 and 0.999999, not 0"),
        ({"max_error": 1e-19}, "max_error must be between 1e-06 and 0.999999, not 1e-19"),  # of more trials than int64
        ({"false_alarms": 1e-320}, "false_alarms must be between 1e-06 and 0.999999, not 1e-320"),
        ({"coverage": float("nan")}, "coverage must be between 1e-06 and 0.999999, not nan"),
        ({"coverage": 0.99}, "coverage 0.99 needs 99 calibration images, but the checkpoint has 50"),
        ({"false_alarms": 0.01}, "false_alarms 0.01 needs 99 calibration images, but the checkpoint has 50"),
        ({"max_error": 0.01}, "at least 230 images that are answered without an error, but the checkpoint has 50 cal"),
    ],
)
def test_limits_that_cannot_hold_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(50).policy(**limits)


def test_an_error_that_no_threshold_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="the most confident of the 400 calibration images contain too many errors"):
        fitted(400, sharpness=0.1).policy(max_error=0.05)


def test_reported_results_are_close_to_the_truth() -> None:
    report = fitted(2000).report
    for entry in report["sets"]:
        assert entry["covered"] / entry["images"] >= entry["coverage"] - 0.02
    assert [entry["coverage"] for entry in report["sets"]] == [0.9, 0.95, 0.99]
    for entry in report["unknown"]:
        assert entry["alarms"] / entry["images"] == pytest.approx(entry["rate"], abs=0.02)
    assert report["abstention"][-1]["share"] > 0 and report["abstention"][-1]["errors"] < 0.05 * 2000
    value, low, high = report["calibration"]["after"]["ece"]
    assert low >= 0 and value < high < 0.1


def test_settings_that_few_images_cannot_measure_are_left_out() -> None:
    report = fitted(50).report
    assert [entry["coverage"] for entry in report["sets"]] == [0.9, 0.95]
    assert [entry["rate"] for entry in report["unknown"]] == [0.05]
    assert report["abstention"][0] == {
        "max_error": 0.01, "share": 0.0, "needed": 230, "images": 50, "answered": 0, "errors": 0
    }  # fmt: skip


def test_out_of_fold_predictions_are_added_to_few_validation_images() -> None:
    few, many, training = images(100), images(FEW_IMAGES), images(700, seed=3)
    both = combine(few, training)
    assert (both.validation, both.out_of_fold, both.note) == (100, 700, "")
    assert (both.images.labels == np.r_[few.labels, training.labels]).all()
    assert combine(many, training).out_of_fold == 0 and combine(few, None).out_of_fold == 0


def test_optimistic_out_of_fold_predictions_are_not_used() -> None:
    harder, easy = images(150, sharpness=1.0), images(700, seed=3, sharpness=6.0)
    result = combine(harder, easy)
    assert (
        result.out_of_fold == 0
        and "out-of-fold predictions of training images are significantly more accurate, " in result.note
    )
    assert combine(easy.at(np.arange(150)), images(700, seed=4, sharpness=1.0)).out_of_fold == 700  # pessimistic


def test_the_comparison_of_accuracies_has_its_stated_level() -> None:
    draws = np.random.default_rng(0).random((2000, 800)) < 0.85
    assert np.mean([is_less_accurate(draw[:150], draw[150:]) for draw in draws]) == pytest.approx(0.1, abs=0.02)
    assert not is_less_accurate(np.ones(50, bool), np.ones(80, bool))


@pytest.mark.parametrize(("classes", "count"), [(2, 4000), (1000, 4000), (5000, 1677), (100_000, 1000)])
def test_fewer_images_of_many_classes_are_kept(classes: int, count: int) -> None:
    assert max_images(classes) == count


def test_at_most_so_many_images_are_kept() -> None:
    calibration: Calibration = combine(images(MAX_IMAGES + 500), None)
    assert len(calibration.images) == calibration.validation == MAX_IMAGES
