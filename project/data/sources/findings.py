"""Findings about the classes of any source: those that cannot be learnt or measured, and their names."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
            text = f"{split} has no images of {quote_names(lacking)}, so their accuracy cannot be measured."
            yield Finding("problem", "class in one split", text)


def name_findings(classes: Iterable[str], published: bool = False) -> Iterator[Finding]:
    """Classes whose names are no text, or that people would take for each other.

    Args:
        classes: Their names.
        published: The names are somebody else's, who may tell A from a.
    """
    for name in classes:
        if not name.isascii() and name.encode("utf-8", "replace").decode() != name:
            text = f"The class {name!r} has a name that is no UTF-8 text. Rename its folder, or its label."
            yield Finding("refused", "class name", text)
    same = _groups(classes, _shown if published else _visible)
    for names in same:
        codes = " and ".join(ascii(name) for name in names)
        text = f"Classes {codes} differ by case or by characters that cannot be seen. Give them different names."
        yield Finding("refused", "same name", text)
    for names in _groups(classes, lambda name: "".join(re.sub(r"(?<=\w)[-_]", " ", _visible(name)).split())):
        if names not in same:
            text = f"Classes {quote_names(names)} differ by spaces or hyphens alone. Are they one class?"
            yield Finding("problem", "similar names", text)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): a file system may hold an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)


#: Characters without a shape that are not of category Cf: fillers, a joiner, and variation selectors.
HIDDEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


def _shown(name: str) -> str:
    """What can be seen of a name."""
    return composed("".join(each for each in name if unicodedata.category(each) != "Cf" and each not in HIDDEN))


def _visible(name: str) -> str:
    """The same, whatever its case."""
    return composed(_shown(name).casefold())


def _groups(classes: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Classes that have a key in common."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[key(name)].append(name)
    return [names for names in groups.values() if len(names) > 1]
