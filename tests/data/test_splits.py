"""Splits: stratified, stable, and with near-duplicates and groups on one side."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from project.data.image_index import ImageInfo
from project.data.sources.base import Sample
from project.data.splits import (
    NEVER_HELD_OUT,
    HoldOut,
    Placed,
    assign_places,
    hold_out,
    limit_classes,
    parse_fold,
    split,
    stratified_folds,
    unused_fractions,
)
from project.errors import ConfigError

labelled = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(
    lambda labels: [Sample(f"{i}.jpg", label) for i, label in enumerate(labels)]
)


def distinct_infos(samples: Sequence[Sample]) -> list[ImageInfo]:
    """Properties of images of which no two are duplicates."""
    return [ImageInfo(hashlib.sha256(sample.name.encode()).digest()) for sample in samples]


def distinct_places(samples: Sequence[Sample], seed: int = 0) -> Placed:
    return assign_places(samples, distinct_infos(samples), seed)


def limited(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    return limit_classes(distinct_places(samples, seed), distinct_infos(samples), count, seed)


def divide(samples: Sequence[Sample], fraction: float, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    kept, held = hold_out(distinct_places(samples, seed), 0.0, fraction)
    return [sample for sample, _ in kept], [sample for sample, _ in held]


@given(labelled, st.floats(0.01, 0.9), st.integers(0, 5))
def test_hold_out_partitions_samples_with_each_class_on_both_sides(
    samples: list[Sample], fraction: float, seed: int
) -> None:
    kept, held = divide(samples, fraction, seed)
    assert sorted(kept + held) == sorted(samples)
    counts, held_counts = Counter(s.label for s in samples), Counter(s.label for s in held)
    for label, count in counts.items():
        assert held_counts[label] < count, "a class without training images could not be learned"
        assert held_counts[label] >= 1 or count == 1


def test_hold_out_is_stratified() -> None:
    samples = [Sample(f"{i}.jpg", int(i % 10 == 0)) for i in range(5000)]
    counts = Counter(sample.label for sample in divide(samples, 0.2)[1])
    assert counts[0] / 4500 == pytest.approx(0.2, abs=0.02)
    assert counts[1] / 500 == pytest.approx(0.2, abs=0.05)


@given(labelled, st.randoms())
def test_split_does_not_depend_on_the_order_of_samples(samples: list[Sample], random: object) -> None:
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(divide(samples, 0.3)[1]) == set(divide(shuffled, 0.3)[1])


@given(st.integers(0, 1000), st.integers(1, 300), st.floats(0.1, 0.5))
def test_images_keep_their_split_when_others_are_added(begin: int, more: int, fraction: float) -> None:
    samples = [Sample(f"{begin + i}.jpg", i % 2) for i in range(100)]
    added = [*samples, *(Sample(f"new{i}.jpg", i % 2) for i in range(more))]
    before, after = (set(divide(images, fraction)[1]) for images in (samples, added))
    assert after & set(samples) == before


def test_split_depends_on_the_seed() -> None:
    samples = [Sample(f"{i}.jpg", 0) for i in range(100)]
    assert divide(samples, 0.2) == divide(samples, 0.2)
    assert divide(samples, 0.2) != divide(samples, 0.2, 1)


def test_group_is_not_divided() -> None:
    samples = [Sample(f"{i}.jpg", i % 2, f"patient {i // 7}") for i in range(700)]
    kept, held = divide(samples, 0.3)
    assert not {s.group for s in kept} & {s.group for s in held}
    assert len(held) == pytest.approx(210, abs=60)
    more = [*samples, *(Sample(f"new{i}.jpg", 0, f"patient {i % 120}") for i in range(50))]
    assert set(divide(more, 0.3)[1]) & set(samples) == set(held), "groups keep their side when images are added"


def test_duplicates_and_near_duplicates_are_not_divided() -> None:
    samples = [Sample(f"{i}.jpg", i % 2) for i in range(300)]
    thumbnail = bytes(range(256))
    infos = [
        ImageInfo((i % 100).to_bytes(32))
        if i < 200
        else ImageInfo(i.to_bytes(32), phash=i % 2 * 3, thumbnail=thumbnail, color=bytes(3))
        for i in range(300)
    ]
    kept, held = hold_out(assign_places(samples, infos, 0), 0.0, 0.4)
    sides = {sample.name: side for side, part in enumerate((kept, held)) for sample, _ in part}
    assert all(sides[f"{i}.jpg"] == sides[f"{i + 100}.jpg"] for i in range(100))
    assert len({sides[f"{i}.jpg"] for i in range(200, 300)}) == 1


def test_existing_splits_are_kept_without_reading_images() -> None:
    given_splits = {name: [Sample(f"{name}{i}", 0) for i in range(10)] for name in ("train", "val", "test")}
    assert split(given_splits, lambda _: pytest.fail("images are read"), HoldOut(0.4, 0.5)) == given_splits


@given(labelled, st.integers(1, 30), st.integers(0, 5), st.randoms())
def test_each_class_is_limited_independently_of_the_order(
    samples: list[Sample], count: int, seed: int, random: object
) -> None:
    kept = limited(samples, count, seed)
    assert kept == [sample for sample in samples if sample in kept], "the order is kept"
    available = Counter(sample.label for sample in samples)
    assert Counter(sample.label for sample in kept) == {label: min(count, n) for label, n in available.items()}
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(limited(shuffled, count, seed)) == set(kept)


def test_an_added_image_replaces_at_most_one_of_its_class() -> None:
    samples = [Sample(f"{i}.jpg", i % 3) for i in range(90)]
    before = set(limited(samples, 5, 0))
    for number in range(50):
        added = [Sample(f"new{number}.jpg", 1), *samples]
        lost = before - set(limited(added, 5, 0))
        assert len(lost) <= 1 and all(sample.label == 1 for sample in lost)
    assert before != set(limited(samples, 5, 1)), "it depends on the seed"


def test_a_limited_class_has_near_duplicates_only_if_it_has_too_few_others() -> None:
    """Six images: three copies of one image, and three of one group."""
    samples = [Sample(f"{i}.jpg", 0, "" if i < 3 else "group") for i in range(6)]
    infos = [ImageInfo(max(i, 2).to_bytes(32)) for i in range(6)]
    for seed in range(10):
        placed = assign_places(samples, infos, seed)
        numbers = [samples.index(sample) for sample in limit_classes(placed, infos, 2, seed)]
        assert [number < 3 for number in numbers] == [True, False]
    assert len(limit_classes(placed, infos, 5, 0)) == 5


@pytest.mark.parametrize(("val", "test"), [(0.2, 0.0), (0.2, 0.2), (0.1, 0.4)])
def test_fractions_are_of_all_images(val: float, test: float) -> None:
    parts = split({"train": [Sample(f"{i}.jpg", i % 2) for i in range(2000)]}, distinct_places, HoldOut(val, test))
    assert len(parts["val"]) == pytest.approx(2000 * val, rel=0.12)
    assert len(parts["test"]) == pytest.approx(2000 * test, rel=0.12)
    assert len({s.name for part in parts.values() for s in part}) == 2000


def test_folds_partition_the_data_and_share_the_test_split() -> None:
    data = {
        "train": [Sample(f"{i}.jpg", i % 2) for i in range(90)],
        "val": [Sample(f"v{i}.jpg", i % 2) for i in range(9)],
    }
    folds = [split(data, distinct_places, HoldOut(fold=f"{number}/5")) for number in range(1, 6)]
    assert sorted(s.name for fold in folds for s in fold["val"]) == sorted(
        s.name for part in data.values() for s in part
    )
    assert all(len(fold["train"]) + len(fold["val"]) == 99 for fold in folds)
    tested = [split(data, distinct_places, HoldOut(test_fraction=0.2, fold=f"{number}/3")) for number in range(1, 4)]
    assert tested[0]["test"] == tested[1]["test"] == tested[2]["test"] != []


@pytest.mark.parametrize("text", ["", "5", "0/5", "6/5", "1/1", "a/b", "1/5/2", "-1/5"])
def test_invalid_folds_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="2/5"):
        parse_fold(text)
    assert parse_fold("2/5") == (2, 5)


def test_a_class_of_one_group_leaves_no_empty_fold() -> None:
    """The group fills a fold of its own, which is never held out."""
    samples = [
        Sample(f"{label}{i}.jpg", label, "" if label else "group") for label in range(3) for i in range(5 - (label > 0))
    ]
    folds = stratified_folds(distinct_places(samples), 5)
    assert folds[:5] == [NEVER_HELD_OUT] * 5
    assert sorted(folds[5:]) == [0, 0, 1, 1, 2, 2, 3, 3]


@given(labelled, st.integers(2, 6))
def test_stratified_folds_are_not_empty_and_leave_images_of_each_class(samples: list[Sample], count: int) -> None:
    folds = stratified_folds(distinct_places(samples), count)
    numbers = {*folds} - {NEVER_HELD_OUT}
    assert numbers == set(range(len(numbers))) and len(numbers) <= count
    for label in {sample.label for sample in samples}:
        of_class = {fold for sample, fold in zip(samples, folds, strict=True) if sample.label == label}
        assert of_class == {NEVER_HELD_OUT} or len(of_class) > 1


@pytest.mark.parametrize(
    ("settings", "names", "expected"),
    [
        ({}, ["val", "test"], {}),
        ({"val_fraction": 0.3, "test_fraction": 0.1}, [], {}),
        ({"val_fraction": 0.3}, ["val"], {"data.val_fraction": "the data has a val split"}),
        ({"test_fraction": 0.1}, ["val", "test"], {"data.test_fraction": "the data has a test split"}),
        ({"val_fraction": 0.3, "fold": "1/5"}, [], {"data.val_fraction": "data.fold selects the validation images"}),
    ],
)
def test_fractions_without_effect_are_named(settings: dict, names: list[str], expected: dict[str, str]) -> None:
    given = {name: [Sample("a.jpg", 0)] for name in ("train", *names)}
    assert unused_fractions(given, HoldOut(**settings)) == expected
