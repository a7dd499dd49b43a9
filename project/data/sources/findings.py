"""Findings about the classes of any source: those that cannot be learnt or measured, and their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from project.data.sources.base import Finding, Sample, quote_names


def class_findings(where: str, classes: Sequence[str], splits: Mapping[str, Sequence[Sample]]) -> Iterator[Finding]:
    """Classes that cannot be learnt, or not be measured, of data that lists its labels.

    Args:
        where: What names the data, for the message.
        classes: All of them.
        splits: Samples by split, ``train`` among them.
    """
    here = {split: {sample.label for sample in samples} for split, samples in splits.items()}
    if not splits["train"]:
        yield Finding("refused", "no train", f"{where} has no image for train.")
        return
    if len(classes) < 2:
        yield Finding("refused", "one class", f"{where} has one label only, {classes[0]!r}.")
    everywhere = set().union(*here.values())
    unlearnt = [classes[number] for number in sorted(everywhere - here["train"])]
    if unlearnt:
        text = f"{where}: no image of train has the label {quote_names(unlearnt)}, so nothing could learn it."
        yield Finding("refused", "class in one split", text)
    unseen = [name for number, name in enumerate(classes) if number not in everywhere]
    if unseen:
        yield Finding("problem", "empty class", f"{where}: no image has the label {quote_names(unseen)}.")
    for split in [split for split in here if split != "train"]:
        lacking = [name for number, name in enumerate(classes) if number not in here[split]]
        if lacking:
            text = (
                f"{split} has no images of {quote_names(lacking)}, so nothing is known of how well they are recognised."
            )
            yield Finding("problem", "class in one split", text)


def name_findings(classes: Iterable[str]) -> Iterator[Finding]:
    """Classes whose names are no text, or differ by case, spaces, hyphens or underscores alone."""
    for name in classes:
        if not name.isascii() and name.encode("utf-8", "replace").decode() != name:
            text = f"The class {name!r} has a name that is no UTF-8 text. Rename its folder, or its label."
            yield Finding("refused", "class name", text)
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike["".join(re.sub(r"(?<=\w)[-_]", " ", name.casefold()).split())].append(name)
    for names in alike.values():
        if len(names) > 1:
            text = f"Classes {quote_names(names)} differ by case or space alone. If they are one class, use one name."
            yield Finding("problem", "similar names", text)
