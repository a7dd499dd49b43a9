"""Split samples into train, val and test: stratified, seeded and stable, with near-duplicates and groups together."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from project.data.image_index import ImageInfo
from project.data.near_duplicates import near_duplicates
from project.data.sources.base import Sample
from project.errors import ConfigError, DataError


class Place(NamedTuple):
    """Position of a sample in the unit interval, which determines its split.

    Attributes:
        position: In [0, 1); the same for all samples of a cluster.
        cluster: Number of the sample's cluster, which is never divided between splits.
    """

    position: float
    cluster: int


Placed = list[tuple[Sample, Place]]
NEVER_HELD_OUT = -1  # in the place of a fold's number


def assign_places(samples: Sequence[Sample], infos: Sequence[ImageInfo], seed: int) -> Placed:
    """Assign each sample a position in [0, 1).

    Near-duplicates and images of one group form a cluster, which has one position: a hash of the group name, or the
    smallest hash of the image bytes. Adding images therefore moves no existing image, unless they join two clusters.

    Args:
        samples: N samples.
        infos: Properties of each.
        seed: Seed of the hash.
    """
    clusters = near_duplicates(infos)
    first: dict[str, int] = {}
    for index, sample in enumerate(samples):
        if sample.group:
            clusters.join(first.setdefault(sample.group, index), index)
    of_sample = [clusters.find(index) for index in range(len(samples))]
    positions: dict[int, float] = {}
    for sample, info, cluster in zip(samples, infos, of_sample, strict=True):
        key = f"group {sample.group}".encode() if sample.group else info.digest or os.fsencode(sample.name)
        position = int.from_bytes(hashlib.sha256(b"%d %b" % (seed, key)).digest()[:8]) / 2**64
        positions[cluster] = min(positions.get(cluster, 1.0), position)
    return [(sample, Place(positions[cluster], cluster)) for sample, cluster in zip(samples, of_sample, strict=True)]


def hold_out(placed: Placed, begin: float, end: float, both_sides: bool = True) -> tuple[Placed, Placed]:
    """Hold out the samples whose position is in an interval.

    Positions are hashes, so about the same fraction of each class is held out.

    Args:
        placed: Samples with their places.
        begin: Start of the interval.
        end: End of the interval, exclusive. An empty interval holds out nothing.
        both_sides: Whether each class of two or more clusters gets at least one on each side: its cluster nearest to
            the bounds of the interval is moved if necessary. The only cluster of a class is never held out.

    Returns:
        Samples to keep and samples held out, both in their original order.
    """
    if begin >= end:
        return placed, []
    held = {place.cluster: begin <= place.position < end for _, place in placed}
    classes: dict[int, dict[int, float]] = defaultdict(dict)  # distance of each cluster to the interval's bounds
    for sample, place in placed:
        classes[sample.label][place.cluster] = min(abs(place.position - begin), abs(place.position - end))
    for distances in classes.values():
        if len(distances) == 1:
            held[next(iter(distances))] = False
    for distances in classes.values() if both_sides else ():
        sides = {held[cluster] for cluster in distances}
        if len(distances) > 1 and len(sides) == 1:
            held[min(distances, key=lambda cluster: (distances[cluster], cluster))] = False in sides
    return [item for item in placed if not held[item[1].cluster]], [item for item in placed if held[item[1].cluster]]


def stratified_folds(placed: Placed, count: int) -> list[int]:
    """Divide samples into folds of about equal size and equal class frequencies. Clusters are not divided.

    A class whose samples are all in one fold would have none to train on if that fold is held out, so it is never held
    out.

    Args:
        placed: Samples with their places.
        count: Number of folds.

    Returns:
        Fold of each sample, from 0, or :data:`NEVER_HELD_OUT`. No fold is empty; there are fewer folds if there are
        fewer clusters.
    """
    clusters: dict[int, list[int]] = defaultdict(list)
    for sample, place in placed:
        clusters[place.cluster].append(sample.label)
    positions = {place.cluster: place.position for _, place in placed}
    of_class: dict[int, list[int]] = defaultdict(lambda: [0] * count)
    sizes, fold_of = [0] * count, {}
    for cluster, labels in sorted(clusters.items(), key=lambda item: (-len(item[1]), positions[item[0]])):
        fold = min(range(count), key=lambda fold: (sum(of_class[label][fold] for label in labels), sizes[fold]))
        fold_of[cluster] = fold
        sizes[fold] += len(labels)
        for label in labels:
            of_class[label][fold] += 1
    folds_of_class: dict[int, set[int]] = defaultdict(set)
    for sample, place in placed:
        folds_of_class[sample.label].add(fold_of[place.cluster])
    folds = [
        fold_of[place.cluster] if len(folds_of_class[sample.label]) > 1 else NEVER_HELD_OUT for sample, place in placed
    ]
    used = sorted({*folds} - {NEVER_HELD_OUT})
    return [NEVER_HELD_OUT if fold == NEVER_HELD_OUT else used.index(fold) for fold in folds]


def limit_classes(placed: Placed, infos: Sequence[ImageInfo], count: int, seed: int) -> list[Sample]:
    """Keep a fixed, random subset of each class: the images with the smallest hashes.

    An added image therefore replaces at most one of its class, unless it joins two clusters. Images of different
    clusters come first, so that near-duplicates and images of one group are chosen together only where a class has too
    few clusters.

    Args:
        placed: N samples with their places.
        infos: Properties of each.
        count: Number of images to keep in each class; a class with fewer images keeps all.
        seed: Seed of the hash.

    Returns:
        The samples that are kept, in their original order.
    """
    samples, clusters = [sample for sample, _ in placed], [place.cluster for _, place in placed]
    # Not the hash of assign_places: the smallest of those are held out for val.
    hashes = [
        hashlib.sha256(b"per class %d %b" % (seed, info.digest or os.fsencode(sample.name))).digest()
        for sample, info in zip(samples, infos, strict=True)
    ]
    earlier: Counter[tuple[int, int]] = Counter()  # images of a class and cluster with smaller hashes
    ranks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index in sorted(range(len(samples)), key=lambda index: (hashes[index], samples[index].name)):
        label = samples[index].label
        ranks[label].append((earlier[label, clusters[index]], index))
        earlier[label, clusters[index]] += 1
    by_rank = (sorted(items, key=lambda item: item[0]) for items in ranks.values())  # stable: then by hash
    kept = {index for items in by_rank for _, index in items[:count]}
    return [sample for index, sample in enumerate(samples) if index in kept]


@dataclass(frozen=True)
class HoldOut:
    """Settings of the splits: what is held out from train, and what of train is used; plain types only.

    Attributes:
        val_fraction: Fraction of all images for validation.
        test_fraction: Fraction of all images for the test.
        fold: Cross-validation fold: ``2/5`` is the second of five. Train and val are merged first.
        split_seed: Seed of the splits.
        per_class: Number of training images to use of each class, see :func:`limit_classes`; ``None`` for all.

    Raises:
        ConfigError: A value is out of range.
    """

    val_fraction: float = 0.2
    test_fraction: float = 0.0
    fold: str | None = None
    split_seed: int = 0
    per_class: int | None = None

    def __post_init__(self) -> None:
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            raise ConfigError("data.val_fraction and data.test_fraction must be at least 0, and their sum less than 1.")
        if self.fold is not None:
            parse_fold(self.fold)
        if self.per_class is not None and self.per_class < 1:
            raise ConfigError(f"data.per_class must be at least 1, got {self.per_class}.")


def split(
    given: Mapping[str, list[Sample]], places: Callable[[Sequence[Sample]], Placed], settings: HoldOut
) -> dict[str, list[Sample]]:
    """Complete the splits of a source: hold out the missing ones from train.

    Args:
        given: Samples by ``train`` and, if the source has them, ``val`` and ``test``.
        places: Finds the places of samples; called only if images have to be held out.
        settings: Fractions or fold.

    Returns:
        Samples by ``train``, ``val`` and ``test``; test may be empty.
    """
    fold = parse_fold(settings.fold) if settings.fold is not None else None
    train, val, test = (list(given.get(name, ())) for name in ("train", "val", "test"))
    if fold:
        train, val = train + val, []
    test_end = 0.0 if test else settings.test_fraction
    width = (1 - test_end) / fold[1] if fold else settings.val_fraction
    begin = test_end + (width * (fold[0] - 1) if fold else 0)
    end = begin + width if fold is None or fold[0] < fold[1] else 1.0
    hold_val = not val and width > 0
    if hold_val or test_end:
        placed, to_test = hold_out(places(train), 0.0, test_end)
        # Folds must be disjoint, so none gets an extra image of a class that is too small for all folds.
        placed, to_val = hold_out(placed, begin, end if hold_val else begin, both_sides=fold is None)
        train = [sample for sample, _ in placed]
        test = test or [sample for sample, _ in to_test]
        val = val or [sample for sample, _ in to_val]
    return {"train": train, "val": val, "test": test}


def unused_fractions(given: Mapping[str, list[Sample]], settings: HoldOut) -> dict[str, str]:
    """Settings of fractions that hold out no images, each with the reason.

    Args:
        given: Samples by ``train`` and, if the source has them, ``val`` and ``test``.
        settings: Settings of the held-out splits.
    """
    reasons = {f"{name}_fraction": f"the data has a {name} split" for name in ("val", "test") if given.get(name)}
    if settings.fold:
        reasons["val_fraction"] = "data.fold selects the validation images"
    default = vars(HoldOut())
    return {f"data.{name}": reason for name, reason in reasons.items() if vars(settings)[name] != default[name]}


def empty_split_error(name: str, given: Container[str], settings: HoldOut) -> DataError:
    """Error for a split without images: why it has none, and how to fix it.

    Args:
        name: ``val`` or ``test``.
        given: Names of the splits that the source has.
        settings: Settings of the held-out splits.
    """
    if settings.fold and name == "val":
        return DataError("This fold has no images: the data set is too small. Use fewer folds: --data.fold 1/2")
    own_split = f"a {name} split (a folder beside train/, or a split column in the table)"
    if name not in given and vars(settings).get(f"{name}_fraction"):
        return DataError(
            f"The data set is too small for a {name} split: train keeps an image of each class, and near-duplicates "
            f"and groups stay together. Add images, or {own_split}."
        )
    return DataError(
        f"The {name} split has no readable images. Add {own_split}, or run fit with --data.{name}_fraction 0.1 to hold "
        "out images from train."
    )


def parse_fold(text: str) -> tuple[int, int]:
    """Parse ``2/5`` as ``(2, 5)``, the second of five folds.

    Raises:
        ConfigError: The text has another form, or the fold does not exist.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) and int(count) > 1):
        raise ConfigError(f"data.fold: {text!r} is not a fold. Use N/COUNT, such as 2/5 for the second of five folds.")
    return int(number), int(count)
