"""Data checks: find what would make training fail or results wrong, from the properties of each image."""

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
from project.data.image_io import CAMERA_DEPTHS
from project.data.near_duplicates import duplicates, near_duplicates
from project.data.sources.base import Finding, Source, quote_names
from project.errors import ConfigError, DataError
from project.runtime.atomic_write import atomic_write

TINY = 10  # a class with fewer training images is reported
IMBALANCE = 10  # reported ratio of the sizes of the largest and the smallest class
SPREAD = 10  # reported ratio of pixel counts: of the largest image to the median, or of the median to the smallest
LEVELS = ("refused", "problem", "note")  # of findings, most severe first
Row = tuple[str, str, str, str]  # path, class, split and group of an image


@dataclass(frozen=True)
class Audit:
    """Result of the data checks.

    Attributes:
        source: Name of the data.
        counts: Number of images by class and split.
        findings: All findings, most severe first.
        bad: Images to leave out, by path, with the reason.
        rows: All images: path, class, split and group.
        infos: Properties of each image, by path.
    """

    source: str
    counts: Mapping[str, Mapping[str, int]]
    findings: tuple[Finding, ...]
    bad: Mapping[str, str]
    rows: tuple[Row, ...]
    infos: Mapping[str, ImageInfo]

    @property
    def clean(self) -> bool:
        """Whether all findings are notes."""
        return all(finding.level == "note" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The JSON report, in plain types."""
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
            path: A CSV file. Image paths are written relative to its folder.

        Returns:
            Number of rows.

        Raises:
            ConfigError: The file cannot be written.
            DataError: The images are not files.
        """
        if path.suffix.lower() != ".csv":
            raise ConfigError(f"--fix: {path} must end in .csv, so that data.root recognizes it as a manifest.")
        good = [row for row in self.rows if row[0] not in self.bad]
        if not good:
            raise DataError("--fix: no image is left to write to the manifest.")
        missing = [name for name, *_ in good if not Path(name).is_file()]
        if missing:
            raise DataError(
                f"--fix: a manifest lists files, but the images of {self.source} are not files ({missing[0]})."
            )
        has_splits = {split for _, _, split, _ in good} != {"train"}
        has_groups = any(group for *_, group in good)
        columns = ["path", "label", *(["split"] if has_splits else []), *(["group"] if has_groups else [])]
        # A manifest's reader skips leading spaces, unless the field is quoted.
        has_leading_space = any(value[:1] == " " for row in good for value in row)
        folder = path.parent.resolve()
        try:
            with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, quoting=csv.QUOTE_ALL if has_leading_space else csv.QUOTE_MINIMAL)
                writer.writerow(columns)
                for name, label, split, group in good:
                    relative = os.path.relpath(Path(name).absolute(), folder)
                    values = {"path": relative, "label": label, "split": split, "group": group}
                    writer.writerow([values[column] for column in columns])
        except (OSError, UnicodeEncodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{error.object!r} is not valid UTF-8"
            raise ConfigError(f"--fix: cannot write {path}: {reason}.") from error
        return len(good)


def audit(source: Source, infos: Mapping[str, ImageInfo]) -> Audit:
    """Check the data of a source.

    Args:
        source: The data.
        infos: Properties of each image, by name.
    """
    rows = [
        (sample.name, source.classes[sample.label], split, sample.group)
        for split, samples in source.splits.items()
        for sample in samples
    ]
    row_infos = [infos[name] for name, *_ in rows]
    bad: dict[str, str] = {}
    findings = [
        *source.findings,
        *_unreadable_findings(rows, row_infos, bad),
        *_duplicate_findings(rows, row_infos, bad),
        *_class_size_findings(source),
        *_trait_findings(rows, row_infos),
        *_image_size_findings(rows, row_infos),
    ]
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    counts: dict[str, Counter[str]] = {name: Counter() for name in source.classes}
    for _, label, split, _ in rows:
        counts[label][split] += 1
    return Audit(source.name, counts, tuple(findings), bad, tuple(rows), infos)


def _unreadable_findings(rows: Sequence[Row], infos: Sequence[ImageInfo], bad: dict[str, str]) -> Iterator[Finding]:
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for (name, *_), info in zip(rows, infos, strict=True):
        if info.error:
            kinds[info.kind].append((name, info.error))
            bad[name] = info.kind
    for kind, errors in kinds.items():
        text = " ".join(errors[0]) if len(errors) == 1 else f"{len(errors)} files, such as {' '.join(errors[0])}"
        yield Finding("problem", kind, text, tuple(name for name, _ in errors))


def _duplicate_findings(rows: Sequence[Row], infos: Sequence[ImageInfo], bad: dict[str, str]) -> Iterator[Finding]:
    exact = duplicates(infos)
    yield from _cluster_findings("duplicate", exact.sets(), rows, bad)
    # Clusters with exact duplicates are included: a near-duplicate of them may be in another split.
    near = [members for members in near_duplicates(infos).sets() if len({exact.find(index) for index in members}) > 1]
    yield from _cluster_findings("near-duplicate", near, rows, bad)


#: Of duplicates in several splits, the one to keep: a training image is dropped rather than an evaluation image.
KEEP_ORDER = ("test", "val", "train")


def _cluster_findings(
    relation: str, clusters: Iterable[Sequence[int]], rows: Sequence[Row], bad: dict[str, str]
) -> Iterator[Finding]:
    """Report clusters of duplicates or near-duplicates, and add the images to leave out to ``bad``."""
    kinds: dict[str, list[Sequence[int]]] = defaultdict(list)
    for members in clusters:
        if len(members) < 2:
            continue
        labels, splits = {rows[index][1] for index in members}, {rows[index][2] for index in members}
        if len(labels) > 1:
            kinds["two labels"].append(members)
        if len(splits) > 1:
            kinds["two splits"].append(members)
        if len(labels) == len(splits) == 1:
            kinds["copies"].append(members)
        if len(labels) > 1:  # the correct label is unknown
            bad.update({rows[index][0]: f"{relation} with another label" for index in members})
        elif len(splits) > 1 or relation == "duplicate":
            best = min(members, key=lambda index: (KEEP_ORDER.index(rows[index][2]), index))
            others = [index for index in members if index != best]
            if relation != "duplicate":  # similar photographs within one split do no harm
                others = [index for index in others if rows[index][2] != rows[best][2]]
            bad.update(
                {rows[index][0]: f"{relation} of {rows[best][0]}" for index in others if rows[index][0] not in bad}
            )
    for kind, groups in kinds.items():
        where = {
            "two labels": "with different labels",
            "two splits": "in different splits, so evaluation data was trained on",
            "copies": "within one class and split",
        }[kind]
        examples = [f"{rows[index][0]} ({rows[index][2]}, {rows[index][1]})" for index in groups[0][:3]]
        count = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        text = f"{relation.capitalize()}s {where} ({count}): {' and '.join(examples)}"
        level: Any = "note" if kind == "copies" else "problem"
        names = tuple(rows[index][0] for members in groups for index in members)
        yield Finding(level, f"{relation}: {kind}", text, names)


def _class_size_findings(source: Source) -> Iterator[Finding]:
    counts = Counter(source.classes[sample.label] for sample in source.splits.get("train", ()))
    tiny = [name for name, count in counts.items() if count < TINY]
    if tiny:
        yield Finding("note", "tiny class", f"Fewer than {TINY} training images: {quote_names(tiny)}.", tuple(tiny))
    if counts and max(counts.values()) >= IMBALANCE * min(counts.values()):
        (largest, most), (smallest, least) = counts.most_common(1)[0], counts.most_common()[-1]
        text = f"{largest!r} has {most} training images, {smallest!r} has {least}. Try --data.balance sampler, or loss."
        yield Finding("note", "imbalance", text, (largest, smallest))


def _trait_findings(rows: Sequence[Row], infos: Sequence[ImageInfo]) -> Iterator[Finding]:
    handling = {
        "turned by EXIF": "rotated upright",
        "16-bit": "rescaled to 8 bits",
        **{f"{depth}-bit": f"{depth} bits deep and rescaled" for depth in CAMERA_DEPTHS},
        "float": "rescaled to 8 bits",
        "CMYK": "converted to RGB",
        "palette": "converted to RGB",
        "transparent": "drawn on white",
        "animated": "reduced to their first frame",
    }
    names = {
        trait: tuple(name for (name, *_), info in zip(rows, infos, strict=True) if trait in info.traits)
        for trait in (*handling, "nearly black")
    }
    for trait, result in handling.items():
        if names[trait]:
            yield Finding("note", trait, f"Images that are {result}: {len(names[trait])}.", names[trait])
    # Probably 10- or 12-bit pixels whose depth no file states.
    dark = names["nearly black"]
    if dark and len(dark) == len(names["16-bit"]):
        text = (
            f"All {len(dark)} 16-bit images use less than 1/16 of their range, so they probably have 10- or 12-bit "
            "pixels. State the bit depth (TIFF MaxSampleValue, PNG sBIT), or rescale them to 16 bits."
        )
        yield Finding("problem", "nearly black", text, dark)


def _image_size_findings(rows: Sequence[Row], infos: Sequence[ImageInfo]) -> Iterator[Finding]:
    sizes = {row[0]: (info.width, info.height) for row, info in zip(rows, infos, strict=True) if info.width}
    if not sizes:
        return
    areas = {name: width * height for name, (width, height) in sizes.items()}
    smallest, largest = min(areas, key=areas.__getitem__), max(areas, key=areas.__getitem__)
    median = statistics.median(areas.values())
    if areas[largest] >= SPREAD * median or median >= SPREAD * areas[smallest]:
        text = "From {}x{} to {}x{} pixels.".format(*sizes[smallest], *sizes[largest])
        yield Finding("note", "image sizes", text, (smallest, largest))
