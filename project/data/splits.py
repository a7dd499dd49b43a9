"""Splitting samples: stratified, seeded, stable, and never with one picture on two sides."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from project.data.image_index import ImageInfo
from project.data.near_duplicates import alike
from project.data.sources.base import Sample
from project.errors import ConfigError, DataError


class Place(NamedTuple):
    """Where a sample lies.

    Attributes:
        at: In [0, 1).
        family: Number of the family that it is of.
    """

    at: float
    family: int


Placed = list[tuple[Sample, Place]]


def place(samples: Sequence[Sample], facts: Sequence[ImageInfo], seed: int) -> Placed:
    """Give each sample a place in [0, 1).

    A family has one place. It is what has to stay together: images that are the same to the byte or to the eye, and
    those of one group. Its place comes from its group's name, or from the least hash of its members' bytes, and from
    nothing else: an image keeps its place whatever is added, unless that makes a larger family of its own.

    Args:
        samples: What to place.
        facts: What is known of each.
        seed: Another seed gives other places.
    """
    clusters = alike(facts)
    first: dict[str, int] = {}
    for at, sample in enumerate(samples):
        if sample.group:
            clusters.join(first.setdefault(sample.group, at), at)
    places: dict[int, float] = {}
    for at, (sample, one) in enumerate(zip(samples, facts, strict=True)):
        what = f"group {sample.group}".encode() if sample.group else one.digest or os.fsencode(sample.name)
        here = int.from_bytes(hashlib.sha256(b"%d %b" % (seed, what)).digest()[:8]) / 2**64
        family = clusters.find(at)
        places[family] = min(places.get(family, 1.0), here)
    return [
        (sample, Place(places[family], family))
        for sample, family in ((sample, clusters.find(at)) for at, sample in enumerate(samples))
    ]


def hold_out(placed: Placed, begin: float, end: float, both_sides: bool = True) -> tuple[Placed, Placed]:
    """Hold out what lies in a part of [0, 1).

    Places are hashes, so it is about the same share of each class.

    Args:
        placed: What to split.
        begin: Where the part begins.
        end: Where it ends; an empty part holds nothing.
        both_sides: Of each class of two families or more hold out one at least and keep one, though its place, the
            nearest one, be on the other side. A class of one family is kept in any case.

    Returns:
        Those kept and those held out, each in their former order.
    """
    if begin >= end:
        return placed, []
    held = {where.family: begin <= where.at < end for _, where in placed}
    classes: dict[int, dict[int, float]] = defaultdict(dict)
    for sample, where in placed:
        classes[sample.label][where.family] = min(abs(where.at - begin), abs(where.at - end))
    for distances in classes.values():
        if len(distances) == 1:
            held[next(iter(distances))] = False
    for distances in classes.values() if both_sides else ():
        sides = {held[family] for family in distances}
        if len(distances) > 1 and len(sides) == 1:
            held[min(distances, key=lambda family: (distances[family], family))] = False in sides
    return [p for p in placed if not held[p[1].family]], [p for p in placed if held[p[1].family]]


@dataclass(frozen=True)
class HoldOut:
    """How images are held out of train, where the data has no split of its own; in plain types.

    Attributes:
        val_fraction: Share of the whole for validation.
        test_fraction: Share for the test.
        fold: ``2/5`` for the second fold of five, for which train and val are put together; ``None`` for no folds.
        split_seed: Another seed holds out other images.

    Raises:
        ConfigError: A value is out of its range.
    """

    val_fraction: float = 0.2
    test_fraction: float = 0.0
    fold: str | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            raise ConfigError("data.val_fraction and data.test_fraction have to be at least 0, their sum less than 1.")
        if self.fold is not None:
            parse_fold(self.fold)


def split(
    given: Mapping[str, list[Sample]], facts: Callable[[Sequence[Sample]], Sequence[ImageInfo]], how: HoldOut
) -> dict[str, list[Sample]]:
    """Complete the splits that a source has: what it lacks is held out of train.

    Args:
        given: Samples by ``train`` and, where the source has them, ``val`` and ``test``.
        facts: Tells what is known of samples; asked if something is to be held out.
        how: Which shares, or which fold.

    Returns:
        Samples by ``train``, ``val`` and ``test``; test may be empty.
    """
    fold = parse_fold(how.fold) if how.fold is not None else None
    train, val, test = (list(given.get(name, ())) for name in ("train", "val", "test"))
    if fold:
        train, val = train + val, []
    tested = 0.0 if test else how.test_fraction
    width = (1 - tested) / fold[1] if fold else how.val_fraction
    begin = tested + (width * (fold[0] - 1) if fold else 0)
    end = begin + width if fold is None or fold[0] < fold[1] else 1.0
    hold_val = not val and width > 0
    if hold_val or tested:
        placed = place(train, facts(train), how.split_seed)
        placed, to_test = hold_out(placed, 0.0, tested)
        # Each image is validated in one fold, though a class may be too small for all of them.
        placed, to_val = hold_out(placed, begin, end if hold_val else begin, both_sides=fold is None)
        train = [sample for sample, _ in placed]
        test = test or [sample for sample, _ in to_test]
        val = val or [sample for sample, _ in to_val]
    return {"train": train, "val": val, "test": test}


def lacking(name: str, given: Container[str], how: HoldOut) -> DataError:
    """Say why a split has no images, and how it gets some.

    Args:
        name: ``val`` or ``test``; where ``train`` lacks a class, it is refused before.
        given: Names of the splits that the source has.
        how: What was to be held out for those that it has not.
    """
    if how.fold and name == "val":
        return DataError("This fold has no images: there are too few. Take fewer folds with --data.fold 1/2")
    mend = f"a split {name} (a folder beside train/; in a table, a column split)"
    if name not in given and vars(how).get(f"{name}_fraction"):
        return DataError(
            f"No image can be held out for {name}: train keeps one of each class, copies and groups stay together. "
            f"Add some, or {mend}."
        )
    return DataError(
        f"The {name} split has no images that can be read. Add {mend}, or fit with --data.{name}_fraction 0.1, "
        "which holds images out of train."
    )


def parse_fold(text: str) -> tuple[int, int]:
    """Read ``2/5`` as the second fold of five.

    Raises:
        ConfigError: It is not of that form, or there is no such fold.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) and int(count) > 1):
        raise ConfigError(f"data.fold: {text!r} is no fold. Write 2/5 for the second of five; 1/5 is the first.")
    return int(number), int(count)
