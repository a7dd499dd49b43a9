from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from project.data.sources import Sample
from project.data.splits import hold_out, split

samples = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(
    lambda labels: [Sample(f"{i}.jpg", label) for i, label in enumerate(labels)]
)


@given(samples, st.floats(0.01, 0.9), st.integers(0, 5))
def test_a_hold_out_is_stratified_and_loses_nothing(all_of: list[Sample], fraction: float, seed: int) -> None:
    kept, held = hold_out(all_of, fraction, seed)
    assert sorted(kept + held) == sorted(all_of)
    counts, held_counts = Counter(s.label for s in all_of), Counter(s.label for s in held)
    for label, count in counts.items():
        assert held_counts[label] < count, "a class that nothing is left of could not be learnt"
        if count > 1:
            assert held_counts[label] >= 1
            assert abs(held_counts[label] - fraction * count) <= 1


@given(samples, st.randoms())
def test_the_order_of_listing_does_not_count(all_of: list[Sample], random: object) -> None:
    shuffled = list(all_of)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(hold_out(all_of, 0.3, 0)[1]) == set(hold_out(shuffled, 0.3, 0)[1])


def test_another_seed_holds_out_others() -> None:
    all_of = [Sample(f"{i}.jpg", 0) for i in range(100)]
    assert hold_out(all_of, 0.2, 0) == hold_out(all_of, 0.2, 0)
    assert hold_out(all_of, 0.2, 0) != hold_out(all_of, 0.2, 1)


def test_splits_that_the_data_has_are_kept() -> None:
    given_splits = {name: [Sample(f"{name}{i}", 0) for i in range(10)] for name in ("train", "val", "test")}
    assert split(given_splits, 0.5, 0.5, 0) == given_splits


@pytest.mark.parametrize(("val", "test"), [(0.2, 0.0), (0.2, 0.2), (0.1, 0.4)])
def test_fractions_are_shares_of_the_whole(val: float, test: float) -> None:
    parts = split({"train": [Sample(f"{i}.jpg", i % 2) for i in range(200)]}, val, test, 0)
    assert len(parts["val"]) == pytest.approx(200 * val, abs=2)
    assert len(parts["test"]) == pytest.approx(200 * test, abs=2)
    assert len({s.name for part in parts.values() for s in part}) == 200
