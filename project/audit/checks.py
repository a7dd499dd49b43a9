"""The data doctor: everything that would spoil a result, and where it is, from what is known of each image."""

from __future__ import annotations

import csv
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project.data.image_index import ImageInfo
from project.data.near_duplicates import alike, same
from project.data.sources.base import Finding, Source, quote_names
from project.errors import ConfigError, DataError
from project.runtime.atomic_write import replacing

TINY = 10  # training images of a class, under which little can be learnt of it
IMBALANCE = 10  # times as many images in the largest class as in the smallest
SPREAD = 10  # times as many pixels in the largest image as in the median one, or in that as in the smallest


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        source: Name of the data.
        counts: Images by class and split.
        findings: All of them: what cannot be trained on, problems, notes.
        bad: Images that are better left out, each with the reason.
        rows: All images: path, class, split and group.
        facts: What is known of each, by its path.
    """

    source: str
    counts: Mapping[str, Mapping[str, int]]
    findings: tuple[Finding, ...]
    bad: Mapping[str, str]
    rows: tuple[tuple[str, str, str, str], ...]
    facts: Mapping[str, ImageInfo]

    @property
    def clean(self) -> bool:
        """Whether there are notes at most."""
        return all(finding.level == "note" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {
            "source": self.source,
            "images": len(self.rows),
            "clean": self.clean,
            "classes": {name: dict(splits) for name, splits in self.counts.items()},
            "findings": [finding._asdict() for finding in self.findings],
            "bad": dict(self.bad),
        }

    def write_manifest(self, path: Path) -> int:
        """Write a manifest without the bad images, for ``data.root``.

        Args:
            path: A CSV file; paths in it are relative to its folder.

        Returns:
            How many rows it has.

        Raises:
            ConfigError: It cannot be written.
            DataError: The images are not files.
        """
        if path.suffix.lower() != ".csv":
            raise ConfigError(f"--fix: {path} has to end in .csv, for data.root to know it as a manifest.")
        kept = [row for row in self.rows if row[0] not in self.bad]
        if not kept:
            raise DataError("--fix: no image is left that could be in a manifest.")
        strangers = [name for name, *_ in kept if not Path(name).is_file()]
        if strangers:
            raise DataError(f"--fix: the images of {self.source} are not files, as a manifest needs ({strangers[0]}).")
        split = {name for _, _, name, _ in kept} != {"train"}
        columns = ["path", "label", *(["split"] if split else []), *(["group"] if any(row[3] for row in kept) else [])]
        # A table's first spaces are skipped when it is read, unless they are quoted.
        spaced = any(value[:1] == " " for row in kept for value in row)
        folder = path.parent.resolve()
        try:
            with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, quoting=csv.QUOTE_ALL if spaced else csv.QUOTE_MINIMAL)
                writer.writerow(columns)
                for name, label, place, group in kept:
                    values = {"path": os.path.relpath(Path(name).absolute(), folder), "label": label, "split": place}
                    writer.writerow([({**values, "group": group})[column] for column in columns])
        except (OSError, UnicodeEncodeError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{error.object!r} is no UTF-8 name"
            raise ConfigError(f"--fix: {path} cannot be written: {why}.") from error
        return len(kept)


def audit(source: Source, facts: Mapping[str, ImageInfo]) -> Audit:
    """Examine data.

    Args:
        source: The data.
        facts: What is known of each image, by its name.
    """
    rows = [
        (sample.name, source.classes[sample.label], split, sample.group)
        for split, samples in source.splits.items()
        for sample in samples
    ]
    known = [facts[name] for name, *_ in rows]
    bad: dict[str, str] = {}
    findings = [
        *source.findings,
        *_unreadable(rows, known, bad),
        *_duplicates(rows, known, bad),
        *_sizes_of_classes(source),
        *_traits(rows, known),
        *_sizes_of_images(rows, known),
    ]
    order = ("refused", "problem", "note")
    findings.sort(key=lambda finding: order.index(finding.level))
    counts: dict[str, Counter[str]] = {name: Counter() for name in source.classes}
    for _, label, split, _ in rows:
        counts[label][split] += 1
    return Audit(source.name, counts, tuple(findings), bad, tuple(rows), facts)


Row = tuple[str, str, str, str]


def _unreadable(rows: Sequence[Row], known: Sequence[ImageInfo], bad: dict[str, str]) -> Iterator[Finding]:
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for (name, *_), facts in zip(rows, known, strict=True):
        if facts.error:
            kinds[facts.kind].append((name, facts.error))
            bad[name] = facts.kind
    for kind, found in kinds.items():
        text = " ".join(found[0]) if len(found) == 1 else f"{len(found)} files, such as {' '.join(found[0])}"
        yield Finding("problem", kind, text, tuple(name for name, _ in found))


def _duplicates(rows: Sequence[Row], known: Sequence[ImageInfo], bad: dict[str, str]) -> Iterator[Finding]:
    exact = same(known)
    yield from _copies("the same", exact.sets(), rows, bad)
    # Also of those that are the same to the byte, as another that is alike may be in another split.
    seen = [members for members in alike(known).sets() if len({exact.find(at) for at in members}) > 1]
    yield from _copies("alike to the eye", seen, rows, bad)


#: Which copy is the better one to keep: what is trained on is left out rather than what is measured with.
KEPT = ("test", "val", "train")


def _copies(how: str, sets: Iterable[Sequence[int]], rows: Sequence[Row], bad: dict[str, str]) -> Iterator[Finding]:
    kinds: dict[str, list[list[int]]] = defaultdict(list)
    for members in sets:
        if len(members) < 2:
            continue
        labels, splits = {rows[at][1] for at in members}, {rows[at][2] for at in members}
        if len(labels) > 1:
            kinds["two labels"].append(list(members))
        if len(splits) > 1:
            kinds["two splits"].append(list(members))
        if len(labels) == len(splits) == 1:
            kinds["copies"].append(list(members))
        if len(labels) > 1:  # who knows which is right
            bad.update({rows[at][0]: f"{how}, under two labels" for at in members})
        elif len(splits) > 1 or how == "the same":
            first = min(members, key=lambda at: (KEPT.index(rows[at][2]), at))
            other = [at for at in members if at != first]
            if how != "the same":  # a burst of pictures within one split does no harm
                other = [at for at in other if rows[at][2] != rows[first][2]]
            bad.update({rows[at][0]: f"{how} as {rows[first][0]}" for at in other if rows[at][0] not in bad})
    for kind, found in kinds.items():
        named = [[f"{rows[at][0]} ({rows[at][2]}, {rows[at][1]})" for at in members] for members in found]
        text = {
            "two labels": "Images that are {} are under two labels, {}",
            "two splits": "Images that are {} are in two splits, so what is measured was trained on, {}",
            "copies": "Images of one class and split are {}, {}",
        }[kind]
        times = "once" if len(found) == 1 else f"{len(found)} times"
        text = f"{text.format(how, times)}: {' and '.join(named[0][:3])}"
        level: Any = "note" if kind == "copies" else "problem"
        yield Finding(level, f"{how}: {kind}", text, tuple(rows[at][0] for members in found for at in members))


def _sizes_of_classes(source: Source) -> Iterator[Finding]:
    counts = Counter(source.classes[sample.label] for sample in source.splits.get("train", ()))
    tiny = [name for name, count in counts.items() if count < TINY]
    if tiny:
        yield Finding("note", "tiny class", f"Fewer than {TINY} training images: {quote_names(tiny)}.", tuple(tiny))
    if counts and max(counts.values()) >= IMBALANCE * min(counts.values()):
        (most, many), (least, few) = counts.most_common(1)[0], counts.most_common()[-1]
        text = f"{most!r} has {many} training images and {least!r} {few}. Try --data.balance sampler, or loss."
        yield Finding("note", "imbalance", text, (most, least))


def _traits(rows: Sequence[Row], known: Sequence[ImageInfo]) -> Iterator[Finding]:
    handled = {
        "turned by EXIF": "are turned upright",
        "16-bit": "are rescaled",
        "float": "are rescaled",
        "CMYK": "are converted",
        "palette": "are converted",
        "transparent": "are laid on white",
        "animated": "give their first frame",
    }
    for trait, what in handled.items():
        names = [name for (name, *_), facts in zip(rows, known, strict=True) if trait in facts.traits]
        if names:
            yield Finding("note", trait, f"Images that {what}: {len(names)}.", tuple(names))


def _sizes_of_images(rows: Sequence[Row], known: Sequence[ImageInfo]) -> Iterator[Finding]:
    sizes = {row[0]: (facts.width, facts.height) for row, facts in zip(rows, known, strict=True) if facts.width}
    if not sizes:
        return
    by_area = sorted(sizes, key=lambda name: sizes[name][0] * sizes[name][1])
    least, most = by_area[0], by_area[-1]
    area = {name: sizes[name][0] * sizes[name][1] for name in (least, most)}
    middle = statistics.median(width * height for width, height in sizes.values())
    if area[most] >= SPREAD * middle or middle >= SPREAD * area[least]:
        text = "From {}x{} to {}x{} pixels.".format(*sizes[least], *sizes[most])
        yield Finding("note", "image sizes", text, (least, most))
