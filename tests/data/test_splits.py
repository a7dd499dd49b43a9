import hashlib
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from project.data.image_index import ImageInfo
from project.data.sources.base import Sample
from project.data.splits import HoldOut, hold_out, parse_fold, place, split
from project.errors import ConfigError

labelled = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(
    lambda labels: [Sample(f"{i}.jpg", label) for i, label in enumerate(labels)]
)


def known(samples: Sequence[Sample]) -> list[ImageInfo]:
    """Every image is another one."""
    return [ImageInfo(hashlib.sha256(sample.name.encode()).digest()) for sample in samples]


def held_out(samples: Sequence[Sample], fraction: float, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    kept, held = hold_out(place(samples, known(samples), seed), 0.0, fraction)
    return [sample for sample, _ in kept], [sample for sample, _ in held]


@given(labelled, st.floats(0.01, 0.9), st.integers(0, 5))
def test_a_hold_out_loses_nothing_and_leaves_each_class_on_both_sides(
    samples: list[Sample], fraction: float, seed: int
) -> None:
    kept, held = held_out(samples, fraction, seed)
    assert sorted(kept + held) == sorted(samples)
    counts, held_counts = Counter(s.label for s in samples), Counter(s.label for s in held)
    for label, count in counts.items():
        assert held_counts[label] < count, "a class that nothing is left of could not be learnt"
        assert held_counts[label] >= 1 or count == 1


def test_a_hold_out_is_stratified() -> None:
    samples = [Sample(f"{i}.jpg", int(i % 10 == 0)) for i in range(5000)]
    counts = Counter(sample.label for sample in held_out(samples, 0.2)[1])
    assert counts[0] / 4500 == pytest.approx(0.2, abs=0.02)
    assert counts[1] / 500 == pytest.approx(0.2, abs=0.05)


@given(labelled, st.randoms())
def test_the_order_of_listing_does_not_count(samples: list[Sample], random: object) -> None:
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(held_out(samples, 0.3)[1]) == set(held_out(shuffled, 0.3)[1])


@given(st.integers(0, 1000), st.integers(1, 300), st.floats(0.1, 0.5))
def test_an_image_never_changes_sides_when_others_are_added(begin: int, more: int, fraction: float) -> None:
    samples = [Sample(f"{begin + i}.jpg", i % 2) for i in range(100)]
    added = [*samples, *(Sample(f"new{i}.jpg", i % 2) for i in range(more))]
    before, after = (set(held_out(which, fraction)[1]) for which in (samples, added))
    assert after & set(samples) == before


def test_another_seed_holds_out_others() -> None:
    samples = [Sample(f"{i}.jpg", 0) for i in range(100)]
    assert held_out(samples, 0.2) == held_out(samples, 0.2)
    assert held_out(samples, 0.2) != held_out(samples, 0.2, 1)


def test_a_group_is_on_one_side() -> None:
    samples = [Sample(f"{i}.jpg", i % 2, f"patient {i // 7}") for i in range(700)]
    kept, held = held_out(samples, 0.3)
    assert not {s.group for s in kept} & {s.group for s in held}
    assert len(held) == pytest.approx(210, abs=60)
    more = [*samples, *(Sample(f"new{i}.jpg", 0, f"patient {i % 120}") for i in range(50))]
    assert set(held_out(more, 0.3)[1]) & set(samples) == set(held), "nor does it change sides"


def test_images_with_the_same_bytes_or_looks_are_on_one_side() -> None:
    samples = [Sample(f"{i}.jpg", i % 2) for i in range(300)]
    thumbnail = bytes(range(256))
    facts = [
        ImageInfo((i % 100).to_bytes(32))
        if i < 200
        else ImageInfo(i.to_bytes(32), phash=i % 2 * 3, thumbnail=thumbnail, colour=bytes(3))
        for i in range(300)
    ]
    kept, held = hold_out(place(samples, facts, 0), 0.0, 0.4)
    sides = {sample.name: side for side, part in enumerate((kept, held)) for sample, _ in part}
    assert all(sides[f"{i}.jpg"] == sides[f"{i + 100}.jpg"] for i in range(100))
    assert len({sides[f"{i}.jpg"] for i in range(200, 300)}) == 1


def test_splits_that_the_data_has_are_kept_and_nothing_is_read_for_them() -> None:
    given_splits = {name: [Sample(f"{name}{i}", 0) for i in range(10)] for name in ("train", "val", "test")}
    assert split(given_splits, lambda _: pytest.fail("read"), HoldOut(0.4, 0.5)) == given_splits


@pytest.mark.parametrize(("val", "test"), [(0.2, 0.0), (0.2, 0.2), (0.1, 0.4)])
def test_fractions_are_shares_of_the_whole(val: float, test: float) -> None:
    parts = split({"train": [Sample(f"{i}.jpg", i % 2) for i in range(2000)]}, known, HoldOut(val, test))
    assert len(parts["val"]) == pytest.approx(2000 * val, rel=0.12)
    assert len(parts["test"]) == pytest.approx(2000 * test, rel=0.12)
    assert len({s.name for part in parts.values() for s in part}) == 2000


def test_each_image_is_validated_in_one_fold() -> None:
    data = {
        "train": [Sample(f"{i}.jpg", i % 2) for i in range(90)],
        "val": [Sample(f"v{i}.jpg", i % 2) for i in range(9)],
    }
    folds = [split(data, known, HoldOut(fold=f"{number}/5")) for number in range(1, 6)]
    assert sorted(s.name for fold in folds for s in fold["val"]) == sorted(
        s.name for part in data.values() for s in part
    )
    assert all(len(fold["train"]) + len(fold["val"]) == 99 for fold in folds)
    tested = [split(data, known, HoldOut(test_fraction=0.2, fold=f"{number}/3")) for number in range(1, 4)]
    assert tested[0]["test"] == tested[1]["test"] == tested[2]["test"] != []


@pytest.mark.parametrize("text", ["", "5", "0/5", "6/5", "1/1", "a/b", "1/5/2", "-1/5"])
def test_what_is_no_fold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2/5"):
        parse_fold(text)
    assert parse_fold("2/5") == (2, 5)
