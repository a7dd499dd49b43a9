"""Splitting samples: stratified, seeded, and the same for everyone who asks with the same seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from project.data.sources import Sample


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out the same fraction of each class.

    Args:
        samples: What to split.
        fraction: Share of each class to hold out, in [0, 1). Of a class of two or more, at least one image is held
            out and at least one kept; a class of one image is kept.
        seed: Another seed holds out other images.

    Returns:
        The samples kept and those held out, each in their former order.
    """
    by_class: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_class[sample.label].append(sample)
    held: set[str] = set()
    for label, members in by_class.items():
        count = min(max(round(len(members) * fraction), 1), len(members) - 1) if fraction else 0
        chosen = random.Random(f"{seed}/{label}").sample(sorted(members), count)  # order of listing does not count
        held.update(sample.name for sample in chosen)
    return [s for s in samples if s.name not in held], [s for s in samples if s.name in held]


def split(
    given: Mapping[str, list[Sample]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[Sample]]:
    """Complete the splits that a source has: what it lacks is held out from train.

    Args:
        given: Samples by ``train`` and, where the source has them, ``val`` and ``test``.
        val_fraction: Share for validation, where there is none.
        test_fraction: Share for the test, where there is none.
        seed: Seed of the hold-out.

    Returns:
        Samples by ``train``, ``val`` and ``test``; test may be empty.
    """
    train = given["train"]
    test = given.get("test", [])
    if not test:
        train, test = hold_out(train, test_fraction, seed)
    val = given.get("val", [])
    if not val:  # of what test has left, so that the share is one of the whole
        train, val = hold_out(train, val_fraction / (1 - (test_fraction if "test" not in given else 0)), seed)
    return {"train": train, "val": val, "test": test}
