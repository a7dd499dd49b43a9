"""Findings about the classes of a source: missing images and ambiguous names."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from project.data.sources.base import Finding, Sample, quote_names


def class_findings(where: str, classes: Sequence[str], splits: Mapping[str, Sequence[Sample]]) -> Iterator[Finding]:
    """Find classes that cannot be learned, or not be evaluated, for lack of images.

    Args:
        where: Beginning of the messages: the option and the data.
        classes: Names of all classes.
        splits: Samples by split; has ``train``.
    """
    labels = {split: {sample.label for sample in samples} for split, samples in splits.items()}
    if not splits["train"]:
        yield Finding("refused", "no train", f"{where} has no training images.")
        return
    if len(classes) < 2:
        yield Finding("refused", "one class", f"{where} has only one class, {classes[0]!r}; at least two are needed.")
    all_labels = set().union(*labels.values())
    untrained = [classes[label] for label in sorted(all_labels - labels["train"])]
    if untrained:
        text = f"{where}: train has no images of {quote_names(untrained)}. Add some, or remove the class elsewhere."
        yield Finding("refused", "class in one split", text)
    empty = [name for label, name in enumerate(classes) if label not in all_labels]
    if empty:
        yield Finding("problem", "empty class", f"{where}: there are no images of {quote_names(empty)}.")
    for split in [split for split in splits if split != "train"]:
        missing = [name for label, name in enumerate(classes) if label not in labels[split]]
        if missing:
            yield missing_classes(split, missing)


def missing_classes(split: str, names: Sequence[str]) -> Finding:
    """Finding about classes that val or test has no images of."""
    text = f"{split} has no images of {quote_names(names)}, so their accuracy cannot be measured."
    return Finding("problem", "class in one split", text)


def name_findings(classes: Iterable[str], published: bool = False) -> Iterator[Finding]:
    """Find class names that are not valid text, or that are easily confused.

    Args:
        classes: Class names.
        published: The data set is published, and may distinguish "A" from "a".
    """
    for name in classes:
        if not name.isascii() and name.encode("utf-8", "replace").decode() != name:
            text = f"Class name {name!r} is not valid UTF-8. Rename its folder or its label."
            yield Finding("refused", "class name", text)
    identical = _groups(classes, _remove_invisible if published else _fold)
    for names in identical:
        codes = " and ".join(ascii(name) for name in names)
        text = f"Class names {codes} differ only by case, invisible characters or Unicode form. Merge or rename them."
        yield Finding("refused", "same name", text)
    for names in _groups(classes, lambda name: "".join(re.sub(r"(?<=\w)[-_]", " ", _fold(name)).split())):
        if names not in identical:
            text = f"Classes {quote_names(names)} differ only by spaces or hyphens. Merge them if they are one class."
            yield Finding("problem", "similar names", text)


def train_spelling(names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Map the class names of each split to the spelling that train uses.

    One name can be spelled in several Unicode forms; some file systems store an accent as a separate character. In a
    split that has several forms of one name, each maps to itself, and :func:`name_findings` refuses them.

    Args:
        names: Class names by split.
    """
    train = {nfc(name): name for name in names.get("train", ())}
    spelling: dict[str, dict[str, str]] = {}
    for split, members in names.items():
        unique = set(members)
        is_ambiguous = len({nfc(name) for name in unique}) < len(unique)
        spelling[split] = {name: name if is_ambiguous else train.get(nfc(name), name) for name in unique}
    return spelling


def nfc(name: str) -> str:
    """Normalize a name to Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


#: Characters that are drawn blank although they are not of category Cf: fillers, a joiner and variation selectors.
INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


def _remove_invisible(name: str) -> str:
    return nfc("".join(char for char in name if unicodedata.category(char) != "Cf" and char not in INVISIBLE))


def _fold(name: str) -> str:
    """Remove invisible characters and case."""
    return nfc(_remove_invisible(name).casefold())


def _groups(classes: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Group class names by key, and return the groups of two or more."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[key(name)].append(name)
    return [names for names in groups.values() if len(names) > 1]
