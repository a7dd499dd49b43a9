"""The gain over the initial head: paired intervals against published and computed values, and its state."""

from typing import Any

import numpy as np
import pytest
import torch

from project.evaluation.confusion import ImagePredictions
from project.evaluation.gain import CorrectImages, Gain
from project.evaluation.paired_intervals import newcombe_paired, paired_difference
from project.runtime.distributed import ProcessGroup


def pair(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Results of two models with these numbers of images that both, one or none of them classify correctly."""
    cells = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, first, second, neither], axis=0).astype(bool)
    return cells[:, 0], cells[:, 1]


def test_the_interval_has_the_published_value() -> None:
    """Table III of the paper, method 10."""
    assert newcombe_paired(*pair(36, 12, 2, 0)) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_the_interval_of_a_hand_computed_table() -> None:
    # 10 images: 5 both, 3 first only, 1 second only, 1 neither. Accuracies .8 and .6. 5 x 1 - 3 x 1 = 2 is less than
    # 10 / 2, so the correlation is 0. Wilson: .4902 to .9433, and .3127 to .8318.
    low, high = 0.2 - np.hypot(0.8 - 0.4902, 0.8318 - 0.6), 0.2 + np.hypot(0.9433 - 0.8, 0.6 - 0.3127)
    assert newcombe_paired(*pair(5, 3, 1, 1)) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("counts", [(8, 0, 0, 0), (0, 0, 0, 8), (0, 8, 0, 0), (5, 0, 0, 3), (1, 0, 0, 0)])
def test_the_interval_exists_for_extreme_tables(counts: tuple[int, int, int, int]) -> None:
    first, second = pair(*counts)
    low, high = newcombe_paired(first, second)
    assert -1 <= low <= first.mean() - second.mean() <= high <= 1 and low < high
    assert newcombe_paired(second, first) == pytest.approx((-high, -low))


def test_the_interval_covers_the_true_difference_in_95_percent() -> None:
    draws = np.random.default_rng(0).multinomial(60, [0.75, 0.12, 0.05, 0.08], 2000)
    limits = [newcombe_paired(*pair(*draw)) for draw in draws]
    assert np.mean([low <= 0.07 <= high for low, high in limits]) == pytest.approx(0.95, abs=0.02)


def test_the_normal_approximation_agrees_for_many_images() -> None:
    first, second = pair(7500, 1200, 500, 800)
    difference, margin = paired_difference(torch.from_numpy(first), torch.from_numpy(second))
    assert difference == pytest.approx(0.07)
    assert newcombe_paired(first, second) == pytest.approx((difference - margin, difference + margin), abs=1e-3)


def results(correct: np.ndarray, split: str = "a") -> CorrectImages:
    return CorrectImages(correct, split)


def test_the_gain_as_text() -> None:
    best, initial = pair(36, 12, 2, 0)
    assert str(Gain.between(results(best), results(initial))) == (
        "+20.0 points (95 % interval +5.7 to +34.0, paired on 50 images); optimistic, because the epoch is chosen on "
        "these images"
    )
    best, initial = pair(5, 3, 1, 1)
    text = str(Gain.between(results(best), results(initial)))
    assert text.startswith(
        "+20.0 points (95 % interval -18.7 to +52.1, paired on 10 images), not significant; optimistic"
    )
    assert str(Gain.between(results(best), results(best), True)) == "none: no epoch is better on 10 images"
    one = np.ones(1, bool)
    assert "paired on 1 image)" in str(Gain.between(results(one), results(~one)))


def test_results_of_different_images_are_not_compared() -> None:
    correct = np.ones(5, bool)
    assert Gain.between(results(correct), results(correct, "b")) is None
    assert Gain.between(results(correct), results(correct[:4])) is None
    assert Gain.between(results(correct), None) is None and Gain.between(None, results(correct)) is None
    assert Gain.between(results(correct[:0]), results(correct[:0])) is None


@pytest.mark.parametrize("count", [1, 8, 1003])
def test_the_state_has_a_bit_for_each_image(count: int) -> None:
    correct = np.random.default_rng(count).random(count) < 0.7
    state = results(correct).state()
    assert state["bits"].dtype == torch.uint8 and len(state["bits"]) == -(-count // 8)
    restored = CorrectImages.from_state(state)
    assert restored is not None and np.array_equal(restored.correct, correct) and restored.split == "a"


@pytest.mark.parametrize(
    "changed", [{"bits": None}, {"bits": torch.zeros(2)}, {"images": 9}, {"images": 0}, {"images": "8"}, {"split": 1}]
)
def test_malformed_state_is_ignored(changed: dict[str, Any]) -> None:
    state = results(np.ones(8, bool)).state()
    assert CorrectImages.from_state(state) is not None
    assert CorrectImages.from_state({**state, **changed}) is None
    assert CorrectImages.from_state(None) is None


@pytest.mark.parametrize(("ranks", "count"), [(1, 5), (2, 5), (3, 7), (4, 2)])
def test_the_images_of_all_ranks_are_in_the_order_of_the_split(
    ranks: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = np.random.default_rng(ranks).random(count) < 0.5
    monkeypatch.setattr(ProcessGroup, "gather", lambda *_: [correct[rank::ranks] for rank in range(ranks)])
    own = torch.zeros(0, dtype=torch.int64)
    merged = CorrectImages.gather(ImagePredictions(own.float(), own, own, own.bool()), "a")
    assert np.array_equal(merged.correct, correct)
