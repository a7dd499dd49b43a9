"""The images of a source under other labels: a second task on the same features."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from project.data.sources.base import Source, some
from project.data.sources.findings import class_findings
from project.errors import DataError, nearest


def regrouped(source: Source, groups: Mapping[str, Sequence[str]]) -> Source:
    """Put the classes of a source together into groups.

    The images stay what they are to the byte, so features of them that are stored are reused.

    Args:
        source: Has the images; it is left as it is.
        groups: Name of each new class, and the classes that it is made of. Images of all others are left out.

    Raises:
        DataError: A class is unknown, or in two groups.
    """
    members = [name for names in groups.values() for name in names]
    for name in members:
        if name not in source.classes:
            raise DataError(f"{source.name} has no class {name!r}. {nearest(name, source.classes)}")
    twice = sorted({name for name in members if members.count(name) > 1})
    if twice:
        raise DataError(f"Classes in more than one group: {some(twice)}.")
    label = {source.classes.index(name): at for at, names in enumerate(groups.values()) for name in names}
    found = copy.copy(source)
    found.name = "-".join([source.name, *groups])
    found.classes = tuple(groups)
    found.splits = {
        split: [sample._replace(label=label[sample.label]) for sample in samples if sample.label in label]
        for split, samples in source.splits.items()
    }
    found.findings = (*source.findings, *class_findings(found.name, found.classes, found.splits))
    return found
